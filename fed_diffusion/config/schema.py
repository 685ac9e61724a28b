"""Every setting of a run, what it means and what it may be.

A `Config` is frozen and complete: everything a run depends on is in it.
"""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fed_diffusion.config.federation import (
    Dtype,
    EvaluationConfig,
    FlowerConfig,
    PrivacyConfig,
    RoundConfig,
    ServerConfig,
    TheoryConfig,
    WireConfig,
    WorkerConfig,
)
from fed_diffusion.config.images import Background, DataConfig
from fed_diffusion.config.names import is_own, part
from fed_diffusion.config.section import (
    LARGEST,
    ConfigError,
    Section,
    as_numbers,
    by_type,
    is_free_text,
)
from fed_diffusion.config.secure import SecureConfig, check_secure
from fed_diffusion.config.training import (
    DiffusionConfig,
    EmaConfig,
    KeepRatio,
    Level,
    LocalConfig,
    LoraConfig,
    ModelConfig,
    PruningConfig,
)

__all__ = [
    "LARGEST",
    "Background",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "Dtype",
    "EmaConfig",
    "EvaluationConfig",
    "FlowerConfig",
    "KeepRatio",
    "Level",
    "LocalConfig",
    "LoraConfig",
    "ModelConfig",
    "PrivacyConfig",
    "PruningConfig",
    "RoundConfig",
    "Section",
    "SecureConfig",
    "ServerConfig",
    "TheoryConfig",
    "WireConfig",
    "WorkerConfig",
    "as_numbers",
    "by_type",
    "is_free_text",
]


