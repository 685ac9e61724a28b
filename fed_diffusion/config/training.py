"""The settings of the mathematics: images, network, time, masks, local training."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fed_diffusion.config.names import is_own, part
from fed_diffusion.config.section import Section, as_numbers, as_values

KeepRatio = Annotated[float, Field(gt=0, le=1)]
Level = Literal["F", "L", "M", "S"]


class ModelConfig(Section):
    """The score network."""

    name: str = "unet"
    """The network: unet, which is built in; diffusers, a UNet2DModel of the package diffusers that
    `pretrained` or `config` names, or with `text` a UNet2DConditionModel; or your_module:Net, see
    `models.own.NetworkFactory`."""
    pretrained: str | None = None
    """For diffusers: the network that training starts from, the folder of a pipeline or of a
    network, or a name on the Hub. Only the machine that begins a run needs it."""
    config: str | None = None
    """For diffusers: a JSON file with the configuration of a new network that is trained from the
    beginning, in place of `pretrained`."""
    scheduler: str | None = None
    """For diffusers: a JSON file with the configuration of the scheduler, whose noise levels the
    network knows. By default it is the pipeline's, and for `config` a DDPMScheduler as diffusers
    makes one."""
    network: dict[str, Any] | None = None
    """For diffusers: the configurations of the network and of its scheduler, as they were read. A
    run notes them in its config.yaml, so that no other machine needs the files."""
    start: str | None = None
    """What training starts from in place of drawn values: the directory of a run, whose moving
    average is taken, or a .safetensors file with the network's tensors by name. It comes before
    the weights of `pretrained`. Only the machine that begins a run needs it."""
    start_hash: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the values that training starts from. A run that starts from `start` or
    `pretrained` notes it in its config.yaml; where it is given, other values are refused."""
    vae: str | None = None
    """For latent diffusion: an AutoencoderKL of diffusers, the folder of a pipeline or of the
    autoencoder, or a name on the Hub. Each client encodes its images once (the mean of the
    posterior), and the network learns these latents; what is sampled is decoded. Every machine that
    trains or samples needs it."""
    vae_hash: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the autoencoder's values. A run notes it in its config.yaml; where it is given,
    another autoencoder is refused."""
    text: str | None = None
    """For a network of diffusers that is conditioned on text: the folder of the pipeline, or its
    name on the Hub, that has the text encoder and the tokenizer. Captions come from `data.caption`
    or from the images' metadata.jsonl, and each client embeds its own once; samples are made for
    `evaluation.prompts`. Every machine that trains or samples needs it."""
    text_hash: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the text encoder's values and the tokenizer's words. A run notes it in its
    config.yaml; where it is given, others are refused."""
    widths: tuple[int, ...] = Field((32, 64, 64), min_length=1)
    """The number of channels at each resolution level. Each is a multiple of `group`."""
    blocks: int = Field(1, ge=1)
    """The number of residual blocks at each level on the way down."""
    attention: tuple[int, ...] = ()
    """The resolutions, in pixels, at which self-attention follows each block."""
    group: int = Field(8, ge=2, multiple_of=2)
    """The number of channels in a normalisation group. It is the same everywhere, so that channel
    masks can drop whole groups."""
    head: int = Field(32, ge=1)
    """The number of channels in an attention head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The part of the activations that dropout sets to zero in training."""
    conditional: bool = False
    """Whether the network is told the class label of an image."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """The part of the labels that training replaces by "no label", or of the captions that it
    replaces by an empty text. evaluation.guidance needs it."""
    prediction: Literal["eps", "v", "x0"] = "eps"
    """What the network's output stands for: the noise (eps), the velocity (v) or the image (x0).
    All three are converted to the same score. Of a diffusers network
    its scheduler says it, where there is one."""

    @field_validator("network", mode="before")
    @classmethod
    def _plain_values(cls, value: Any) -> Any:
        return as_values(value)

    @model_validator(mode="after")
    def _one_network(self) -> ModelConfig:
        keys = ("pretrained", "config", "scheduler", "network")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.name != "diffusers" and given:
            raise ValueError(
                f"{given[0]}: it describes a network of diffusers, and model.name = "
                f"{self.name!r}; set model.name to diffusers, or leave it out"
            )
        if self.name == "diffusers" and not {"pretrained", "config", "network"} & {*given}:
            raise ValueError(
                "name: diffusers needs a network; name one in model.pretrained, or the JSON file "
                "of its configuration in model.config"
            )
        if {"pretrained", "config"} <= {*given}:
            raise ValueError("config: model.pretrained has a configuration already; give one")
        if self.start_hash is not None and not (self.start or self.pretrained):
            raise ValueError(
                "start_hash: nothing is named that training starts from; name it in model.start, "
                "or leave model.start_hash out"
            )
        return self

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
        if self.text is not None and (self.conditional or self.name != "diffusers"):
            raise ValueError(
                "text: captions are for a network of diffusers without class labels; set "
                "model.name to diffusers and model.conditional to false, or leave model.text out"
            )
        if self.label_dropout and not self.conditional and self.text is None:
            raise ValueError(
                f"label_dropout: {self.label_dropout:g} has no labels to drop; set "
                "model.conditional to true, or label_dropout to 0"
            )
        return self


class LoraConfig(Section):
    """An adapter that is trained in place of the network (LoRA, Hu et al. 2021).

    A layer with the weights W computes with W + (alpha / rank) B A. W is that of what `model.start`
    or `model.pretrained` names. It is frozen and never travels, so every machine that trains or
    samples needs it; A and B are what is trained.
    """

    rank: int | None = Field(None, ge=1)
    """The rank r of each layer's adapter: A has r rows and B has r columns. null trains the whole
    network and no adapter."""
    alpha: float | None = Field(None, gt=0)
    """The adapter's output is multiplied by alpha / rank, whatever part of the ranks a worker
    trains. null stands for alpha = rank."""
    targets: tuple[str, ...] = ()
    """The layers that get an adapter, by their names or the ends of their names, as in
    [to_q, to_v]. By default all linear layers and convolutions have one."""
    train: Literal["AB", "B"] = "AB"
    """What is trained. AB: both; averaging A and B is then not averaging their product. B: only B;
    A is drawn from the seed and is the same on all machines, so that the average is exact."""
    base: Literal["fp32", "bf16"] = "fp32"
    """What a worker holds the frozen network in. bf16: where it computes in bf16
    (worker.precision), it holds the weights and biases of linear layers and convolutions in bf16,
    as that arithmetic rounds them anyway, so that updates have the same bits and the base takes
    half the memory; where it computes in fp32 it holds fp32. The adapter, its gradients and the
    optimiser are in fp32 always."""

    @model_validator(mode="after")
    def _nothing_without_a_rank(self) -> LoraConfig:
        default = {"alpha": None, "targets": (), "train": "AB", "base": "fp32"}
        changed = [key for key, value in default.items() if getattr(self, key) != value]
        if self.rank is None and changed:
            raise ValueError(f"{changed[0]}: it describes an adapter; give its rank in lora.rank")
        return self

    @property
    def scale(self) -> float:
        """alpha / rank of the whole adapter."""
        assert self.rank is not None
        return 1.0 if self.alpha is None else self.alpha / self.rank


class DiffusionConfig(Section):
    """The partition of time u_0 = T > ... > u_K = delta, where u is the time to the data."""

    T: float = Field(4.13, ge=1)
    """The time at which sampling starts from pure noise."""
    delta: float = Field(1e-3, gt=0, lt=1)
    """The time at which sampling stops, just before the data."""
    K: int = Field(300, ge=1)
    """The number of steps between T and delta; at least log(1 / delta)."""
    partition: Annotated[
        str,
        part("kappa_minimal", "half_half", "geometric", "uniform", "ddpm_linear", "ddpm_cosine"),
    ] = "kappa_minimal"
    """How the K steps are spaced. kappa_minimal has the smallest kappa of Theorem 4.11; half_half
    is even down to time 1 and geometric from there; geometric has equal ratios and uniform equal
    steps; ddpm_linear and ddpm_cosine are DDPM's noise levels; your_module:function: see
    `diffusion.partitions.TimeGrid`."""

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

    kind: Annotated[str, part("full", "random", "topk", "channels", "balanced", "ranks")] = "full"
    """The mask family. full drops nothing; random drops weights that are drawn; topk keeps the
    largest weights; channels drops whole channel groups, so that the worker's network is smaller;
    balanced drops each weight or channel (`unit`) at as few workers at once as possible; ranks
    drops ranks of an adapter (`lora.rank`), so that the worker's adapter is smaller;
    your_module:Family is one of yours, see `masks.families.contract.Family`."""
    options: dict[str, int | float | str] = Field({}, validate_default=False)
    """For a mask family of yours: the settings that only this family knows, as in {of: 4}."""
    level: Level = "F"
    """How many workers keep how much, as in the paper. F: all keep everything. L: 20 % of the
    workers keep 0.75. M: 20 % keep 0.8 and 20 % keep 0.75. S: 40 % keep 0.75. The others keep
    everything."""
    keep: KeepRatio | tuple[KeepRatio, ...] | None = None
    """The part of the network that a worker keeps, in place of a level: one ratio for all clients,
    or a list with one for each."""
    scope: Literal["weights", "all"] = "weights"
    """What masks may drop. weights: coordinates of tensors of two or more dimensions, so that
    biases and norms stay whole; all: every coordinate, as the paper's equations are written."""
    per: Literal["tensor", "global"] = "tensor"
    """For topk and balanced weights: whether the largest are chosen within each tensor, or over
    the whole network."""
    choice: Literal["ordered", "rolling", "random", "magnitude"] = "ordered"
    """For channels and ranks: which groups or ranks a worker keeps. ordered: the first ones;
    rolling: a window that moves each round; random: some that are drawn; magnitude: those with the
    largest weights."""
    unit: Literal["weights", "channels"] = "weights"
    """For balanced: whether single weights or whole channels are dropped."""
    by: Literal["chance", "magnitude"] = "chance"
    """For balanced weights: who drops which. chance: all weights alike, drawn; magnitude: the weak
    workers take turns among the smallest."""
    budget: Literal["level", "node", "auto"] = "level"
    """Where keep ratios come from. level: from `level` or `keep`; node: from each node's own config
    (keep=0.5); auto: each worker measures its memory and speed, and takes one of `ladder`."""
    ladder: tuple[KeepRatio, ...] = Field((1.0, 0.75, 0.5, 0.25, 0.125), min_length=1)
    """For budget auto: the keep ratios that a worker chooses from."""
    baseline: Literal["exclusive", "small"] | None = None
    """A run to compare with. exclusive: only workers that keep the whole network train; small: all
    workers train the smallest one."""

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
        if self.choice != "ordered" and self.kind not in ("channels", "ranks"):
            raise ValueError(f"choice: {self.choice} needs kind channels or ranks, not {self.kind}")
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
    """S, the number of local steps in a round. Every batch is full: a client that has too few
    images repeats them in new random orders."""
    epochs: int | None = Field(None, ge=1)
    """In place of `steps`: the number of passes over a client's images, each pass in a new random
    order. The last batch of a pass has the images that are left over and may be smaller, so that S
    is `epochs` times ceil(images / batch). A step's loss is the mean of its batch; the loss that
    is reported is the mean over all images."""
    batch: int = Field(64, ge=1)
    """The number of images in a training step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimiser of the local steps. sgd is equation (7); adamw is adam with a weight decay."""
    state: Literal["fresh", "shared"] = "fresh"
    """With which state Adam begins a round. fresh: with moments of zero, as the paper does; shared:
    with the mean of the clients' moments, taken for each coordinate over those that trained it.
    The moments then travel beside the values."""
    eta: float = Field(1e-4, gt=0)
    """The step size, on the simple loss (the mean squared error of the noise per dimension)."""
    warmup: int = Field(0, ge=0)
    """The number of rounds over which eta rises linearly from nearly 0 to its value."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How eta changes over the rounds. constant: not at all; cosine: it falls to 0 at the last
    round."""
    prox: float = Field(0.0, ge=0)
    """FedProx: the weight mu of mu/2 ||theta - theta_{r,n,0}||^2, which is added to the local loss
    and keeps a worker near to where its round began. 0 adds nothing."""
    weight_decay: float | None = Field(None, ge=0)
    """lambda: before each step, theta becomes (1 - eta lambda) theta. It goes with adamw and sgd.
    null: 0.01 with adamw, else 0."""
    max_grad_norm: float | None = Field(None, gt=0)
    """A step's gradient whose Euclidean norm is larger is scaled down to this norm. null: never."""

    @property
    def decay(self) -> float:
        """Lambda, the weight decay of a step."""
        if self.weight_decay is None:
            return 0.01 if self.optimizer == "adamw" else 0.0
        return self.weight_decay

    @model_validator(mode="after")
    def _adam_decays_nothing(self) -> LocalConfig:
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(
                f"weight_decay: {self.weight_decay:g} does not go with optimizer adam, which would "
                "divide it by the gradients' size; set local.optimizer to adamw"
            )
        if self.eta * self.decay >= 1:
            raise ValueError(
                f"weight_decay: {self.decay:g} times local.eta = {self.eta:g} is not below 1, so "
                "that a step would turn every value's sign; 0.01 to 0.1 are usual"
            )
        return self

    @model_validator(mode="after")
    def _one_of(self) -> LocalConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "steps: give exactly one of local.steps and local.epochs "
                f"(steps = {self.steps}, epochs = {self.epochs}); set the other to null"
            )
        return self

    @model_validator(mode="after")
    def _sgd_has_no_state(self) -> LocalConfig:
        if self.state == "shared" and self.optimizer == "sgd":
            raise ValueError(
                "state: shared goes with optimizer adam or adamw: sgd without momentum keeps no "
                "state that could be shared; set local.state to fresh or local.optimizer to adam"
            )
        return self

    def steps_of(self, examples: int) -> int:
        """Return S for a client with so many training images."""
        if self.epochs is None:
            assert self.steps is not None
            return self.steps
        return self.epochs * -(-examples // self.batch)

    def batch_of(self, examples: int) -> int:
        """Return the size of a client's batches, except for the last batch of a pass."""
        return self.batch if self.epochs is None else min(self.batch, examples)


class EmaConfig(Section):
    """The server's moving average of theta, which sampling uses."""

    decay: float = Field(0.9, ge=0, lt=1)
    """The weight of the old average in a round. The first rounds r use less of it,
    min(decay, (1 + r) / (10 + r)). 0 switches the average off."""
