"""How a machine computes: its device, threads, precision, deterministic kernels, compilation."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fed_diffusion.config.schema import WorkerConfig

# cuBLAS is deterministic only with workspaces of a fixed size, chosen before its first use
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Run with this many torch threads: part of bit-identity, and far faster than too many."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(worker: WorkerConfig) -> torch.device:
    """The device of worker.device; auto takes CUDA where there is one."""
    name = worker.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def precision_on(worker: WorkerConfig, device: torch.device) -> Literal["fp32", "tf32", "bf16"]:
    """What a network computes in on this device (worker.precision).

    `auto` is bf16 on a GPU with bf16 units, and fp32 on every CPU: bf16 autocast of small networks
    is many times slower there, even where the CPU has instructions for it.
    """
    precision = worker.precision
    if precision == "auto":
        return "bf16" if device.type == "cuda" and computes_bf16(device) else "fp32"
    return precision


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has bf16 units."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in units)


def arithmetic(worker: WorkerConfig, device: torch.device) -> torch.autocast:
    """The autocast context of one call of a network; theta and the loss stay in fp32."""
    bf16 = precision_on(worker, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def kernels(worker: WorkerConfig, device: torch.device) -> Iterator[None]:
    """Forward and backward passes inside use the kernels that worker.* asks for.

    On a GPU, TF32 is off unless worker.precision is tf32 (torch's own default computes
    convolutions in TF32), and with worker.deterministic two runs end with the same bits. On a CPU
    nothing has to be set. What was set before is set again afterwards.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    tf32 = cudnn.allow_tf32, matmul.allow_tf32
    searching = cudnn.benchmark
    strict = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    wanted, exact = precision_on(worker, device) == "tf32", worker.deterministic
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = wanted
        cudnn.benchmark = not exact  # the search for the fastest kernel may end differently
        torch.use_deterministic_algorithms(exact)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = tf32
        cudnn.benchmark = searching
        torch.use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


def compiled(network: nn.Module, backend: str | None = None) -> Callable[..., Tensor]:
    """Return the network, compiled for its shapes, whatever else this process has compiled.

    torch.compile keeps what it has compiled by code object, and after a few entries it silently
    goes on uncompiled; with several network sizes, results would depend on which of them a process
    saw first. So every network gets its own code object, and no dimension is left dynamic.
    """

    def call(x: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        out: Tensor = network(x, u, labels)
        return out

    own = types.FunctionType(
        call.__code__.replace(co_name=f"call_{id(network)}"),
        call.__globals__,
        closure=call.__closure__,
    )
    result: Callable[..., Tensor] = torch.compile(own, dynamic=False, backend=backend or "inductor")
    return result
