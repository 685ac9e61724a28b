"""The `speed` part of gpu.py: training steps, sampling and a federated round, in images a second.

What matters most comes first, so that something comparable is there whenever the time ends. A row
that fails (out of memory, a compiler that is missing) says why, and the next one is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.client.budget import demand, sub_network
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.compute import arithmetic, compiled, kernels
from fed_diffusion.config import Config, load_config
from fed_diffusion.data import ImageSet, image_shape, to_unit
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.generate import Sampler
from fed_diffusion.models.unet import reset
from fed_diffusion.server.coordinator import Coordinator

if TYPE_CHECKING:
    from gpu_record import Record

LEAST_S = 1.0
"""A row of a GPU is measured over at least this long; on a CPU a call is enough to see it work."""


@dataclass(frozen=True)
class Setting:
    """One way to take a training step."""

    precision: str = "bf16"
    keep: float = 1.0
    batch: int = 256
    channels_last: bool = True
    compile: bool = False
    graph: bool = False
    deterministic: bool = False

    @property
    def name(self) -> str:
        words = [f"step, keep {self.keep:g}", self.precision, f"batch {self.batch}"]
        words += [] if self.channels_last else ["contiguous"]
        words += ["compiled"] if self.compile else []
        words += ["CUDA graph"] if self.graph else []
        words += ["deterministic"] if self.deterministic else []
        return ", ".join(words)


def settings(config: Config, **overrides: object) -> Config:
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("cifar10", base(config) | given)


def base(config: Config) -> dict[str, object]:
    """What every row has in common: the network's size and the device."""
    model = config.model
    size = {"model.widths": list(model.widths), "model.group": model.group}
    size["model.blocks"] = model.blocks
    return size | {"worker.device": config.worker.device}


def speed(record: Record, device: torch.device, tiny: bool) -> None:
    config = load_config("cifar10", {"worker.device": device.type})
    if tiny:
        config = settings(config, model__widths=[8, 16], model__group=4, model__blocks=1)
    batch = 2 if tiny else 256
    rates = {p: matrix_rate(p, device, 256 if tiny else 8192) for p in ("fp32", "tf32", "bf16")}
    for precision, rate in rates.items():
        record.add(f"matrix product, {precision}", tflops=rate / 1e12)
    plans = list(plan(batch, device, tiny))
    first, rest = plans[:4], plans[4:]
    for chosen in first:
        attempt(record, chosen.name, lambda c=chosen: step_row(config, c, device, rates))
    for precision in ("fp32", "bf16"):
        attempt(
            record,
            f"diffusers UNet2DModel, {precision}, batch {batch}",
            lambda p=precision: diffusers_row(config, p, batch, device),
        )
    attempt(record, "sampling", lambda: sampling_row(config, device, 4 if tiny else 1024))
    for kind, row in round_rows(config, device, tiny).items():
        attempt(record, kind, row)
    small = load_config("cifar10-small", {"worker.device": device.type})
    for chosen in () if tiny else small_plan(device):
        name = f"cifar10-small: {chosen.name}"
        attempt(record, name, lambda c=chosen: step_row(small, c, device, rates))
    for chosen in rest:
        attempt(record, chosen.name, lambda c=chosen: step_row(config, c, device, rates))


def plan(batch: int, device: torch.device, tiny: bool) -> Iterator[Setting]:
    """The training steps, what matters most first."""
    yield Setting("fp32", batch=batch)
    yield Setting("bf16", batch=batch)
    yield Setting("fp32", 0.25, batch)
    if tiny:
        return
    yield Setting("bf16", batch=batch, deterministic=True)
    yield Setting("tf32", batch=batch)
    yield Setting("bf16", batch=batch, channels_last=False)
    for keep in (0.5, 0.25):
        yield Setting("bf16", keep, batch)
    for size in (128, 512, 1024):
        yield Setting("bf16", batch=size)
    if device.type == "cuda":
        yield Setting("bf16", batch=batch, graph=True)
        for keep in (1.0, 0.5, 0.25):  # each takes a minute to compile
            yield Setting("bf16", keep, batch, compile=True)


