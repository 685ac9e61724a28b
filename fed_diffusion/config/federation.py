"""The settings of the federation: rounds, what travels, privacy, machines, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fed_diffusion.config.names import part
from fed_diffusion.config.section import Section

Dtype = Literal["fp32", "bf16", "fp16", "int8"]


class RoundConfig(Section):
    """Who takes part in a round, and for how long it waits."""

    fraction: float = Field(1.0, gt=0, le=1)
    """Part of the clients drawn each round."""
    deadline_s: float = Field(3600.0, gt=0)
    """Flower engine: replies later than this are not waited for."""
    quorum: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 0.5
    """Updates without which a round is not closed: a count (2), or a part of those wanted (0.5)."""
    retries: int = Field(2, ge=0)
    """How often a round below its quorum is tried again before the run stops."""
    over_select: float = Field(0.0, ge=0)
    """Ask this part more clients than wanted, and close when the wanted number is in."""
    max_norm: float | None = Field(None, gt=0)
    """Refuse updates whose difference to theta_r has a larger norm."""
    norm_factor: float | None = Field(None, ge=1)
    """Refuse updates that differ this many times more than the median of recent ones."""
    ban_after: int = Field(3, ge=0)
    """Leave a client out after so many bad updates; 0: never."""
    aggregation: Annotated[str, part("mean", "trimmed_mean", "median")] = "mean"
    """mean is equation (8). trimmed_mean and median withstand lying clients, and hold all updates
    of a round in memory: 4 bytes for each parameter and client. your_module:Class: see
    `aggregation.named.Aggregator`."""
    trim: float = Field(0.1, ge=0, lt=0.5)
    """For trimmed_mean: the part of the values left out at either end of each coordinate."""
    checkpoint_every: int = Field(1, ge=1)
    """Rounds between checkpoints."""
    mode: Annotated[str, part("synchronous", "buffered")] = "synchronous"
    """buffered (FedBuff): theta moves when `buffer` updates are in; `rounds` counts its moves;
    your_module:Policy: see `server.policies.RoundPolicy`."""
    buffer: int | None = Field(None, ge=1)
    """Updates behind a move of theta; default: one of every client."""
    staleness: float = Field(0.5, ge=0)
    """a of the factor 1 / (1 + s)^a on the difference of an update during which theta moved s
    times. As in FedBuff the sum of a buffer's differences is divided by their number, so that an
    update that stands alone is damped too."""
    pace: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """In-process engine: simulated seconds of each client's task, for the simulated clock."""

    @model_validator(mode="after")
    def _robust_averages_know_no_weights(self) -> RoundConfig:
        if self.aggregation in ("trimmed_mean", "median") and self.weighting != "uniform":
            raise ValueError(
                f"aggregation: {self.aggregation} knows no weights; set round.weighting to uniform"
            )
        return self

    @model_validator(mode="after")
    def _buffered_rounds_ask_everyone(self) -> RoundConfig:
        if self.mode == "synchronous":
            if self.buffer is not None:
                raise ValueError("buffer: it needs round.mode buffered")
            return self
        if self.mode != "buffered":  # a policy of the user's takes from the settings what it wants
            return self
        if self.fraction != 1 or self.over_select or self.aggregation != "mean":
            raise ValueError(
                "mode: buffered asks every client as soon as it is free and averages, so it goes "
                "with fraction 1, over_select 0 and aggregation mean"
            )
        return self

    weighting: Literal["uniform", "examples"] = "uniform"
    """Equation (8) is uniform. examples: by a client's training images, at most 2^24; the exact
    sums have room for values up to 64 at any such weight and number of clients."""


class WireConfig(Section):
    """What travels, and as what."""

    down: Dtype = "fp32"
    """Of theta_r towards a worker. int8 is rounded at random, without bias."""
    up: Dtype = "fp32"
    differences: bool = False
    """Send back what training changed, in place of the values: small numbers, cheap to round."""
    state: Literal["fp32", "int4"] = "fp32"
    """Of Adam's moments, both ways, where local.state is shared. int4: the first moment in four
    bits a value, rounded at random without bias, the second as one bf16 for each 8 values of a
    weight."""
    scale: Literal["channel", "tensor"] = "channel"
    """For int8: one scale per output channel (for scattered masks per tensor), or per tensor."""


