"""The network of a run as an ONNX file, which ONNX Runtime and others run without torch."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fed_diffusion.config import ConfigError
from fed_diffusion.store.files import write_atomic

FILE, CONFIG = "model.onnx", "config.json"
INSTALL = "pip install 'fed-diffusion[onnx]'"
NEEDED = ("onnx", "onnxscript")
ONE_FILE = 2**30
"""From so many bytes on, the tensors lie beside the file: the format allows it 2 GiB."""


def check_installed() -> None:
    """Refuse the format where a package that it needs is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs the package {missing[0]}: {INSTALL}.")


def write_onnx(
    network: nn.Module,
    shape: tuple[int, int, int],
    classes: int | None,
    about: dict[str, Any],
    folder: Path,
) -> None:
    """Write a network as eps = model(x, u[, labels]), for batches of any size.

    Parameters
    ----------
    network
        The network in evaluation mode, on the CPU.
    shape
        (C, H, W) of what it sees.
    classes
        How many labels it knows, of which `classes` itself means "no label"; None: it has none.
    about
        What config.json says.
    """
    names = ["x", "u"] if classes is None else ["x", "u", "labels"]
    given = [torch.zeros((2, *shape)), torch.ones(2, dtype=torch.float64), torch.zeros(2).long()]
    size = sum(value.nbytes for value in network.state_dict().values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the names of dimensions, and on torch's own code
        # AUTO: diffusers looks whether a batch has 64 images, for its layout in memory alone
        traced = torch.export.export(
            network,
            tuple(given[: len(names)]),
            dynamic_shapes=tuple({0: torch.export.Dim.AUTO} for _ in names),
            strict=False,
        )
        program = torch.onnx.export(
            traced, dynamo=True, input_names=names, output_names=["eps"], verbose=False
        )
        assert program is not None
        first = [value.shape[0] for value in program.model.graph.inputs if value.shape]
        if any(isinstance(size, int) for size in first):
            raise ConfigError(
                "--format onnx: the network computes with the number of images itself, so its file "
                "would be for batches of one size. Use --format safetensors."
            )
        program.save(folder / FILE, external_data=size > ONE_FILE)
    write_atomic(folder / CONFIG, json.dumps(about, indent=2) + "\n")
