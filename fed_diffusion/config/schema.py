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
    TheoryConfig,
    WireConfig,
    WorkerConfig,
)
from fed_diffusion.config.names import is_own, part
from fed_diffusion.config.section import (
    LARGEST,
    ConfigError,
    Section,
    as_numbers,
    by_type,
    is_free_text,
)
from fed_diffusion.config.training import (
    Background,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    KeepRatio,
    Level,
    LocalConfig,
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
    "ModelConfig",
    "PrivacyConfig",
    "PruningConfig",
    "RoundConfig",
    "Section",
    "TheoryConfig",
    "WireConfig",
    "WorkerConfig",
    "as_numbers",
    "by_type",
    "is_free_text",
]


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
    trackers: tuple[Annotated[str, part("csv")], ...] = ()
    """Who is told how the run goes, beside the run directory. csv: rounds.csv in the run directory;
    your_module:Tracker: see `report.trackers.Tracker`."""

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
    def _state_is_averaged(self) -> Config:
        if self.wire.state != "fp32" and self.local.state != "shared":
            raise ValueError(
                f"wire.state: {self.wire.state} needs local.state shared: else no state travels"
            )
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
        wanted = {
            "wire.differences": (self.wire.differences, True, "differences are what is clipped"),
            "local.state": (self.local.state, "fresh", "moments would leave unclipped"),
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
        kind = "balanced masks depend" if self.pruning.kind == "balanced" else ""
        if is_own(self.pruning.kind):
            kind = f"masks of pruning.kind = {self.pruning.kind!r} may depend"
        if kind and self.round.fraction < 1:
            raise ValueError(
                f"privacy.clip: {kind} on who else takes part, so one client would "
                "change the others' updates; use round.fraction = 1 or another kind"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as YAML and JSON take them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
