"""A trained run as files that other tools read: a pipeline of diffusers, ONNX, or safetensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fed_diffusion.build import Setup, parameters_of, skeleton, time_grid
from fed_diffusion.common.version import __version__
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.training import LoraConfig
from fed_diffusion.data import class_count, image_shape
from fed_diffusion.diffusion import process
from fed_diffusion.export.adapter import ADAPTER, write_adapter
from fed_diffusion.export.card import card
from fed_diffusion.export.onnx import check_installed, write_onnx
from fed_diffusion.models import from_diffusers, lora, unet
from fed_diffusion.models.latent import seen_shape
from fed_diffusion.store.files import save_tensors, write_atomic
from fed_diffusion.store.origin import trained
from fed_diffusion.store.rundir import RunDir
from fed_diffusion.store.start import KEY, autoencoder_of, hash_of, text_encoder_of

Write = Callable[[Path], None]
FORMATS = ("diffusers", "onnx", "safetensors")
WEIGHTS = ("ema", "theta")
UNET_NEEDS = "from fed_diffusion.diffusion.process import alpha, per_image, sigma\n"
NETWORK_NEEDS = (
    "from fed_diffusion.models.unet import UNet  # an export has the classes themselves here\n"
)
MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def export(run: RunDir, folder: Path, format: str | None = None, weights: str = "ema") -> Path:
    """Write what a run has trained into a new folder, with a model card; returns the folder.

    Parameters
    ----------
    folder
        A folder that does not exist yet, or an empty one.
    format
        diffusers: a pipeline; that of the built-in U-Net brings its own code. safetensors: the
        tensors by name, and config.json. onnx: the network, for ONNX Runtime. Default: diffusers
        for a run with model.name = diffusers, else safetensors.
    weights
        ema: the moving average, which samples are made of; theta: the parameters themselves.

    Of a run that trained an adapter, the network with the adapter in it is written, and the adapter
    itself in a folder of its own.

    Raises
    ------
    ConfigError
        Nothing is trained; the folder is not empty; a network of the user's own has no pipeline.
    """
    config, checkpoint = trained(run)
    name = config.model.name
    format = format or ("diffusers" if name == from_diffusers.NAME else "safetensors")
    if format == "onnx":
        check_installed()
    if format != "safetensors" and name not in PIPELINES:
        raise ConfigError(
            f"--format {format} needs a network of diffusers or the built-in U-Net, and {run.path}"
            f" has model.name = {name!r}; use --format safetensors."
        )
    if format == "diffusers" and config.model.vae and name != from_diffusers.NAME:
        raise ConfigError(
            "--format diffusers of a run with model.vae needs a network of diffusers, and "
            f"{run.path} has model.name = {name!r}; use --format safetensors."
        )
    if format == "diffusers" and config.model.text and not config.model.vae:
        raise ConfigError(
            "--format diffusers of a run with model.text writes a StableDiffusionPipeline, which "
            "has an autoencoder, and this run has no model.vae; use --format safetensors."
        )
    if format == "onnx" and config.model.text:
        raise ConfigError(
            "--format onnx is for networks without text (model.text); use --format diffusers."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; name a new folder.")
    theta = checkpoint.tensors[weights]
    adapter = None
    if config.lora.rank is not None:
        network = Setup.of(config).network_with(theta)
        adapter = partial(write_adapter, network, config.lora)
        theta = lora.merged(network, parameters_of(skeleton(config, adapted=False)))
    write: Write = partial(_tensors, config, theta, weights)
    if format == "diffusers":
        write = PIPELINES[name](config, theta)
    elif format == "onnx":
        write = _onnx(config, theta, weights)
    folder.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        adapter(folder / ADAPTER)
    write(folder)
    write_atomic(folder / CARD, card(run, config, checkpoint.state["round"], format, weights))
    return folder


def _diffusers(config: Config, theta: Mapping[str, Tensor]) -> Write:
    """The pipeline of a run's network and its scheduler."""
    description = from_diffusers.describe(config.model)
    size = seen_shape(config.model.vae, image_shape(config.data))[1]
    network = from_diffusers.unet_of(
        {"unet": description["unet"] | {"sample_size": size}}  # the size that it makes
    )
    prefix = from_diffusers.PREFIX
    network.load_state_dict({name.removeprefix(prefix): value for name, value in theta.items()})
    import diffusers

    scheduler = from_diffusers.scheduler_of(description)
    autoencoder, text = autoencoder_of(config.model), text_encoder_of(config.model)
    if text is not None:
        assert autoencoder is not None
        made: Any = diffusers.StableDiffusionPipeline(
            vae=autoencoder.vae,
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            unet=network,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif autoencoder is None:
        made = getattr(diffusers, description["pipeline"])(unet=network, scheduler=scheduler)
    else:
        made = diffusers.LDMPipeline(vqvae=autoencoder.vae, unet=network, scheduler=scheduler)
    write: Write = made.save_pretrained
    return write


def _unet(config: Config, theta: Mapping[str, Tensor]) -> Write:
    """The pipeline of the built-in U-Net, with the code of both."""
    channels, size, _ = seen_shape(config.model.vae, image_shape(config.data))
    keys = ("widths", "blocks", "attention", "group", "head", "dropout", "prediction")
    shape = config.model.model_dump(mode="json", include=set(keys))
    shape |= {"channels": channels, "size": size}
    shape["classes"] = class_count(config.data) if config.model.conditional else None
    index = {
        "_class_name": ["pipeline", "FedDiffusionPipeline"],
        "unet": ["network", "Network"],
        "times": time_grid(config.diffusion, config.evaluation.steps).tolist(),
        "denoise": config.evaluation.denoise,
    }

    def write(folder: Path) -> None:
        inside = folder / "unet"
        inside.mkdir()
        tensors = {f"net.{name}": value for name, value in theta.items()}
        save_tensors(inside / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        write_atomic(inside / CONFIG, json.dumps({"_class_name": "Network"} | shape, indent=2))
        write_atomic(inside / "network.py", _code_of_network())
        write_atomic(folder / "pipeline.py", _template("pipeline.py"))
        write_atomic(folder / "model_index.json", json.dumps(index, indent=2))

    return write


def _code_of_network() -> str:
    """The template of the network with the U-Net's own code in place of its import."""
    code = inspect.getsource(unet)
    needed = (process.alpha, process.sigma, process.per_image)
    parts = [inspect.getsource(one) for one in needed]
    assert UNET_NEEDS in code
    code = code.replace(UNET_NEEDS, "\n\n".join(parts))
    first = "from __future__ import annotations\n"
    template = _template("network.py")
    assert NETWORK_NEEDS in template
    return template.replace(NETWORK_NEEDS, code[code.index(first) + len(first) :])


def _template(name: str) -> str:
    text = (Path(__file__).parent / "templates" / name).read_text("utf-8")
    return f"# From fed-diffusion {__version__}, Apache-2.0.\n{text}"


def _onnx(config: Config, theta: dict[str, Tensor], weights: str) -> Write:
    """The network, and what is needed to sample with it."""
    plain = Setup.of(config.model_copy(update={"lora": LoraConfig()}))
    network = plain.network_with(theta)
    about = _about(config, theta, weights)
    about["times"] = plain.sampling_times().tolist()
    about["denoise"] = config.evaluation.denoise
    return partial(write_onnx, network, plain.shape, plain.classes, about)


def _tensors(config: Config, theta: Mapping[str, Tensor], weights: str, folder: Path) -> None:
    """The tensors in one file, and in another what network they are of."""
    about = _about(config, theta, weights)
    described = {"format": "pt", KEY: json.dumps(about["model"])}
    save_tensors(folder / MODEL, theta, described)
    write_atomic(folder / CONFIG, json.dumps(about, indent=2) + "\n")


def _about(config: Config, theta: Mapping[str, Tensor], weights: str) -> dict[str, Any]:
    """What network the tensors are of, as JSON has it."""
    model = config.model.model_dump(
        mode="json", exclude={"pretrained", "config", "scheduler", "vae", "text"}
    )
    model["start"] = None  # a path of the machine that the run began on
    channels, size, _ = image_shape(config.data)
    return {
        "fed-diffusion": __version__,
        "weights": weights,
        "sha256": hash_of(theta),
        "images": {"channels": channels, "size": size, "classes": class_count(config.data)},
        "model": model,
        "diffusion": config.diffusion.model_dump(mode="json"),
    }


PIPELINES: dict[str, Callable[[Config, Mapping[str, Tensor]], Write]] = {
    "unet": _unet,
    from_diffusers.NAME: _diffusers,
}
"""model.name -> what makes a pipeline of such a network."""