def small_plan(device: torch.device) -> Iterator[Setting]:
    """Steps of a network of a million parameters, where launching takes longer than computing."""
    for precision in ("fp32", "bf16"):
        yield Setting(precision, batch=64, deterministic=True)
    if device.type == "cuda":
        yield Setting("bf16", batch=64, graph=True)


def attempt(record: Record, name: str, row: Callable[[], dict[str, float]]) -> None:
    """Measure a row unless the time is over; what fails is a row that says why."""
    if record.left() < 5:
        record.say(f"{name}: no time is left for it")
        return
    try:
        record.add(name, **row())
    except Exception as error:  # the next row is worth having
        record.add(name, why=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def seconds_per(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU over calls that take `LEAST_S` together, after three."""

    def calls(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    if device.type != "cuda":
        return calls(1)
    count = max(1, min(200, int(LEAST_S / max(calls(3) / 3, 1e-4))))
    return calls(count) / count


def matrix_rate(precision: str, device: torch.device, n: int) -> float:
    """Floating-point operations a second of a large square product: what the card can do."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn((n, n), device=device).to(dtype) for _ in range(2))
    config = load_config("cifar10", {"worker.precision": precision, "worker.device": device.type})
    with kernels(config.worker, device):
        return 2 * n**3 / seconds_per(lambda: a @ b, device)


def step_row(
    config: Config, chosen: Setting, device: torch.device, rates: dict[str, float]
) -> dict[str, float]:
    wanted = settings(
        config,
        pruning__kind="channels",
        pruning__keep=chosen.keep,
        local__batch=chosen.batch,
        worker__precision=chosen.precision,
        worker__deterministic=chosen.deterministic,
    )
    setup = Setup.of(wanted)
    whole, layout = setup.skeleton, setup.layout
    network = reset(sub_network(whole, layout, chosen.keep, device))
    step = training_step(wanted, network, chosen, device)
    with kernels(wanted.worker, device), peak_memory(device) as peak:
        seconds = seconds_per(graphed(step, device) if chosen.graph else step, device)
        work = 2 * demand(setup, sub_network(whole, layout, chosen.keep, "meta")).work
        found = {
            "images/s": chosen.batch / seconds,
            "ms": 1e3 * seconds,
            "of matrix rate": work / seconds / rates[chosen.precision],
        }
        return found | ({"GB": peak() / 1e9} if device.type == "cuda" else {})


def training_step(
    config: Config, network: nn.Module, chosen: Setting, device: torch.device
) -> Callable[[], None]:
    """Batch, loss, gradients and Adam, as a worker does them, on images that lie on the device."""
    if chosen.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network.train()
    call = compiled(network) if chosen.compile else network
    capturable = chosen.graph and device.type == "cuda"
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True, capturable=capturable)
    loss, data = loss_of(config), noise_images(config, 4 * chosen.batch, device)
    draw = torch.Generator(device).manual_seed(0)
    if chosen.graph and device.type == "cuda":
        draw = torch.cuda.default_generators[device.index or 0]  # graphs advance this one
    index = torch.arange(chosen.batch, device=device)

    def forward(x: torch.Tensor, u: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        with arithmetic(config.worker, device):
            return call(x, u, labels).float()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(forward, to_unit(data[index]), draw).backward()
        optimizer.step()

    return step


def graphed(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step recorded once as a CUDA graph: one launch in place of some thousand."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def loss_of(config: Config) -> DSMLoss:
    diffusion = config.diffusion
    return DSMLoss(PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K))


def noise_images(config: Config, n: int, device: torch.device | str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    shape = (n, *image_shape(config.data))
    return torch.randint(256, shape, generator=draw, dtype=torch.uint8).to(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function: the most bytes allocated on the card meanwhile; 0 on a CPU."""
    if device.type != "cuda":
        yield lambda: 0.0
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: float(torch.cuda.max_memory_allocated(device))


def diffusers_row(
    config: Config, precision: str, batch: int, device: torch.device
) -> dict[str, float]:
    """diffusers' U-Net of the same widths, blocks and image size, in the same loop."""
    from diffusers import UNet2DModel

    widths, levels = config.model.widths, len(config.model.widths)
    network = UNet2DModel(
        sample_size=image_shape(config.data)[1],
        in_channels=3,
        out_channels=3,
        layers_per_block=config.model.blocks,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        add_attention=False,
        norm_num_groups=16,
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    wanted = settings(config, worker__precision=precision, worker__deterministic=False)
    data = noise_images(config, batch, device)
    draw = torch.Generator(device).manual_seed(0)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        x = to_unit(data)
        eps = torch.randn(x.shape, generator=draw, device=device)
        j = torch.randint(1000, (batch,), generator=draw, device=device)
        a = alphas[j][:, None, None, None]
        with arithmetic(wanted.worker, device):
            out = network(a.sqrt() * x + (1 - a).sqrt() * eps, j).sample
        (out.float() - eps).square().mean().backward()
        optimizer.step()

    with kernels(wanted.worker, device):
        seconds = seconds_per(step, device)
    parameters = sum(p.numel() for p in network.parameters())
    return {"images/s": batch / seconds, "ms": 1e3 * seconds, "M parameters": parameters / 1e6}


def sampling_row(config: Config, device: torch.device, n: int) -> dict[str, float]:
    wanted = settings(
        config, evaluation__steps=20, evaluation__sampler="second_order_sde", evaluation__batch=n
    )
    sampler = Sampler(wanted, parameters_of(build_network(wanted)))
    seconds = seconds_per(lambda: sampler.sample(n), device)
    return {"images/s": n / seconds, "evaluations": 20.0}


def round_rows(
    config: Config, device: torch.device, tiny: bool
) -> dict[str, Callable[[], dict[str, float]]]:
    """A federated round of ten clients, and a bare loop of the same steps in turn with it."""
    steps, batch = (1, 2) if tiny else (20, 128)
    federated = settings(
        config, local__steps=steps, local__batch=batch, clients=10, theory__every=0
    )
    times: dict[str, float] = {}

    def bare() -> dict[str, float]:
        times["bare"] = bare_round(federated, device)
        images = 10 * steps * batch
        return {"seconds": times["bare"], "images/s": images / times["bare"]}

    def whole(method: str) -> dict[str, float]:
        wanted = settings(
            federated,
            method=method,
            clients=10,
            local__steps=steps,
            local__batch=batch,
            theory__every=0,
        )
        found = federated_round(wanted, device)
        if "bare" in times:
            found["of bare"] = found["seconds"] / times["bare"]
        return found

    names = {"FedDM-F": "a round, F", "T-FedDM-S": "a round, T-S", "C-FedDM-S": "a round, C-S"}
    rows: dict[str, Callable[[], dict[str, float]]] = {"a bare loop of a round's steps": bare}
    for method, name in names.items():
        rows[name] = lambda m=method: whole(m)  # type: ignore[misc]
    return rows


def bare_round(config: Config, device: torch.device) -> float:
    """The steps of ten clients and nothing else; the least of three rounds."""
    network = build_network(config).to(device)
    chosen = Setting(batch=config.local.batch)
    step = training_step(config, network, chosen, device)
    taken = []
    with kernels(config.worker, device):
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(10 * (config.local.steps or 0)):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
    return min(taken)


def federated_round(config: Config, device: torch.device) -> dict[str, float]:
    """Where a round's time goes: tasks made, clients run, updates taken, the round closed."""
    images = ImageSet(
        noise_images(config, 50_000 if device.type == "cuda" else 200, "cpu"),
        None,
    )
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, images)
    best: dict[str, float] = {}
    for round in (1, 2, 3):
        parts = {"tasks": 0.0, "clients": 0.0, "receive": 0.0, "close": 0.0}
        began = time.perf_counter()

        def since(part: str, start: float, parts: dict[str, float] = parts) -> float:
            now = time.perf_counter()
            parts[part] += now - start
            return now

        start = began
        for task in coordinator.tasks(round):
            start = since("tasks", start)
            update = worker.run(task)
            start = since("clients", start)
            assert coordinator.receive(update), coordinator
            start = since("receive", start)
        since("tasks", start)
        start = time.perf_counter()
        coordinator.close_round()
        since("close", start)
        found = {"seconds": time.perf_counter() - began} | parts
        if not best or found["seconds"] < best["seconds"]:
            best = found
    return best