class Config(Section):
    """A whole run: everything that it depends on. N is `clients` and R is `rounds`."""

    preset: str = "custom"
    """The name of the preset that the settings come from. It stands in the report and in the name
    of the run directory, and changes nothing else."""
    method: str | None = None
    """A name for several settings at once, as in T-FedDM-S, which sets pruning.kind to topk and
    pruning.level to S. Words may follow it: -prox, -quant, -literal."""
    seed: int = Field(0, ge=0, lt=LARGEST)
    """The seed of everything that is drawn: the split, the masks, the noise, the samples."""
    rounds: int = Field(10, ge=1)
    """R, the number of rounds."""
    clients: int = Field(10, ge=1, le=100_000)
    """N, the number of workers."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    pruning: PruningConfig = PruningConfig()
    local: LocalConfig = LocalConfig(steps=20)
    ema: EmaConfig = EmaConfig()
    round: RoundConfig = RoundConfig()
    server: ServerConfig = ServerConfig()
    wire: WireConfig = WireConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secure: SecureConfig = SecureConfig()
    theory: TheoryConfig = TheoryConfig()
    worker: WorkerConfig = WorkerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    flower: FlowerConfig = FlowerConfig()
    trackers: tuple[Annotated[str, part("csv", "tensorboard", "mlflow")], ...] = ()
    """The trackers that are told how the run goes. csv writes rounds.csv into the run directory;
    tensorboard and mlflow need the extras of these names; your_module:Tracker is one of yours, see
    `report.trackers.Tracker`."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise PydanticCustomError(
                "twice", "{name} is given twice; give each tracker once", {"name": repr(twice[0])}
            )
        return value

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
    def _an_adapter_has_a_base(self) -> Config:
        pruning, adapted = self.pruning, self.lora.rank is not None
        if pruning.kind == "ranks" and not adapted:
            raise ValueError("pruning.kind: ranks drops ranks of an adapter; give its lora.rank")
        if not adapted:
            return self
        if self.model.start is None and self.model.pretrained is None:
            raise ValueError(
                "lora.rank: an adapter is trained beside a network that is there; name it in "
                "model.start or model.pretrained"
            )
        if pruning.kind == "channels" or pruning.unit == "channels":
            raise ValueError(
                "pruning.kind: an adapter (lora.rank) has ranks and no channels to drop; use ranks"
            )
        _check_base(self.lora.base, self.worker.precision, self.model.name)
        if pruning.baseline == "small":
            raise ValueError("pruning.baseline: for a small adapter set a smaller lora.rank")
        return self

    @model_validator(mode="after")
    def _latents_are_encoded_once(self) -> Config:
        changed = "flip" if self.data.flip else "augment" if self.data.augment else None
        if self.model.vae is not None and changed is not None:
            raise ValueError(
                f"data.{changed}: it changes images in each step, and with model.vae they are "
                f"encoded once; leave data.{changed} out"
            )
        return self

    @model_validator(mode="after")
    def _told_what_is_sampled(self) -> Config:
        _check_texts(self.model.text, self.evaluation.prompts, self.data.caption)
        if self.evaluation.guidance and not _knows_no_label(self.model):
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
    def _state_is_averaged(self) -> Config:
        if self.local.state == "shared" and self.round.aggregation != "mean":
            raise ValueError(
                f"local.state: shared averages moments by equation (8), and a client that "
                f"round.aggregation = {self.round.aggregation} would withstand could still send "
                "wrong ones; set round.aggregation to mean or local.state to fresh"
            )
        return self

    @model_validator(mode="after")
    def _privacy_has_a_guarantee(self) -> Config:
        if self.privacy.clip is None:
            return self
        factor = None if self.round.norm_factor == "auto" else self.round.norm_factor
        rounds, measured = self.round, self.theory.every or None
        wanted = {
            "wire.differences": (self.wire.differences, True, "differences are what clip bounds"),
            "local.state": (self.local.state, "fresh", "the clients' moments are not clipped"),
            "round.mode": (rounds.mode, "synchronous", "the weights of stale updates vary"),
            "round.aggregation": (
                rounds.aggregation,
                "mean",
                "privacy.clip does not bound the sensitivity of other averages",
            ),
            "round.weighting": (
                rounds.weighting,
                "uniform",
                "weights by examples depend on the clients' data",
            ),
            "round.over_select": (rounds.over_select, 0, "who answers first is not drawn"),
            "round.norm_factor": (factor, None, "one update decides whether others count"),
            "theory.every": (measured, None, "the measured gradients are not clipped"),
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
                "depend on that data; use level or node"
            )
        kind = "balanced masks depend" if self.pruning.kind == "balanced" else ""
        if is_own(self.pruning.kind):
            kind = f"masks of pruning.kind = {self.pruning.kind!r} may depend"
        if kind and self.round.fraction < 1:
            raise ValueError(
                f"privacy.clip: {kind} on who else takes part, so one client would "
                "change the others' updates; use round.fraction = 1 or another kind"
            )
        return self

    @model_validator(mode="after")
    def _sums_tell_enough(self) -> Config:
        sections = self.round, self.local, self.wire, self.pruning, self.privacy, self.theory
        check_secure(self.secure, self.clients, *sections)
        return self

    def is_diagnostic(self, round: int) -> bool:
        """Whether a round (1-based) is one in which the theory's quantities are measured.

        Never under privacy, where a gradient would leave its client unclipped, nor under secure
        aggregation, where it would leave its client at all, and never in buffered rounds, whose
        workers train on different theta.
        """
        every = self.theory.every
        hidden = self.privacy.clip is not None or self.secure.aggregation
        if every == 0 or hidden or self.round.mode != "synchronous":
            return False
        return round in (1, self.rounds) or (every is not None and round % every == 0)

    def diagnostic_rounds(self) -> list[int]:
        """The rounds of the run in which the theory's quantities are measured."""
        return [round for round in range(1, self.rounds + 1) if self.is_diagnostic(round)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists, as YAML and JSON take them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _check_base(base: str, precision: str, network: str) -> None:
    """Refuse a base in bf16 where it would be another function than one in fp32."""
    if base != "bf16":
        return
    if precision in ("fp32", "tf32"):
        raise ValueError(
            f"lora.base: bf16 is for arithmetic in bf16, and worker.precision = {precision} needs "
            "all bits of the base; set worker.precision to bf16 or auto, or lora.base to fp32"
        )
    if is_own(network):
        raise ValueError(
            f"lora.base: what model.name = {network} does with its weights is not known, so that "
            "bf16 could change it; set lora.base to fp32"
        )


def _check_texts(encoder: str | None, prompts: tuple[str, ...], caption: str | None) -> None:
    """Refuse captions and prompts without a text encoder, and a text encoder without prompts."""
    if encoder is not None and not prompts:
        raise ValueError(
            "evaluation.prompts: a network of text (model.text) needs texts to sample for; give "
            "one or several, as in ['a photo of a cat']"
        )
    key = "evaluation.prompts" if prompts else "data.caption"
    if encoder is None and (prompts or caption is not None):
        raise ValueError(
            f"{key}: it is for networks of text; name a text encoder in model.text, or leave {key} "
            "out"
        )


def _knows_no_label(model: ModelConfig) -> bool:
    """Whether the network has learned what to do without a label or a text."""
    return bool(model.label_dropout) or (model.text is not None and model.pretrained is not None)
