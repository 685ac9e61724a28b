"""The configuration of a run: a YAML preset plus overrides, checked as a whole before any compute.

A `Config` is frozen and complete: everything a run depends on is in it, and the one that a run
directory holds is enough to repeat the run. An error names the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

KeepRatio = Annotated[float, Field(gt=0, le=1)]
Level = Literal["F", "L", "M", "S"]
FAMILIES = {"F": "full", "R": "random", "T": "topk"}


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, what is allowed and how to fix it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, how they are split over the clients, and what is held out."""

    name: str = "digits"
    """digits | cifar10 | svhn | fashion_mnist | image_folder | your_module:function"""
    dir: str | None = None
    """Where the files are (image_folder) or are downloaded to (torchvision sets)."""
    size: int | None = Field(None, ge=1)
    """Side in pixels; known for the named sets, required for image_folder and your own."""
    channels: Literal[1, 3] | None = None
    classes: int | None = Field(None, ge=1)
    partition: Literal["iid", "dirichlet", "shards", "folders"] = "iid"
    alpha: float = Field(0.5, gt=0)
    """Concentration of partition: dirichlet (small = more unequal)."""
    classes_per_client: int = Field(2, ge=1)
    """For partition: shards."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Part of each client's images kept for its held-out loss."""
    flip: bool = False
    """Mirror images left to right at random."""


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

    kind: Literal["full", "random", "topk"] = "full"
    level: Level = "F"
    keep: KeepRatio | tuple[KeepRatio, ...] | None = None
    """Keep ratios of one's own in place of a level: one for all, or one per client."""
    scope: Literal["weights", "all"] = "weights"
    """weights: tensors of two or more dimensions; all: every coordinate, the paper's letter."""
    per: Literal["tensor", "global"] = "tensor"
    """For topk: the largest of each tensor, or of the whole network."""

    @model_validator(mode="after")
    def _full_drops_nothing(self) -> PruningConfig:
        if self.kind == "full" and (self.level != "F" or self.keep is not None):
            raise ValueError(
                "kind: full drops nothing, so it goes with level F and no keep ratios "
                f"(level = {self.level}, keep = {self.keep}); choose kind random or topk"
            )
        return self


class LocalConfig(Section):
    """A worker's local training in one round."""

    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch: int = Field(64, ge=1)
    optimizer: Literal["adam", "sgd"] = "adam"
    eta: float = Field(1e-4, gt=0)
    """Step size on the simple loss."""
    warmup: int = Field(0, ge=0)
    """Rounds over which eta rises linearly from nearly 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: eta falls to 0 at the last round."""

    @model_validator(mode="after")
    def _one_of(self) -> LocalConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "steps: give exactly one of local.steps and local.epochs "
                f"(steps = {self.steps}, epochs = {self.epochs}); set the other to null"
            )
        return self


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
    weighting: Literal["uniform", "examples"] = "uniform"
    """Equation (8) is uniform."""


class WorkerConfig(Section):
    """The machine share of one worker. `threads` is part of bit-identity."""

    threads: int = Field(1, ge=1)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto | cpu | cuda | cuda:1"""


class EvaluationConfig(Section):
    """Sampling and quality figures after training."""

    samples: int = Field(1000, ge=0)
    """Images behind FID, IS and KID; 0 switches them off."""
    steps: int | None = Field(None, ge=1)
    """Steps of the sampler; default diffusion.K."""
    batch: int = Field(256, ge=1)
    every: int = Field(0, ge=0)
    """A small fixed-noise grid every so many rounds; 0: none."""
    grid: int = Field(64, ge=1)
    """Images on the final grid."""
    denoise: bool = False
    """End with a Tweedie step (not covered by the bound)."""
    reference: str = "data"
    """data: the run's own data set | a folder of images | none: no quality figures."""
    extractor: Literal["inception", "classifier"] = "inception"
    """classifier: a small network trained on the labelled reference set."""
    weights: str | None = None
    """A file with the Inception weights, where they cannot be downloaded."""


class FlowerConfig(Section):
    """The Flower engine that `fed-diffusion run --engine flower` starts."""

    supernodes: int | None = Field(None, ge=1)
    """Default: one per client."""
    gpus: float = Field(0.0, ge=0)
    """GPUs per client (a fraction shares one)."""


class Config(Section):
    """A whole run. N is `clients`, R is `rounds`; see the README's symbol table."""

    preset: str = "custom"
    method: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    rounds: int = Field(10, ge=1)
    clients: int = Field(10, ge=1, le=100_000)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    pruning: PruningConfig = PruningConfig()
    local: LocalConfig = LocalConfig(steps=20)
    ema: EmaConfig = EmaConfig()
    round: RoundConfig = RoundConfig()
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

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as YAML and JSON take them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def conf_dir() -> Path:
    """Where the presets are: inside an installed wheel, else beside the package."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def presets() -> list[str]:
    return sorted(path.stem for path in conf_dir().glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The settings of a preset (a name in conf/) or of a YAML file (a path)."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else conf_dir() / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, presets(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"preset = {name!r} does not exist.{hint} There are: {', '.join(presets())}; "
            "or give the path of a YAML file."
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"preset {path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"preset {path} must be a mapping of keys to values.")
    return {"preset": path.stem, **settings}


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`["pruning.level=S", "rounds=20"]` as a flat mapping; values are read as YAML."""
    flat: dict[str, Any] = {}
    for pair in pairs:
        key, sep, text = pair.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"set: {pair!r} is not of the form key=value, as in rounds=20.")
        try:
            flat[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"set: the value in {pair!r} cannot be read: {error}") from error
    return flat


