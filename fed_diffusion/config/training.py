"""The settings of the mathematics: images, network, time, masks, local training."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fed_diffusion.config.names import is_own, part
from fed_diffusion.config.section import Section, as_numbers

KeepRatio = Annotated[float, Field(gt=0, le=1)]
Level = Literal["F", "L", "M", "S"]
Background = Literal["white", "black"]


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
    partition: Annotated[str, part("iid", "dirichlet", "shards", "folders")] = "iid"
    """How the images are split over the clients; your_module:function: see `data.partition.Split`.
    """
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
    partition: Annotated[
        str,
        part("kappa_minimal", "half_half", "geometric", "uniform", "ddpm_linear", "ddpm_cosine"),
    ] = "kappa_minimal"
    """your_module:function: see `diffusion.partitions.TimeGrid`."""

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

    kind: Annotated[str, part("full", "random", "topk", "channels", "balanced")] = "full"
    """random, topk: single weights; channels: whole channel groups, so that the worker's network
    is smaller; balanced: of either (`unit`), dropped by as few workers at once as can be;
    your_module:Family: see `masks.families.contract.Family`."""
    options: dict[str, int | float | str] = Field({}, validate_default=False)
    """For a kind of the user's own: settings that it alone has, as in {of: 4}."""
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
    by: Literal["chance", "magnitude"] = "chance"
    """For balanced weights: who drops which. chance: all weights alike, drawn; magnitude: the weak
    workers take turns among the smallest."""
    budget: Literal["level", "node", "auto"] = "level"
    """Where keep ratios come from: level or keep above; each node's own config (keep=0.5); or what
    each worker measures of its memory and speed."""
    ladder: tuple[KeepRatio, ...] = Field((1.0, 0.75, 0.5, 0.25, 0.125), min_length=1)
    """For budget auto: the ratios to choose from."""
    baseline: Literal["exclusive", "small"] | None = None
    """exclusive: only workers with the whole network train; small: all train the smallest one."""

    @field_validator("options", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any) -> Any:
        return as_numbers(value)

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
        if self.options and not is_own(self.kind):
            raise ValueError(f"options: only a kind of your own takes any, not {self.kind}")
        if self.unit != "weights" and self.kind != "balanced":
            raise ValueError(f"unit: {self.unit} needs kind balanced, not {self.kind}")
        if self.by != "chance" and (self.kind, self.unit) != ("balanced", "weights"):
            raise ValueError(
                f"by: {self.by} needs kind balanced and unit weights, not kind {self.kind} and "
                f"unit {self.unit}"
            )
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
        saves = self.kind == "channels" or (self.kind, self.unit) == ("balanced", "channels")
        if self.budget == "auto" and not saves and not is_own(self.kind):
            raise ValueError(
                "budget: auto needs masks that save memory and time: kind channels, or balanced "
                f"with unit channels, not kind {self.kind}"
            )
        if self.kind == "full":
            raise ValueError("budget: node needs a kind that drops something, not full")
        return self


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
