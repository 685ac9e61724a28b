"""A trained adapter alone, in the form that the package peft reads."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fed_diffusion.config.schema import LoraConfig
from fed_diffusion.models import from_diffusers, lora
from fed_diffusion.models.from_diffusers import PREFIX
from fed_diffusion.store.files import save_tensors, write_atomic

PIPELINED = from_diffusers.KINDS[1]
"""The network whose pipeline has load_lora_weights."""
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = "adapter"
"""The folder of the adapter in an export."""


def write_adapter(network: nn.Module, settings: LoraConfig, folder: Path) -> None:
    """Write a network's adapter into a new folder.

    `peft.PeftModel.from_pretrained(base, folder)` puts it beside the layers of the base, which is
    the UNet2DModel itself for a network of diffusers. For a network of text there is also what
    `pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")` takes: the
    factors by the pipeline's names, with alpha / rank in B, since such a file says no alpha.
    """
    layers = {name.removeprefix(PREFIX): layer for name, layer in lora.adapters(network)}
    tensors = {
        f"base_model.model.{name}.{which}.weight": getattr(layer, which).detach().contiguous()
        for name, layer in layers.items()
        for which in (lora.A, lora.B)
    }
    assert settings.rank is not None
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank,
        "target_modules": list(layers),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir()
    if type(getattr(network, "unet", None)).__name__ == PIPELINED:
        factors = {
            f"{PREFIX}{name}.{which}.weight": value.detach().contiguous()
            for name, layer in layers.items()
            for which, value in ((lora.A, layer.lora_A), (lora.B, settings.scale * layer.lora_B))
        }
        save_tensors(folder / LORA_WEIGHTS, factors, {"format": "pt"})
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_atomic(folder / "adapter_config.json", json.dumps(about, indent=2) + "\n")
