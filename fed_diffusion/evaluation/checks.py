"""What can be known about an evaluation before there are images, and the record without figures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from fed_diffusion.build import Setup
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.yaml import expanded
from fed_diffusion.data.datasets import class_count
from fed_diffusion.evaluation.choice import WEIGHTS_FILE, Choice, choices
from fed_diffusion.evaluation.judge import check_judge
from fed_diffusion.evaluation.weights import check_features

logger = logging.getLogger(__name__)
FEWEST_IMAGES = 2
OWN_DATA = ("data", "train", "test")
"""The words of evaluation.reference that mean the run's own data set, or a part of it."""


def check_evaluation(run: Config | Setup) -> None:
    """Refuse, before training, an evaluation that is bound to fail after it.

    Where evaluation.extractor is auto, a log line says which judge is taken, and why.

    Parameters
    ----------
    run
        The configuration of the run, or the setup that was made of it.

    Raises
    ------
    ConfigError
    The message names the key under `evaluation`, the value and what is allowed.
    """
    setup = Setup.of(run)
    settings = setup.config.evaluation
    if settings.samples == 0 or settings.reference == "none":
        return
    if settings.samples < FEWEST_IMAGES:
        raise ConfigError(
            f"evaluation.samples = {settings.samples} is too few: FID needs at least "
            f"{FEWEST_IMAGES} images. Use 0 to switch quality figures off."
        )
    folder = None
    if settings.reference not in OWN_DATA:
        folder = expanded(settings.reference, "evaluation.reference")
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"evaluation.reference = {settings.reference!r} is not allowed: use data (the run's "
            "own data set), train or test (parts of it), none (no quality figures) or an existing "
            "folder of images."
        )
    for choice in choices(settings, setup.pixels):
        _check_choice(setup, choice, folder)
        if choice.because is not None:
            logger.warning("evaluation.extractor = auto takes %s: %s.", choice.name, choice.because)


def _check_choice(setup: Setup, choice: Choice, folder: Path | None) -> None:
    settings = choice.settings
    if choice.name not in ("inception", "classifier"):
        check_judge(settings, setup.pixels, setup.device)
    elif choice.name == "inception":
        if settings.weights is not None:
            check_weights(str(settings.weights))
    elif settings.weights is not None:
        check_features(str(settings.weights), setup.pixels)
    elif folder is not None:
        _check_class_folders(folder)
    elif class_count(setup.config.data) is None:
        raise ConfigError(
            "evaluation.extractor = 'classifier' needs labelled images, and the number of classes "
            f"of data.name = {setup.config.data.name!r} is unknown. Images without classes need "
            "evaluation.extractor=inception, or evaluation.weights (a trained classifier), or "
            "evaluation.samples=0 (no figures); else set data.classes."
        )


def _check_class_folders(folder: Path) -> None:
    if sum(entry.is_dir() for entry in folder.iterdir()) < 2:
        raise ConfigError(
            "evaluation.extractor = 'classifier' needs labelled images, one sub-folder per class, "
            f"and evaluation.reference = {str(folder)!r} has fewer than two. Or set "
            "evaluation.extractor=inception."
        )


def check_weights(weights: str) -> Path:
    """Return the Inception weights file, once it is known to hold a state dict and no code.

    Raises
    ------
    ConfigError
    `evaluation.weights` does not exist, or is another kind of file.
    """
    path = expanded(weights, "evaluation.weights")
    if not path.is_file():
        raise ConfigError(
            f"evaluation.weights = {weights!r} does not exist. Give torch-fidelity's file "
            f"{WEIGHTS_FILE}, or leave the setting out to have it downloaded."
        )
    try:
        # torch-fidelity itself unpickles whatever it is given: let nothing but tensors reach it
        state = torch.load(path, map_location="cpu", weights_only=True)
        problem = (
            None if isinstance(state, dict) and "fc.weight" in state else "some weights are missing"
        )
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        problem = f"{type(error).__name__} on reading it"
    if problem is not None:
        raise ConfigError(
            f"evaluation.weights = {weights!r} is not a file of Inception weights ({problem}). "
            f"It must be torch-fidelity's {WEIGHTS_FILE}."
        )
    return path


def no_quality(
    why: str,
    samples: int,
    nfe: int,
    *,
    seed: int | None = None,
    reference: str | None = None,
    split: str | None = None,
    extractor: str | None = None,
    extractor_sha256: str | None = None,
    extractor_because: str | None = None,
    others: dict[str, Any] | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    memorisation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the keys of `quality.evaluate` without figures: nulls, and the reason for them."""
    return {
        "fid": None,
        "fid_floor": None,
        "inception_score": None,
        "kid": None,
        "precision": None,
        "recall": None,
        "intervals": None,
        "memorisation": memorisation,
        "samples": samples,
        "reference": reference,
        "split": split,
        "extractor": extractor,
        "extractor_sha256": extractor_sha256,
        "extractor_because": extractor_because,
        "others": others or {},
        "sampler": sampler,
        "guidance": guidance,
        "nfe": nfe,
        "seed": seed,
        "why": why,
    }
