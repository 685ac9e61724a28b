"""Every setting of a run, what it means and what it may be.

A `Config` is frozen and complete: everything a run depends on is in it.
"""

from __future__ import annotations

import contextlib
import math
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

KeepRatio = Annotated[float, Field(gt=0, le=1)]
Level = Literal["F", "L", "M", "S"]
Dtype = Literal["fp32", "bf16", "fp16", "int8"]
LARGEST = 2**63
"""Whole numbers are below this: they travel, and reach torch, as 64 bits with a sign."""
Background = Literal["white", "black"]


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, what is allowed and how to fix it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _by_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        return by_type(cls.model_fields[str(info.field_name)].annotation, value)


def by_type(annotation: Any, value: Any) -> Any:
    """A value as a setting of this type takes it: text is a number where the setting is one.

    Raises
    ------
    ValueError
        The setting is a number, and the value is true or false, or beyond 64 bits.
    """
    kinds = _kinds(annotation)
    if str in kinds or not kinds & {int, float, bool}:
        return value
    read = as_numbers(value)
    for one in read if isinstance(read, list) else [read]:
        if isinstance(one, bool) and bool not in kinds:
            raise PydanticCustomError("truth_value", "true and false are not numbers")
        if isinstance(one, int) and int in kinds and abs(one) >= LARGEST:
            raise PydanticCustomError("too_large", "whole numbers are below 2^63")
    return read


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that values under an annotation are of, at any depth."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    parts = [part for part in get_args(annotation) if part is not Ellipsis]
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def is_free_text(annotation: Any) -> bool:
    """Whether a setting takes any text, as a path or a name, and not only certain words."""
    return annotation is str or (
        get_origin(annotation) is not Literal and any(map(is_free_text, get_args(annotation)))
    )


def as_numbers(value: Any) -> Any:
    """Decimal text as the number that it is, in lists too; 1 is a whole number and 1.0 is not.

    Other text is left as it is.
    """
    if isinstance(value, list | tuple):
        return [as_numbers(one) for one in value]
    if isinstance(value, dict):
        return {key: as_numbers(one) for key, one in value.items()}
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


class DataConfig(Section):
    """Which images, how they are split over the clients, and what is held out."""

    name: str = "digits"
    """digits | cifar10 | svhn | fashion_mnist | image_folder | your_module:function"""
    dir: str | None = None
    """Where the files are (image_folder) or are downloaded to (torchvision sets)."""
    size: int | None = Field(None, ge=1)
    """Side in pixels; known for the named sets, required for image_folder and your own."""
    channels: Literal[1, 3] | None = None
    background: Background | None = None
    """For image_folder: what transparent pixels are laid over. Without one, an image with any pixel
    that is not opaque is refused."""
    classes: int | None = Field(None, ge=1)
    class_names: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(None, min_length=1)
    """The classes in the order of their labels. For image_folder: the names of their folders, on
    every node that has images of its own, which need not have all of them; default: the folders'
    names in order, which then stand in the run's config.yaml."""
    partition: Literal["iid", "dirichlet", "shards", "folders"] = "iid"
    alpha: float = Field(0.5, gt=0)
    """Concentration of partition: dirichlet (small = more unequal)."""
    classes_per_client: int = Field(2, ge=1)
    """For partition: shards."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Part of each client's images kept for its held-out loss."""
    flip: bool = False
    """Mirror images left to right at random."""

    @model_validator(mode="after")
    def _classes_have_names_of_their_own(self) -> DataConfig:
        names = self.class_names
        if names is None:
            return self
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"class_names: {twice[0]!r} is given twice; give each class once")
        if self.classes not in (None, len(names)):
            raise ValueError(
                f"class_names: {len(names)} names for data.classes = {self.classes}; leave "
                "data.classes unset, or name as many"
            )
        return self