def load_config(preset: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """A preset with dotted overrides on top, the method's name resolved, everything checked.

    Raises
    ------
    ConfigError
        Names the key, the value given and what is allowed.
    """
    flat = dict(overrides or {})
    settings = load_preset(preset)
    _resolve_method(settings, {})
    if {"pruning.kind", "pruning.level", "pruning.keep"} & flat.keys():
        settings["method"] = None  # what is typed now outranks the preset's method
    for key, value in flat.items():
        _assign(settings, key, value)
    if "local.epochs" in flat and "local.steps" not in flat:
        settings["local"]["steps"] = None
    if "local.steps" in flat and "local.epochs" not in flat:
        settings["local"]["epochs"] = None
    _resolve_method(settings, flat)
    return _absolute(build_config(settings))


def _absolute(config: Config) -> Config:
    """Paths as seen from where the user stands: the engine's processes stand elsewhere."""

    def resolve(path: str | None) -> str | None:
        return str(Path(path).expanduser().resolve()) if path else path

    evaluation = config.evaluation
    reference = evaluation.reference
    if reference not in ("data", "none"):
        reference = str(resolve(reference))
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"dir": resolve(config.data.dir)}),
            "evaluation": evaluation.model_copy(
                update={"reference": reference, "weights": resolve(evaluation.weights)}
            ),
        }
    )


def build_config(settings: Mapping[str, Any]) -> Config:
    """Check nested settings; pydantic's complaints become one `ConfigError` in our words."""
    try:
        return Config.model_validate(dict(settings))
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def method_name(pruning: PruningConfig) -> str:
    """The paper's name for these pruning settings, as in R-FedDM-S; 'custom' where it has none."""
    if pruning.keep is not None:
        return "custom"
    if pruning.kind == "full" or pruning.level == "F":
        return "FedDM-F"
    family = {kind: letter for letter, kind in FAMILIES.items()}[pruning.kind]
    return f"{family}-FedDM-{pruning.level}"


def _resolve_method(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """A method is a name for settings; one that contradicts a key given beside it is an error."""
    method = settings.get("method")
    if not method:
        settings["method"] = None
        return
    parts = str(method).split("-")
    family = "F" if parts[0] == "FedDM" else parts[0]
    legal = [f"{f}-FedDM-{level}" for f in FAMILIES if f != "F" for level in "LMS"]
    if method != "FedDM-F" and method not in legal:
        raise ConfigError(f"method = {method!r} is unknown. Allowed: FedDM-F, {', '.join(legal)}.")
    implied = {"pruning.kind": FAMILIES[family], "pruning.level": parts[-1], "pruning.keep": None}
    for key, value in implied.items():
        if key in given and given[key] != value:
            raise ConfigError(
                f"{key} = {given[key]!r} contradicts method = {method!r}, which means "
                f"{key} = {value!r}. Give one of the two."
            )
        _assign(settings, key, value)


def _assign(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    model: Any = Config
    node = settings
    for depth, section in enumerate(sections):
        if section not in model.model_fields or not _is_section(model, section):
            raise ConfigError(_unknown(".".join(sections[: depth + 1]), model, sections[:depth]))
        model = model.model_fields[section].annotation
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(sections)} must be a section with keys of its own.")
        node[section] = dict(child)
        node = node[section]
    if last not in model.model_fields:
        raise ConfigError(_unknown(key, model, sections))
    node[last] = value


def _is_section(model: type[BaseModel], name: str) -> bool:
    annotation = model.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _unknown(key: str, model: type[BaseModel], sections: list[str]) -> str:
    names = list(model.model_fields)
    close = difflib.get_close_matches(key.split(".")[-1], names, n=1)
    prefix = "".join(f"{s}." for s in sections)
    hint = f" Did you mean {prefix}{close[0]}?" if close else ""
    return f"{key} is not a setting.{hint} Allowed: {', '.join(prefix + n for n in names)}."


def _explain(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    # pydantic appends the member of a union it tried; ours are no part of the key
    keys: list[str] = []
    model: Any = Config
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
        keys.append(part)
        field = model.model_fields.get(part)
        model = field.annotation if field else None
    key = ".".join(keys)
    if item["type"] == "extra_forbidden":
        parent: Any = Config
        for part in keys[:-1]:
            parent = parent.model_fields[part].annotation
        return _unknown(key, parent, keys[:-1])
    if item["type"] == "value_error":
        prefix = f"{key}." if key else ""
        return f"{prefix}{item['ctx']['error']}."
    return f"{key} = {item['input']!r} is not allowed: {item['msg']}{_allowed(key)}."


def _allowed(key: str) -> str:
    """What a Literal field takes, for messages that do not say it themselves."""
    model: Any = Config
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ""
        model = model.model_fields[part].annotation if part in model.model_fields else None
    members = get_args(model) if isinstance(model, types.UnionType) else (model,)
    names = [type_.__name__ for type_ in members if isinstance(type_, type)]
    return f" (a {' or '.join(names)})" if names else ""
