"""What a run starts from in place of drawn values: names and shapes checked, known by its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fed_diffusion.config import ConfigError
from fed_diffusion.config.names import is_own
from fed_diffusion.config.schema import ModelConfig
from fed_diffusion.models import from_diffusers
from fed_diffusion.models.from_diffusers import PREFIX
from fed_diffusion.models.latent import Autoencoder
from fed_diffusion.models.text import TextEncoder
from fed_diffusion.store.origin import trained
from fed_diffusion.store.rundir import RunDir

KEY = "fed-diffusion-model"
"""In the header of a .safetensors file that was exported: the section `model` as JSON."""
LISTED = 5
"""Tensors that a message lists."""


def start_of(model: ModelConfig, theta: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The values that training starts from, by theta's names; None where they are drawn.

    Parameters
    ----------
    theta
        The network's parameters; only their names and shapes count.

    Raises
    ------
    ConfigError
        They cannot be read, are of another network, or are not those of model.start_hash.
    """
    if model.start is not None:
        key, source, found = "model.start", model.start, _read(model)
    elif model.pretrained is not None:
        key, source = "model.pretrained", model.pretrained
        found = from_diffusers.weights_of(source)
    else:
        return None
    if all(name.startswith(PREFIX) for name in theta) and not any(
        name.startswith(PREFIX) for name in found
    ):  # a file that diffusers wrote
        found = {PREFIX + name: value for name, value in found.items()}
    start = matched(found, theta, f"{key} = {source!r}")
    if model.start_hash is not None and (digest := hash_of(start)) != model.start_hash:
        raise ConfigError(
            f"{key} = {source!r} holds other values than model.start_hash = "
            f"{model.start_hash[:12]}... says (SHA-256 {digest[:12]}...). Put the file back as it "
            "was, or leave model.start_hash out to start from these."
        )
    return start


def hashes_of(model: ModelConfig, theta: Mapping[str, Tensor]) -> dict[str, str]:
    """What a run notes of what it starts from, its autoencoder and its text encoder."""
    start, autoencoder, text = start_of(model, theta), autoencoder_of(model), text_encoder_of(model)
    noted = {} if start is None else {"start_hash": hash_of(start)}
    noted |= {} if autoencoder is None else {"vae_hash": hash_of(autoencoder.values())}
    return noted | ({} if text is None else {"text_hash": hash_of(text.values())})


def autoencoder_of(model: ModelConfig, device: torch.device | str = "cpu") -> Autoencoder | None:
    """The autoencoder that model.vae names, on a device; None where there is none.

    Raises
    ------
    ConfigError
        It cannot be read, or is not that of model.vae_hash.
    """
    if model.vae is None:
        return None
    made = Autoencoder(model.vae)
    _prove(made, f"model.vae = {model.vae!r}", "autoencoder", "vae_hash", model.vae_hash)
    return made.to(device)


def text_encoder_of(model: ModelConfig, device: torch.device | str = "cpu") -> TextEncoder | None:
    """The text encoder that model.text names, on a device; None where there is none.

    Raises
    ------
    ConfigError
        It cannot be read, or is not that of model.text_hash.
    """
    if model.text is None:
        return None
    made = TextEncoder(model.text)
    what = "text encoder or tokenizer"
    _prove(made, f"model.text = {model.text!r}", what, "text_hash", model.text_hash)
    return made.to(device)


def _prove(
    made: Autoencoder | TextEncoder, named: str, what: str, key: str, wanted: str | None
) -> None:
    """Refuse what is not what the run noted."""
    if wanted is not None and (digest := hash_of(made.values())) != wanted:
        raise ConfigError(
            f"{named} is another {what} than model.{key} = {wanted[:12]}... says (SHA-256 "
            f"{digest[:12]}...). Put the run's there."
        )


def facts_of(model: ModelConfig) -> dict[str, str] | None:
    """What results.json says of the start: its name without its folder, and its hash."""
    source = model.start or model.pretrained
    if source is None or model.start_hash is None:
        return None
    path = Path(source)
    return {"from": path.name if path.is_absolute() else source, "sha256": model.start_hash}


def _read(model: ModelConfig) -> dict[str, Tensor]:
    """The tensors that model.start names, unless they mean something else than in this network."""
    source = str(model.start)
    path = Path(source)
    if path.is_dir():
        config, checkpoint = trained(RunDir.open(path))
        if config.lora.rank is not None:
            raise ConfigError(
                f"model.start = {source!r} is a run that trained an adapter (lora.rank). Export it "
                "(fed-diffusion export RUN DIR), which puts it into its base, and start from that."
            )
        _refuse_other_meaning(model, config.model.model_dump(mode="json"), source)
        return checkpoint.tensors["ema"]
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(
            f"model.start = {source!r} is neither the directory of a run nor a .safetensors file."
        )
    try:
        with safe_open(path, "pt") as file:
            noted = json.loads((file.metadata() or {}).get(KEY, "{}"))
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"model.start = {source!r} cannot be read: {error}.") from error
    _refuse_other_meaning(model, noted, source)
    return values


def _refuse_other_meaning(model: ModelConfig, there: Mapping[str, Any], source: str) -> None:
    """Tensors of the same shapes are another function where certain settings differ."""
    if not there or is_own(model.name):  # nothing is known there, or here
        return
    here = model.model_dump(mode="json")
    if model.name == from_diffusers.NAME:
        here["network"] = from_diffusers.describe(model)
    then, now = _meaning(there), _meaning(here)
    for key in [key for key in now if then.get(key) != now[key]][:1]:
        raise ConfigError(
            f"model.start = {source!r} was trained with {key} = {then.get(key)!r}, and this run "
            f"has {now[key]!r}: the same tensors would be another network. Set it as it was there."
        )


def _meaning(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say which function tensors of given names and shapes are."""
    name = model.get("name")
    if name == "unet":
        return {f"model.{key}": model.get(key) for key in ("name", "prediction", "group", "head")}
    found = {"model.name": name}
    for part, values in (model.get("network") or {}).items():
        if part in MEANING:
            chosen = {key: value for key, value in values.items() if MEANING[part](key)}
            found |= {f"{part}.{key}": value for key, value in chosen.items()}
    return found


MEANING: dict[str, Callable[[str], bool]] = {
    "unet": lambda key: key not in ("sample_size", "dropout"),
    "scheduler": lambda key: "beta" in key or key in ("num_train_timesteps", "prediction_type"),
}
"""Of a description's parts, the names that say which function the network is."""


def matched(
    values: Mapping[str, Tensor], theta: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """The values as theta has them, float32 in its order.

    Raises
    ------
    ConfigError
        They are of another network; the message tells the difference.
    """
    missing = [name for name in theta if name not in values]
    unknown = [name for name in values if name not in theta]
    other = [
        f"{name} {list(values[name].shape)} there and {list(theta[name].shape)} here"
        for name in theta
        if name in values and values[name].shape != theta[name].shape
    ]
    problems = [
        f"{words}: {_listed(names)}"
        for words, names in (
            ("of another shape", other),
            ("only in this network", missing),
            ("only there", unknown),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"{what} is of another network than model.* describes; {'; '.join(problems)}. Set "
            "model.* as it was for the network that training is to start from."
        )
    bad = [n for n, v in values.items() if not v.is_floating_point() or not v.isfinite().all()]
    if bad:
        raise ConfigError(f"{what} holds values that are no finite numbers: {_listed(bad)}.")
    return {name: values[name].to(torch.float32) for name in theta}


def hash_of(values: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever file the values come from."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