class PrivacyConfig(Section):
    """Differential privacy of clients, towards all who see the model; off while clip is null."""

    clip: float | None = Field(None, gt=0, le=1e3)
    """C: no client moves the model's sum by more than this (Euclidean norm of its difference)."""
    noise_multiplier: float = Field(1.0, gt=0, le=50)
    """z: the noise on the sum is z C on every coordinate."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Of (epsilon, delta); below one over the number of clients."""


class TheoryConfig(Section):
    """What is measured for Theorem 4.11 while a run trains."""

    every: int | None = Field(None, ge=0)
    """Rounds between measurements, beside the first and the last. Default: these two only; 0:
    none at all, as under privacy and in buffered rounds."""


class WorkerConfig(Section):
    """The machine share of one worker. `threads` is part of bit-identity."""

    threads: int = Field(1, ge=1)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto | cpu | cuda | cuda:1"""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Of the network's arithmetic in training and sampling; theta and the loss stay fp32. auto:
    bf16 on a GPU that computes in it, otherwise fp32. tf32: a GPU's convolutions and products of
    fp32 values with 10 bits of mantissa; fp32 is fp32 everywhere."""
    deterministic: bool = True
    """On a GPU, take only kernels that give the same bits every time; a CPU's always do."""
    compile: bool = False
    """Compile the training step of each network size once, for all clients and rounds; it takes
    minutes at first, and makes the step faster on a GPU."""
    memory_mb: float | None = Field(None, gt=0)
    """For pruning.budget auto: what a worker may use; default: what its machine has to give."""


class EvaluationConfig(Section):
    """Sampling and quality figures after training."""

    samples: int = Field(1000, ge=0)
    """Images behind FID, IS and KID; 0 switches them off."""
    steps: int | None = Field(None, ge=1)
    """Steps of the sampler; default diffusion.K."""
    sampler: Annotated[
        str,
        part("exponential_integrator", "probability_flow", "second_order", "second_order_sde"),
    ] = "exponential_integrator"
    """exponential_integrator: the paper's; second_order_sde: the same noisy process by
    SDE-DPM-Solver++(2M), for few steps; probability_flow, second_order: its deterministic ODE by
    DDIM and by DPM-Solver++(2M); your_module:function: see `diffusion.samplers.Solver`."""
    guidance: float = Field(0.0, ge=0)
    """w of (1 + w) eps(y, label) - w eps(y, no label), at two evaluations a step; 0: off."""
    batch: int = Field(256, ge=1)
    every: int = Field(0, ge=0)
    """A small fixed-noise grid every so many rounds; 0: none."""
    grid: int = Field(64, ge=1)
    """Images on the final grid."""
    denoise: bool = False
    """End with a Tweedie step (not covered by the bound)."""
    reference: str = Field("data", min_length=1)
    """data: the run's own data set | train: what its clients trained on | test: the set's own test
    split, or what the clients held out | a folder of images | none: no quality figures."""
    extractor: Annotated[str, part("inception", "classifier")] = "inception"
    """classifier: a small network trained on the labelled reference set, or that in `weights`;
    your_module:Judge: see `evaluation.judge.Judge`."""
    weights: str | None = None
    """For inception: a file with its weights, where they cannot be downloaded. For classifier: what
    fed-diffusion features train has written."""


class FlowerConfig(Section):
    """The Flower engine that `fed-diffusion run --engine flower` starts."""

    supernodes: int | None = Field(None, ge=1)
    """Default: one per client."""
    gpus: float | None = Field(None, ge=0)
    """GPUs per client (a fraction shares one). Default: one where worker.device is a GPU or, with
    auto, where this machine has one; else none."""
    ray_address: str | None = Field(None, min_length=1)
    """Of a Ray cluster that runs already, as host:port; its processes see this machine's files."""
