"""The model card of an exported run: what it is, how it was trained, what is known of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fed_diffusion.common.version import __version__
from fed_diffusion.config import Config, ConfigError, method_name
from fed_diffusion.config.schema import LocalConfig
from fed_diffusion.config.section import HUB
from fed_diffusion.data import image_shape
from fed_diffusion.models import from_diffusers
from fed_diffusion.models.latent import seen_shape
from fed_diffusion.store.rundir import RunDir
from fed_diffusion.store.start import facts_of

PIPELINE = """```python
from diffusers import DiffusionPipeline

image = DiffusionPipeline.from_pretrained("THIS FOLDER")().images[0]
```"""
LABELLED = """The pipeline of diffusers passes no label on, so its loop is written out:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER")
labels = torch.tensor([0, 1])
x = torch.randn(len(labels), {channels}, {size}, {size})
pipe.scheduler.set_timesteps(100)
with torch.no_grad():
    for t in pipe.scheduler.timesteps:
        out = pipe.unet(x, t, class_labels=labels).sample
        x = pipe.scheduler.step(out, t, x).prev_sample
```"""
PROMPTED = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER")
image = pipe({prompt!r}, height={size}, width={size}).images[0]
```"""
OWN_CODE = """The folder holds the code of its network and its pipeline, so it needs diffusers and
torch alone; diffusers runs that code where it is told to.

```python
from diffusers import DiffusionPipeline

folder = "THIS FOLDER"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
image = pipe(1, labels=LABELS).images[0]
```"""
TENSORS = """`model.safetensors` holds the tensors by name, and `config.json` says of which network
they are. A run of fed-diffusion starts from them:

```bash
fed-diffusion run PRESET --set model.start=THIS_FOLDER/model.safetensors
```"""


NETWORK = """`model.onnx` holds the network: eps = model(x, u{labels}) estimates the noise in
x [n, {channels}, {height}, {width}] at the times u [n], where the signal is e^-u and the noise
sqrt(1 - e^-2u). `config.json` has the times that the run samples at. ONNX Runtime and numpy are
enough to sample{what}:

