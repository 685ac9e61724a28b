"""What a physically smaller U-Net saves: memory, arithmetic, time and bytes at each keep ratio.

    python benchmarks/submodels.py [--preset cifar10] [--batch 128] [--device cpu|cuda] [--rounds 5]

Every figure is a ratio to the whole network. Step times are medians over rounds in which all sizes
take a step in turn, in one process with all cores. The peak is of a process of its own for each
size (CPU: resident memory above the idle process; CUDA: allocated), activations are the bytes that
autograd keeps between the passes, the state is parameters, gradients and Adam's moments.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.client.budget import demand, seconds_of, sub_network, training_step
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.config import Config, load_config
from fed_diffusion.data import image_shape
from fed_diffusion.models.unet import reset
from fed_diffusion.protocol.wire import Payload, Wire, decode_task, encode_update
from fed_diffusion.server.coordinator import Coordinator

KEEP = (1.0, 0.75, 0.5, 0.25, 0.125)


def settings(arguments: argparse.Namespace) -> Config:
    return load_config(
        arguments.preset,
        {
            "pruning.kind": "channels",
            "pruning.keep": list(KEEP),
            "clients": len(KEEP),
            "local.batch": arguments.batch,
            "worker.device": arguments.device,
        },
    )


def state_bytes(config: Config, keep: float, device: torch.device) -> int:
    """Parameters, gradients and moments after a step, counted tensor by tensor."""
    network = sub(config, keep, device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [t for p in network.parameters() for t in (p.detach(), p.grad)]
    held += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.numel() * t.element_size() for t in held)


def sub(config: Config, keep: float, device: torch.device | str) -> torch.nn.Module:
    setup = Setup.of(config)
    network = sub_network(setup.skeleton, setup.layout, keep, device)
    return network if str(device) == "meta" else reset(network)


def macs(config: Config, keep: float) -> float:
    """Multiply-adds of one image's forward pass."""
    with FlopCounterMode(display=False) as flops:
        shape = (1, *image_shape(config.data))
        blank = torch.empty(shape, device="meta")
        sub(config, keep, "meta")(blank, torch.ones(1, dtype=torch.float64, device="meta"), None)
    return flops.get_total_flops() / 2


def peak_of_two_steps(settings: dict[str, Any], keep: float) -> float:
    """Run in a process of its own: bytes above what it held before the network was built."""
    config = Config.model_validate(settings)
    device = torch.device(config.worker.device)
    small = load_config(
        "digits", {"local.batch": 2}
    )  # torch's own buffers come with the first step
    step = training_step(Setup.of(small), build_network(small).to(device), device)
    step()
    del step
    with peak_memory(device) as peak:
        network = sub(config, keep, device)
        step = training_step(Setup.of(config), network, device)
        step()
        step()
        return peak()


def step_seconds(config: Config, rounds: int, device: torch.device) -> dict[float, float]:
    """Medians over rounds in which every size takes a step; the first round is warm-up."""
    setup = Setup.of(config)
    steps = {keep: training_step(setup, sub(config, keep, device), device) for keep in KEEP}
    taken: dict[float, list[float]] = {keep: [] for keep in KEEP}
    for _ in range(rounds + 1):
        for keep, step in steps.items():
            taken[keep].append(seconds_of(step, device))
    return {keep: statistics.median(times[1:]) for keep, times in taken.items()}


def payload_bytes(config: Config) -> list[tuple[int, int]]:
    """Bytes down and up of a client of every size, as the ledger counts them."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    shapes = {n: torch.empty(v.shape, device="meta") for n, v in coordinator.theta.items()}
    family = Setup.of(config).family
    wire = Wire(config.wire, config.pruning, config.local, family, config.seed)
    sizes = []
    for task in coordinator.tasks(1):
        recipe, masks, start = decode_task(task.payload, shapes, coordinator.layout, wire)
        arrays = encode_update(start, start, masks, wire, 1, task.client)
        sizes.append((task.payload.nbytes, Payload(arrays, recipe.to_metrics()).nbytes))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config, device = settings(arguments), torch.device(arguments.device)
    setup = Setup.of(config)
    layout = setup.layout
    needs = {keep: demand(setup, sub(config, keep, "meta")) for keep in KEEP}
    parameters = {keep: layout.kept(layout.counts(keep)) for keep in KEEP}
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for keep in KEEP:
        with context.Pool(1) as pool:
            peaks[keep] = pool.apply(peak_of_two_steps, (config.to_dict(), keep))
    columns: dict[str, dict[float, float]] = {
        "parameters": {k: float(v) for k, v in parameters.items()},
        "MACs": {keep: macs(config, keep) for keep in KEEP},
        "step time": step_seconds(config, arguments.rounds, device),
        "state": {keep: float(state_bytes(config, keep, device)) for keep in KEEP},
        "activations": {keep: needs[keep].activations for keep in KEEP},
        "peak memory": peaks,
    }
    sizes = dict(zip(KEEP, payload_bytes(config), strict=True))
    columns["bytes down"] = {keep: float(size[0]) for keep, size in sizes.items()}
    columns["bytes up"] = {keep: float(size[1]) for keep, size in sizes.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{usable_cores()} cores"
    print(
        f"{arguments.preset}, batch {arguments.batch}, {where}, torch {torch.__version__}, "
        f"{arguments.rounds} rounds; whole network: {parameters[1.0]:,} parameters, "
        f"{columns['MACs'][1.0] / 1e9:.2f} GMAC an image, {columns['step time'][1.0]:.3f} s a "
        f"step, state {columns['state'][1.0] / 1e6:.0f} MB, activations "
        f"{columns['activations'][1.0] / 1e6:.0f} MB, peak {peaks[1.0] / 1e6:.0f} MB\n"
    )
    print("| keep p | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for keep in KEEP:
        ratios = (f"{values[keep] / values[1.0]:.3f}" for values in columns.values())
        print(f"| {keep:g} | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    main()
