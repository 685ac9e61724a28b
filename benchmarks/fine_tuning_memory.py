"""The memory and the time of one step that fine-tunes a network of diffusers, by the settings.

    python benchmarks/fine_tuning_memory.py [--rows 'fp32, adapter'] [--size 32] [--batch 8]
        [--device cpu|cuda]

The network is a UNet2DModel of 20 million drawn values. Each row is a process of its own: what the
worker's network holds, counted tensor by tensor; the peak of two steps above that, with gradients,
moments and activations (CPU: resident memory; CUDA: allocated); and the time of the second step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable

import torch
from torch import nn

from fed_diffusion.build import Setup
from fed_diffusion.client.budget import seconds_of
from fed_diffusion.client.networks import Networks
from fed_diffusion.client.optimisers import optimiser_of
from fed_diffusion.common.compute import kernels, pinned_threads
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.config import load_config
from fed_diffusion.models.checkpointing import checkpointed

LORA = {"lora.rank": 8}
AGAIN = {"worker.checkpointing": True}
HALF = {"worker.precision": "bf16"}
ROWS = {
    "fp32, the whole network": {},
    "fp32, the whole network, checkpointing": AGAIN,
    "fp32, adapter": LORA,
    "fp32, adapter, checkpointing": LORA | AGAIN,
    "bf16, adapter, base in fp32": LORA | HALF,
    "bf16, adapter, base in bf16": LORA | HALF | {"lora.base": "bf16"},
    "bf16, adapter, base in bf16, checkpointing": LORA | HALF | AGAIN | {"lora.base": "bf16"},
}


def save_network(folder: str, size: int) -> int:
    """Write a pipeline with a drawn network; returns how many values the network has."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=(96, 192, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return sum(value.numel() for value in unet.parameters())


def step_of(setup: Setup, batch: int) -> tuple[nn.Module, Callable[[], None]]:
    """The network that a worker holds, and a function that takes one local step on black images."""
    network, forward, _ = Networks(setup).holding(setup.theta())
    optimiser = optimiser_of(setup.config.local, network.train(), 1e-4, {})
    noise = torch.Generator(setup.device).manual_seed(0)
    images = torch.zeros((batch, *setup.shape), device=setup.device)

    def step() -> None:
        optimiser.zero_grad()
        with checkpointed(network, setup.config.worker.checkpointing):
            setup.loss(forward, images, noise, None).backward()
        optimiser.step()

    return network, step


def measured(settings: dict[str, object], batch: int) -> list[float]:
    """Run in a process of its own: bytes held, bytes of two steps above that, seconds of a step."""
    setup = Setup.of(load_config("cifar10", settings))
    worker, device = setup.config.worker, setup.device
    with pinned_threads(worker.threads), kernels(worker, device):
        _, small = step_of(setup, 1)
        small()  # torch's own buffers come with the first step
        del small
        network, step = step_of(setup, batch)
        held = sum(
            t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())
        )
        with peak_memory(device) as peak:
            seconds_of(step, device)
            seconds = seconds_of(step, device)
            return [held, peak(), seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="how the names of the rows begin")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        values = save_network(folder, arguments.size)
        settings = {
            "model.name": "diffusers",
            "model.pretrained": folder,
            "data.resize": arguments.size,
            "worker.device": arguments.device,
            "worker.precision": "fp32",
        }
        print(
            f"{values / 1e6:.1f} million values, {arguments.batch} images of {arguments.size} x "
            f"{arguments.size}, {arguments.device}, torch {torch.__version__}\n"
        )
        print("| step | held, MB | peak of a step above that, MB | together, MB | seconds |")
        print("|---|---|---|---|---|", flush=True)
        rows = {n: changes for n, changes in ROWS.items() if n.startswith(arguments.rows)}
        for name, changes in rows.items():
            with context.Pool(1) as pool:
                held, peak, seconds = pool.apply(measured, (settings | changes, arguments.batch))
            megabytes = " | ".join(f"{size / 1e6:.0f}" for size in (held, peak, held + peak))
            print(f"| {name} | {megabytes} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