```python
import json

import numpy as np
import onnxruntime

folder = "THIS FOLDER"
about = json.load(open(f"{{folder}}/config.json"))
model = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
x = np.random.default_rng(0).standard_normal((2, {channels}, {height}, {width}), np.float32)
times = about["times"]
for k in range(len(times) - 1 + about["denoise"]):
    given = {{"x": x, "u": np.full(len(x), times[k]){given}}}
    (eps,) = model.run(None, given)
    x0 = (x - np.sqrt(-np.expm1(-2 * times[k])) * eps) / np.exp(-times[k])
    u = times[k + 1] if k + 1 < len(times) else 0.0
    x = (np.exp(-u) * x0 + np.sqrt(-np.expm1(-2 * u)) * eps).astype(np.float32)
```"""


def card(run: RunDir, config: Config, rounds: int, format: str, weights: str) -> str:
    """README.md of an export, with the front matter that the Hub reads.

    Nothing of it names a path of the machine that trained.
    """
    library = format if format in ("diffusers", "onnx") else "fed-diffusion"
    tags = ["federated-learning", "diffusion"]
    head = ["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"]
    try:
        results = run.results()
    except ConfigError:  # a run that goes on, or was stopped, is exported as far as it has come
        results = {}
    title = f"# {config.preset}: a diffusion model that {config.clients} clients trained together"
    kind = "the moving average of the parameters" if weights == "ema" else "the parameters"
    parts = [
        "\n".join(head),
        title,
        f"Trained with fed-diffusion {__version__}; these are {kind} after round {rounds} of "
        f"{config.rounds}.",
        "## How to use it",
        _use(config, format),
        "## How it was trained",
        _listed(_training(config, results)),
        "## What is known of it",
        _listed(_figures(results)) if results else "The run has not come to its end.",
    ]
    return "\n\n".join(parts) + "\n"


def _use(config: Config, format: str) -> str:
    if format == "onnx":
        return _onnx(config)
    if format != "diffusers":
        return TENSORS
    if config.model.name != from_diffusers.NAME:
        return OWN_CODE.replace("LABELS", "[0]" if config.model.conditional else "None")
    channels, size, _ = image_shape(config.data)
    if config.model.text is not None:
        return PROMPTED.format(prompt=config.evaluation.prompts[0], size=size)
    labelled = LABELLED.replace("{channels}", str(channels)).replace("{size}", str(size))
    return labelled if config.model.conditional else PIPELINE


def _onnx(config: Config) -> str:
    conditional = config.model.conditional
    channels, height, width = seen_shape(config.model.vae, image_shape(config.data))
    return NETWORK.format(
        channels=channels,
        height=height,
        width=width,
        labels=", labels" if conditional else "",
        given=', "labels": np.array([0, 1])' if conditional else "",
        what="" if config.model.vae is None else " the latents of images, without the autoencoder",
    )


def _locally(local: LocalConfig) -> str:
    many, unit = (local.steps, "step") if local.epochs is None else (local.epochs, "epoch")
    said = [
        f"{many} {unit}{'' if many == 1 else 's'} of {local.optimizer} a round",
        f"batches of {local.batch}",
        f"eta {local.eta:g} ({local.schedule})",
    ]
    if local.state == "shared":
        said.append("moments shared over the rounds")
    if local.decay:
        said.append(f"weight decay {local.decay:g}")
    if local.max_grad_norm is not None:
        said.append(f"gradients of norm {local.max_grad_norm:g} at most")
    if local.prox:
        said.append(f"proximal term {local.prox:g}")
    return ", ".join(said)


def _training(config: Config, results: dict[str, Any]) -> list[tuple[str, str]]:
    pruning, local, privacy = config.pruning, config.local, config.privacy
    channels, size, _ = image_shape(config.data)
    images = results.get("data", {}).get("images")
    masks = f"pruning.kind = {pruning.kind}, level {pruning.level}"
    if pruning.keep is not None:
        masks = f"pruning.kind = {pruning.kind}, keep ratios {pruning.keep}"
    lines = [
        ("Images", f"{data_name(config.data.name)}, {channels} x {size} x {size}"),
        ("Clients", f"{config.clients}, split {config.data.partition}"),
        ("Method", f"{config.method or method_name(config)}; {masks}"),
        ("Locally", _locally(local)),
        ("Started from", _base(config)),
        ("Seed", str(config.seed)),
    ]
    if config.model.vae is not None:
        lines.append(("Autoencoder", f"{Path(config.model.vae).name}, {config.model.vae_hash}"))
    if config.model.text is not None:
        name = Path(config.model.text).name
        lines.append(("Text encoder", f"{name}, {config.model.text_hash}"))
        lines.append(("Captions", config.data.caption or "those of the images' metadata"))
    if config.lora.rank is not None:
        text = f"LoRA of rank {config.lora.rank}, alpha / rank = {config.lora.scale:g}, training "
        text += f"{config.lora.train}; merged here, and by itself in the folder `adapter`"
        lines.append(("Adapter", text))
    if images is not None:
        lines[0] = ("Images", f"{images} of {lines[0][1]}")
    if privacy.clip is None:
        lines.append(("Privacy", "no differential privacy; the images stayed with the clients"))
    elif (spent := results.get("privacy")) is not None:
        text = f"differential privacy of clients, epsilon = {spent['epsilon']:.3g} at delta = "
        text += f"{spent['delta']:g}"
        if facts_of(config.model) is not None:
            text += ", of which the images that the start was trained on are no part"
        lines.append(("Privacy", f"{text}; it covers {spent['covers']}"))
    return lines


def data_name(name: str) -> str:
    """The name of a data set, without the folder that it lies in on the machine that trained."""
    path = Path(name.removeprefix(HUB))
    return f"{HUB}{path.name}" if name.startswith(HUB) and path.is_absolute() else name


def _base(config: Config) -> str:
    facts = facts_of(config.model)
    if facts is None:
        return "drawn values"
    text = f"{facts['from']}, SHA-256 {facts['sha256']}"
    if config.model.name == from_diffusers.NAME:
        text += ". Its licence holds for what was made of it: look it up where the base comes from"
    return text


def _figures(results: dict[str, Any]) -> list[tuple[str, str]]:
    quality = results["quality"]
    lines = [("Loss", f"{results['loss']:.4g}")]
    if results.get("holdout_loss") is not None:
        lines.append(("Loss on held-out images", f"{results['holdout_loss']:.4g}"))
    if quality.get("fid") is not None:
        text = f"{quality['fid']:.2f} (floor {quality['fid_floor']:.2f}), judged by "
        text += f"{quality['extractor']} on {quality['samples']} samples of the moving average"
        lines.append(("FID", text))
    else:
        lines.append(("FID", f"not measured: {quality.get('why')}"))
    memorised = (quality.get("memorisation") or {}).get("copied")
    if memorised:
        lines.append(("Copies", f"samples copy images of clients {memorised}"))
    return lines


def _listed(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in lines)