class ModelConfig(Section):
    """The score network."""

    name: str = "unet"
    """unet | your_module:Net"""
    widths: tuple[int, ...] = Field((32, 64, 64), min_length=1)
    """Channels per resolution level; each a multiple of `group`."""
    blocks: int = Field(1, ge=1)
    """Residual blocks per level on the way down."""
    attention: tuple[int, ...] = ()
    """Resolutions (in pixels) whose blocks are followed by self-attention."""
    group: int = Field(8, ge=2, multiple_of=2)
    """Channels per normalisation group (a fixed size, so that groups can be dropped whole)."""
    head: int = Field(32, ge=1)
    """Channels per attention head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    conditional: bool = False
    """Condition on the class label."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Part of the labels that training replaces by "no label", which evaluation.guidance needs."""
    prediction: Literal["eps", "v", "x0"] = "eps"
    """What the network's output means; all three give the same score."""

    @model_validator(mode="after")
    def _aligned(self) -> ModelConfig:
        for width in self.widths:
            if width < 1 or width % self.group:
                raise ValueError(
                    f"widths: {width} is not a multiple of model.group = {self.group}; "
                    "every width must be, so that whole groups can be dropped"
                )
        return self

    @model_validator(mode="after")
    def _labels_to_drop(self) -> ModelConfig:
        if self.label_dropout and not self.conditional:
            raise ValueError(
                f"label_dropout: {self.label_dropout:g} has no labels to drop; set "
                "model.conditional to true, or label_dropout to 0"
            )
        return self


class DiffusionConfig(Section):
    """The partition of time u_0 = T > ... > u_K = delta."""

    T: float = Field(4.13, ge=1)
    delta: float = Field(1e-3, gt=0, lt=1)
    K: int = Field(300, ge=1)
    partition: Literal[
        "kappa_minimal", "half_half", "geometric", "uniform", "ddpm_linear", "ddpm_cosine"
    ] = "kappa_minimal"

    @model_validator(mode="after")
    def _enough_steps(self) -> DiffusionConfig:
        least = math.ceil(math.log(1 / self.delta))
        if least > self.K:
            raise ValueError(
                f"K: {self.K} steps are too few for delta = {self.delta:g}; "
                f"Remark 4.12 needs K >= log(1/delta), here at least {least}"
            )
        return self


class PruningConfig(Section):
    """How each worker's mask comes about."""

    kind: Literal["full", "random", "topk", "channels", "balanced"] = "full"
    """random, topk: single weights; channels: whole channel groups, so that the worker's network
    is smaller; balanced: of either (`unit`), dropped by as few workers at once as can be."""
    level: Level = "F"
    keep: KeepRatio | tuple[KeepRatio, ...] | None = None
    """Keep ratios of one's own in place of a level: one for all, or one per client."""
    scope: Literal["weights", "all"] = "weights"
    """weights: tensors of two or more dimensions; all: every coordinate, the paper's letter."""
    per: Literal["tensor", "global"] = "tensor"
    """For topk and balanced weights: the largest of each tensor, or of the whole network."""
    choice: Literal["ordered", "rolling", "random", "magnitude"] = "ordered"
    """For channels: the first groups; a window that moves each round; drawn; the largest."""
    unit: Literal["weights", "channels"] = "weights"
    """For balanced: what is dropped."""
    budget: Literal["level", "node", "auto"] = "level"
    """Where keep ratios come from: level or keep above; each node's own config (keep=0.5); or what
    each worker measures of its memory and speed."""
    ladder: tuple[KeepRatio, ...] = Field((1.0, 0.75, 0.5, 0.25, 0.125), min_length=1)
    """For budget auto: the ratios to choose from."""
    baseline: Literal["exclusive", "small"] | None = None
    """exclusive: only workers with the whole network train; small: all train the smallest one."""

    @model_validator(mode="after")
    def _full_drops_nothing(self) -> PruningConfig:
        if self.kind == "full" and (self.level != "F" or self.keep is not None):
            raise ValueError(
                "kind: full drops nothing, so it goes with level F and no keep ratios "
                f"(level = {self.level}, keep = {self.keep}); choose another kind"
            )
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> PruningConfig:
        if self.choice != "ordered" and self.kind != "channels":
            raise ValueError(f"choice: {self.choice} needs kind channels, not {self.kind}")
        if self.unit != "weights" and self.kind != "balanced":
            raise ValueError(f"unit: {self.unit} needs kind balanced, not {self.kind}")
        return self

    @model_validator(mode="after")
    def _one_source_of_ratios(self) -> PruningConfig:
        if self.budget == "level":
            return self
        if self.level != "F" or self.keep is not None or self.baseline is not None:
            raise ValueError(
                f"budget: {self.budget} lets the nodes say their ratios, so it goes with level F, "
                f"no keep and no baseline (level = {self.level}, keep = {self.keep}, "
                f"baseline = {self.baseline})"
            )
        if self.budget == "auto" and not self.by_channels:
            raise ValueError(
                "budget: auto needs masks that save memory and time: kind channels, or balanced "
                f"with unit channels, not kind {self.kind}"
            )
        if self.kind == "full":
            raise ValueError("budget: node needs a kind that drops something, not full")
        return self

    @property
    def by_channels(self) -> bool:
        """Whether workers drop whole channels."""
        return self.kind == "channels" or (self.kind == "balanced" and self.unit == "channels")


