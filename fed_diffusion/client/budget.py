"""With pruning.budget = auto a worker measures what it can carry, once a run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fed_diffusion.build import Setup
from fed_diffusion.client.optimisers import Adam
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.masks.budget import (
    BYTES_PER_PARAMETER,
    MB,
    Budget,
    Demand,
    Probe,
    choose,
    expected_memory,
    memory_allowed,
)
from fed_diffusion.masks.subnetwork import sub_network
from fed_diffusion.models.checkpointing import checkpointed
from fed_diffusion.models.unet import Stage, UNet, reset
from fed_diffusion.protocol.moments import is_shared
from fed_diffusion.theory.curvature import gradient, images_within, saved_bytes

STEPS = 3
"""The number of steps of a probe; the median counts, so that the first one is warm-up."""
DIAGNOSTIC_BYTES = 24
"""The bytes for each parameter where a curvature is measured.

These are six float32: the value, the value as it arrived, the vector, its product, and the gradient
and the product of the part in hand.
"""
MOMENT_BYTES = 8
"""The bytes for each parameter whose moments come with the task: both, as they arrived."""


def measure_budget(setup: Setup, steps: int) -> Budget:
    """The largest ratio of pruning.ladder that this machine can carry.

    Only the two smallest sub-networks are run, a few steps each, on blank images.

    Parameters
    ----------
    setup
        Of a run with the built-in U-Net and masks of whole channels.
    steps
        Local steps of a round.

    Raises
    ------
    BudgetError
        Not even the smallest ratio fits.
    """
    config, device = setup.config, setup.device
    whole, layout = setup.skeleton, setup.layout
    assert isinstance(whole, UNet)
    assert layout is not None
    ladder = sorted(set(config.pruning.ladder))
    demands = {
        keep: demand(setup, sub_network(whole, layout, keep, "meta"), measures=keep == 1)
        for keep in ladder
    }
    allowed = memory_allowed(config.worker.memory_mb)
    if device.type == "cuda":
        allowed = _cuda_memory_allowed(config.worker.memory_mb, device)
    with peak_memory(device) as peak:
        probes: dict[float, Probe] = {}
        for keep in ladder[:2]:
            # a probe must not itself take more than there is
            if expected_memory(demands, probes, keep) > allowed:
                break
            network = reset(sub_network(whole, layout, keep, device))
            step = training_step(setup, network, device)
            seconds = sorted(seconds_of(step, device) for _ in range(STEPS))
            probes[keep] = Probe(peak(), seconds[STEPS // 2])
            del network, step
    return choose(demands, probes, allowed, steps, config.round.longest())


def demand(setup: Setup, network: UNet, measures: bool = False) -> Demand:
    """What a training step needs by its shapes: nothing is computed, the network is on meta.

    Parameters
    ----------
    measures
        Diagnostic rounds are among the worker's: then it is the more of a step and a measurement.
        Only workers with the whole network are asked.
    """
    from torch.utils.flop_counter import FlopCounterMode  # triton's import is slow

    images, u, labels = _batch(setup, torch.device("meta"))
    own = list(network.parameters())
    again = setup.config.worker.checkpointing
    with (
        checkpointed(network, again),
        FlopCounterMode(display=False) as flops,
        saved_bytes(own) as kept,
    ):
        network(images, u, labels).square().mean().backward()
    bytes_each, activations = BYTES_PER_PARAMETER, kept()
    if again:
        whole, largest = _kept_of(network, images, u, labels)
        activations += largest
    if is_shared(setup.config.local):
        bytes_each += MOMENT_BYTES
    if measures and setup.config.diagnostic_rounds():
        bytes_each = max(bytes_each, DIAGNOSTIC_BYTES)
        one = None if labels is None else labels[:1]
        with saved_bytes(own) as kept, sdpa_kernel(SDPBackend.MATH):
            loss = network(images[:1], u[:1], one).square().mean()
            gradient(own, loss, create_graph=True)
        if again:
            activations = whole  # what measures keeps everything
        at_once = images_within(activations, kept(), len(images))
        activations = max(activations, at_once * kept())
    return Demand(
        parameters=bytes_each * sum(p.numel() for p in own),
        activations=activations,
        work=flops.get_total_flops() / 2,
    )


def _kept_of(network: UNet, images: Tensor, u: Tensor, labels: Tensor | None) -> tuple[int, int]:
    """The bytes that autograd keeps of a step, and those of the stage of which it keeps most."""
    before, most = 0, 0
    with saved_bytes(list(network.parameters())) as kept:

        def enter(*_: object) -> None:
            nonlocal before
            before = kept()

        def leave(*_: object) -> None:
            nonlocal most
            most = max(most, kept() - before)

        stages = [module for module in network.modules() if isinstance(module, Stage)]
        hooks = [stage.register_forward_pre_hook(enter) for stage in stages]
        hooks += [stage.register_forward_hook(leave) for stage in stages]
        network(images, u, labels)
    for hook in hooks:
        hook.remove()
    return kept(), most


def training_step(setup: Setup, network: nn.Module, device: torch.device) -> Callable[[], None]:
    """A function that takes one local step, on blank images, as a worker does on its own."""
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = Adam(network.parameters(), setup.config.local.eta)
    noise = torch.Generator(device).manual_seed(0)
    images, _, labels = _batch(setup, device)

    def step() -> None:
        optimizer.zero_grad()
        with checkpointed(network, setup.config.worker.checkpointing):
            setup.loss(network, images, noise, labels).backward()
        optimizer.step()

    return step


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _batch(setup: Setup, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    n = setup.config.local.batch
    images = torch.zeros((n, *setup.shape), device=device)
    u = torch.ones(n, dtype=torch.float64, device=device)
    labels = torch.zeros(n, dtype=torch.int64, device=device) if setup.classes else None
    return images, u, labels


def _cuda_memory_allowed(stated: float | None, device: torch.device) -> float:
    free = float(torch.cuda.mem_get_info(device)[0])
    return free if stated is None else min(free, stated * MB)
