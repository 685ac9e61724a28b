"""A trained run as files that other tools read: a pipeline of diffusers, or safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fed_diffusion import __version__
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import class_count, image_shape
from fed_diffusion.models import from_diffusers
from fed_diffusion.report.card import card
from fed_diffusion.store.files import save_tensors, write_atomic
from fed_diffusion.store.origin import trained
from fed_diffusion.store.rundir import RunDir
from fed_diffusion.store.start import KEY, hash_of

FORMATS = ("diffusers", "safetensors")
WEIGHTS = ("ema", "theta")
MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def export(run: RunDir, folder: Path, format: str | None = None, weights: str = "ema") -> Path:
    """Write what a run has trained into a new folder, with a model card; returns the folder.

    Parameters
    ----------
    folder
        A folder that does not exist yet, or an empty one.
    format
        diffusers: a pipeline, of a run with model.name = diffusers. safetensors: the tensors by
        name, and config.json. Default: diffusers where that can be.
    weights
        ema: the moving average, which samples are made of; theta: the parameters themselves.

    Raises
    ------
    ConfigError
        Nothing is trained; the folder is not empty; the network is none of diffusers.
    """
    config, checkpoint = trained(run)
    ours = config.model.name != from_diffusers.NAME
    format = format or ("safetensors" if ours else "diffusers")
    if format == "diffusers" and ours:
        raise ConfigError(
            f"--format diffusers needs a run with model.name = 'diffusers', and {run.path} has "
            f"model.name = {config.model.name!r}; use --format safetensors."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; name a new folder.")
    theta = checkpoint.tensors[weights]
    network = _diffusers(config, theta) if format == "diffusers" else None
    folder.mkdir(parents=True, exist_ok=True)
    if network is not None:
        network.save_pretrained(folder)
    else:
        _tensors(config, theta, folder, weights)
    write_atomic(folder / CARD, card(run, config, checkpoint.state["round"], format, weights))
    return folder


def _diffusers(config: Config, theta: Mapping[str, Tensor]) -> Any:
    """The pipeline of a run's network and its scheduler."""
    description = from_diffusers.describe(config.model)
    size = image_shape(config.data)[1]
    unet = from_diffusers.unet_of(
        {"unet": description["unet"] | {"sample_size": size}}  # the size that it makes
    )
    prefix = from_diffusers.PREFIX
    unet.load_state_dict({name.removeprefix(prefix): value for name, value in theta.items()})
    import diffusers

    kind = getattr(diffusers, description["pipeline"])
    return kind(unet=unet, scheduler=from_diffusers.scheduler_of(description))


def _tensors(config: Config, theta: Mapping[str, Tensor], folder: Path, weights: str) -> None:
    """The tensors in one file, and in another what network they are of."""
    model = config.model.model_dump(mode="json", exclude={"pretrained", "config", "scheduler"})
    model["start"] = None  # a path of the machine that the run began on
    channels, size, _ = image_shape(config.data)
    about = {
        "fed-diffusion": __version__,
        "weights": weights,
        "sha256": hash_of(theta),
        "images": {"channels": channels, "size": size, "classes": class_count(config.data)},
        "model": model,
        "diffusion": config.diffusion.model_dump(mode="json"),
    }
    save_tensors(folder / MODEL, theta, {"format": "pt", KEY: json.dumps(model)})
    write_atomic(folder / CONFIG, json.dumps(about, indent=2) + "\n")