class LocalConfig(Section):
    """A worker's local training in one round."""

    steps: int | None = Field(None, ge=1)
    """S; every batch is full: a client that has fewer images repeats them in new random orders."""
    epochs: int | None = Field(None, ge=1)
    """In place of `steps`: passes over a client's images, each once per pass in a new random order.
    The last batch of a pass is what is left over and may be smaller: S is `epochs` times
    ceil(images / batch). A step's loss is its batch's mean, the reported one is per image."""
    batch: int = Field(64, ge=1)
    optimizer: Literal["adam", "sgd"] = "adam"
    eta: float = Field(1e-4, gt=0)
    """Step size on the simple loss."""
    warmup: int = Field(0, ge=0)
    """Rounds over which eta rises linearly from nearly 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: eta falls to 0 at the last round."""
    prox: float = Field(0.0, ge=0)
    """FedProx: the weight mu of mu/2 ||theta - theta_{r,n,0}||^2, added to the local loss."""

    @model_validator(mode="after")
    def _one_of(self) -> LocalConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "steps: give exactly one of local.steps and local.epochs "
                f"(steps = {self.steps}, epochs = {self.epochs}); set the other to null"
            )
        return self

    def steps_of(self, examples: int) -> int:
        """S of a client with so many training images."""
        if self.epochs is None:
            assert self.steps is not None
            return self.steps
        return self.epochs * -(-examples // self.batch)

    def batch_of(self, examples: int) -> int:
        """The size of a client's batches, but for the last of a pass."""
        return self.batch if self.epochs is None else min(self.batch, examples)


class EmaConfig(Section):
    """The server's moving average of theta, used for sampling. decay 0 switches it off."""

    decay: float = Field(0.9, ge=0, lt=1)
    """Per round; warmed up as min(decay, (1 + r) / (10 + r))."""


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
    aggregation: Literal["mean", "trimmed_mean", "median"] = "mean"
    """mean is equation (8). The others withstand lying clients, and hold all updates of a round
    in memory: 4 bytes for each parameter and client."""
    trim: float = Field(0.1, ge=0, lt=0.5)
    """For trimmed_mean: the part of the values left out at either end of each coordinate."""
    checkpoint_every: int = Field(1, ge=1)
    """Rounds between checkpoints."""
    mode: Literal["synchronous", "buffered"] = "synchronous"
    """buffered (FedBuff): theta moves when `buffer` updates are in; `rounds` counts its moves."""
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
        if self.aggregation != "mean" and self.weighting != "uniform":
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
    sampler: Literal[
        "exponential_integrator", "probability_flow", "second_order", "second_order_sde"
    ] = "exponential_integrator"
    """exponential_integrator: the paper's; second_order_sde: the same noisy process by
    SDE-DPM-Solver++(2M), for few steps; probability_flow, second_order: its deterministic ODE by
    DDIM and by DPM-Solver++(2M)."""
    guidance: float = Field(0.0, ge=0)
    """w of (1 + w) eps(y, label) - w eps(y, no label), at two evaluations a step; 0: off."""
    batch: int = Field(256, ge=1)
    every: int = Field(0, ge=0)
    """A small fixed-noise grid every so many rounds; 0: none."""
    grid: int = Field(64, ge=1)
    """Images on the final grid."""
    denoise: bool = False
    """End with a Tweedie step (not covered by the bound)."""
    reference: str = "data"
    """data: the run's own data set | train: what its clients trained on | test: the set's own test
    split, or what the clients held out | a folder of images | none: no quality figures."""
    extractor: Literal["inception", "classifier"] = "inception"
    """classifier: a small network trained on the labelled reference set, or that in `weights`."""
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


class Config(Section):
    """A whole run. N is `clients`, R is `rounds`; see the README's symbol table."""

    preset: str = "custom"
    method: str | None = None
    seed: int = Field(0, ge=0, lt=LARGEST)
    rounds: int = Field(10, ge=1)
    clients: int = Field(10, ge=1, le=100_000)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    pruning: PruningConfig = PruningConfig()
    local: LocalConfig = LocalConfig(steps=20)
    ema: EmaConfig = EmaConfig()
    round: RoundConfig = RoundConfig()
    wire: WireConfig = WireConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    theory: TheoryConfig = TheoryConfig()
    worker: WorkerConfig = WorkerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    flower: FlowerConfig = FlowerConfig()

    @model_validator(mode="after")
    def _keep_per_client(self) -> Config:
        keep = self.pruning.keep
        if isinstance(keep, tuple) and len(keep) != self.clients:
            raise ValueError(
                f"pruning.keep: {len(keep)} ratios for clients = {self.clients}; "
                "give one ratio for all, or one per client"
            )
        return self

    @model_validator(mode="after")
    def _guidance_knows_no_label(self) -> Config:
        if self.evaluation.guidance and not self.model.label_dropout:
            raise ValueError(
                f"evaluation.guidance: {self.evaluation.guidance:g} needs a network that has seen "
                'images with "no label"; train with model.conditional = true and '
                "model.label_dropout above 0 (0.1 is usual), or set guidance to 0"
            )
        return self

    @model_validator(mode="after")
    def _buffered_rounds_add_differences(self) -> Config:
        if self.round.mode == "buffered" and not self.wire.differences:
            raise ValueError(
                "round.mode: buffered adds what each worker changed to a theta that has moved "
                "meanwhile; set wire.differences to true"
            )
        if self.round.pace is not None and len(self.round.pace) != self.clients:
            raise ValueError(
                f"round.pace: {len(self.round.pace)} times for clients = {self.clients}"
            )
        return self

    @model_validator(mode="after")
    def _privacy_has_a_guarantee(self) -> Config:
        if self.privacy.clip is None:
            return self
        wanted = {
            "wire.differences": (self.wire.differences, True, "differences are what is clipped"),
            "round.mode": (self.round.mode, "synchronous", "weights of stale updates vary"),
            "round.aggregation": (self.round.aggregation, "mean", "its sensitivity is no clip"),
            "round.weighting": (self.round.weighting, "uniform", "weights tell of the data"),
            "round.over_select": (self.round.over_select, 0, "who is first is not drawn"),
            "round.norm_factor": (self.round.norm_factor, None, "one update decides on others"),
            "theory.every": (self.theory.every or None, None, "gradients would leave unclipped"),
        }
        for key, (value, needed, why) in wanted.items():
            if value != needed:
                raise ValueError(
                    f"privacy.clip: it needs {key} = {needed} (not {value}): {why}, so there would "
                    "be no guarantee"
                )
        if self.pruning.budget == "auto":
            raise ValueError(
                "privacy.clip: pruning.budget auto measures with a node's own data, so masks would "
                "tell of them; use level or node"
            )
        if self.pruning.kind == "balanced" and self.round.fraction < 1:
            raise ValueError(
                "privacy.clip: balanced masks depend on who else takes part, so one client would "
                "change the others' updates; use round.fraction = 1 or another kind"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as YAML and JSON take them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
