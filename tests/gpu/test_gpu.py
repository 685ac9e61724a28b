"""What must hold on a GPU. Elsewhere the same tests compare the CPU with itself.

Tolerances: in fp32 a GPU adds in another order than the CPU, so a loss agrees to 1e-5 relative and
a gradient to 1e-3 of its largest entry (the sums of convolutions have some 10^5 terms).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.compute import compiled, kernels, precision_on
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import kappa_minimal
from fed_diffusion.diffusion.samplers import SAMPLERS
from fed_diffusion.engines.local import run_in_process
from fed_diffusion.experiment import Experiment
from fed_diffusion.masks.mask import Scattered
from fed_diffusion.masks.subnetwork import extract, scatter
from fed_diffusion.server.coordinator import Coordinator

pytestmark = pytest.mark.gpu
U = kappa_minimal(4.13, 1e-3, 50)


def network_on(config, device, seed=1):
    """A network whose parameters are all drawn, so that no branch of it is zero."""
    network = build_network(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:  # small enough that fp32 keeps its digits through the layers
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / fan**0.5)
    return network.to(device)


def batch_on(device, n=8):
    draw = torch.Generator().manual_seed(2)
    x = torch.randn((n, 3, 32, 32), generator=draw)
    eps = torch.randn((n, 3, 32, 32), generator=draw)
    u = U[torch.randint(50, (n,), generator=draw)]
    labels = torch.randint(10, (n,), generator=draw)
    return [t.to(device) for t in (x, eps, u, labels)]


def loss_and_gradients(network, device):
    x, eps, u, labels = batch_on(device)
    dtype = next(network.parameters()).dtype
    x, eps = x.to(dtype), eps.to(dtype)
    loss = (network(x, u, labels) - eps).square().mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return loss.detach().cpu(), [gradient.cpu() for gradient in gradients]


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def test_loss_and_gradients_are_the_cpus(config, device):
    with kernels(config().worker, device):
        loss, gradients = loss_and_gradients(network_on(config(), device), device)
    expected, exact = loss_and_gradients(network_on(config(), torch.device("cpu")), "cpu")
    assert relative(loss, expected) < 1e-5
    largest = max(float(gradient.abs().max()) for gradient in exact)
    for found, wanted in zip(gradients, exact, strict=True):
        assert float((found - wanted).abs().max()) < 1e-3 * largest


def test_fp32_is_fp32_and_tf32_is_not(config, device):
    exact = loss_and_gradients(network_on(config(), torch.device("cpu")).double(), "cpu")[1]
    found = {}
    for precision in ("fp32", "tf32"):
        with kernels(config(worker__precision=precision).worker, device):
            gradients = loss_and_gradients(network_on(config(), device), device)[1]
        errors = [float((g - e).abs().max()) for g, e in zip(gradients, exact, strict=True)]
        found[precision] = max(errors) / max(float(e.abs().max()) for e in exact)
    assert found["fp32"] < 1e-4
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        assert found["tf32"] > 3 * found["fp32"]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_end_with_the_cpus_images(config, device, name):
    results = []
    for where in (torch.device("cpu"), device):
        network = network_on(config(), where).eval()
        noise = torch.Generator().manual_seed(5)
        y = torch.randn((2, 3, 32, 32), generator=noise).to(where)

        def score(y, u, network=network):
            labels = torch.zeros(len(y), dtype=torch.int64, device=y.device)
            return (
                -network(y, u, labels) / torch.sqrt(-torch.expm1(-2 * u)).to(y)[:, None, None, None]
            )

        u = kappa_minimal(4.13, 1e-2, 12)
        with torch.no_grad(), kernels(config().worker, where):
            # the noise of a step is the device's own; without it the path is a function of y
            deterministic = name in ("probability_flow", "second_order")
            stream = torch.Generator(where).manual_seed(0)
            end = SAMPLERS[name](score, y, u, generator=stream, denoise=True)
        assert bool(torch.isfinite(end).all())
        results.append(end.cpu())
    if deterministic or device.type == "cpu":
        assert relative(results[1], results[0]) < 1e-3


def test_the_masked_whole_is_the_small_network(config, device):
    settings = config(pruning__kind="channels", pruning__keep=0.5)
    network = network_on(settings, device)
    layout = Setup.of(settings).layout
    counts = layout.counts(0.5)
    channels = {space: tuple(range(kept)) for space, kept in counts.items()}
    blocks = layout.blocks(channels)
    whole = {n: p.detach() for n, p in network.named_parameters()}
    zeros = {name: torch.zeros_like(value) for name, value in whole.items()}
    small = extract(network, channels).to(device)
    kept = scatter(parameters_of(small), channels, zeros, network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(kept[name])
    with kernels(settings.worker, device):
        loss, gradients = loss_and_gradients(network, device)
        small_loss, small_gradients = loss_and_gradients(small, device)
    assert relative(small_loss, loss) < 1e-5
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for name, found, wanted in zip(whole, small_gradients, gradients, strict=True):
        part = blocks[name].take(wanted) if name in blocks else wanted
        assert float((found - part).abs().max()) < 1e-3 * largest


def test_the_exact_mean_takes_tensors_from_the_device(device):
    draw = torch.Generator().manual_seed(3)
    theta = {"w": torch.zeros(1000)}
    values = [torch.randn(1000, generator=draw) for _ in range(3)]
    masks = [torch.rand(1000, generator=draw) < 0.5 for _ in range(3)]
    here, there = MaskedMean(theta), MaskedMean(theta)
    for value, mask in zip(values, masks, strict=True):
        here.add({"w": Scattered(mask).take(value)}, {"w": Scattered(mask)})
        kept = Scattered(mask).take(value).to(device)
        there.add({"w": kept}, {"w": Scattered(mask.to(device))})
    assert torch.equal(here.result()["w"], there.result()["w"])


def trained(settings, images, rounds=1):
    """Theta after some rounds, and the last one's loss."""
    coordinator = Coordinator(settings, parameters_of(build_network(settings)))
    worker = Worker(settings, images)
    for round in range(1, rounds + 1):
        for task in coordinator.tasks(round):
            assert coordinator.receive(worker.run(task))
        loss = coordinator.close_round().loss
    return coordinator.theta, loss


KINDS = {
    "whole networks": {"method": "FedDM-F"},
    "top-k masks": {"method": "T-FedDM-S"},
    "smaller networks": {"method": "C-FedDM-S"},
    "balanced by magnitude": {"pruning__kind": "balanced", "pruning__by": "magnitude"},
    "shared moments": {"local__state": "shared", "wire__state": "int4", "wire__up": "int8"},
    "checkpointing": {"worker__checkpointing": True, "model__dropout": 0.1},
    "bf16": {"worker__precision": "bf16"},
    "theory": {"theory__every": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal_to_the_bit_with_deterministic_kernels(config, images, kind):
    first, second = (trained(config(**KINDS[kind]), images, rounds=2)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointing_changes_no_bit_and_keeps_less(config, images, device):
    found, needed = [], []
    for checkpointing in (False, True):
        settings = config(worker__checkpointing=checkpointing, local__batch=32, clients=1)
        coordinator = Coordinator(settings, parameters_of(build_network(settings)))
        worker = Worker(settings, images)
        task = next(iter(coordinator.tasks(1)))
        needed.append(peak(device, lambda task=task, worker=worker: worker.run(task)))
        coordinator.receive(worker.run(task))
        coordinator.close_round()
        found.append(coordinator.theta)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert needed[1] < needed[0]


def test_bf16_trains_an_fp32_theta_to_nearly_the_same_loss(config, images):
    _, exact = trained(config(), images)
    theta, rounded = trained(config(worker__precision="bf16"), images)
    assert all(value.dtype == torch.float32 for value in theta.values())
    assert rounded == pytest.approx(exact, rel=0.02)


def test_auto_is_bf16_on_a_gpu_that_has_it_and_fp32_on_a_cpu(config, device):
    assert precision_on(config(worker__precision="auto").worker, torch.device("cpu")) == "fp32"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        assert precision_on(config(worker__precision="auto").worker, device) == "bf16"


class HostReads(TorchDispatchMode):
    """Counts the operations for which a host waits for its device."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["FedDM-F", "T-FedDM-S-prox", "C-FedDM-S"])
def test_the_host_waits_as_often_in_a_long_round_as_in_a_short_one(config, images, device, method):
    """No step reads a value back: the number of waits does not grow with the number of steps."""
    waits = []
    for steps in (2, 5):
        settings = config(
            method=method, local__steps=steps, data__holdout=0.0, data__flip=True, clients=10
        )
        coordinator = Coordinator(settings, parameters_of(build_network(settings)))
        worker = Worker(settings, images)
        task = list(coordinator.tasks(1))[-1]
        worker.run(task)  # the first run builds networks and tables
        with HostReads() as mode:
            worker.run(task)
        waits.append(len(mode.found))
        if device.type == "cuda":
            waits[-1] += synchronisations(worker, task)
    assert waits[0] == waits[1]


def synchronisations(worker, task) -> int:
    """Calls by which the CUDA runtime has the host wait, by the profiler."""
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        worker.run(task)
    return sum(event.count for event in profile.key_averages() if event.key in names)


def test_three_network_sizes_are_each_compiled_for_themselves(config, device):
    """Compiled networks compute what the plain ones do, none falls back, whatever came before."""
    settings = config(pruning__kind="channels", pruning__keep=0.5)
    layout = Setup.of(settings).layout
    whole = network_on(settings, device)
    backend = None if device.type == "cuda" else "aot_eager"  # a CPU has no use for inductor here
    x, _, u, labels = batch_on(device, 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for keep in (1.0, 0.75, 0.5):
        counts = layout.counts(keep)
        network = extract(whole, {space: tuple(range(n)) for space, n in counts.items()})
        network = network.to(device)
        plain = network(x, u, labels)
        fast = compiled(network, backend=backend)(x, u, labels)
        assert relative(fast.detach(), plain.detach()) < 1e-4
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 3
    assert not counters["recompile_limit"]
    assert not counters["cache_size_limit"]


def peak(device, run) -> float:
    """Bytes on the device above what was there before; on a CPU what autograd keeps at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        idle = torch.cuda.memory_allocated(device)
        run()
        return float(torch.cuda.max_memory_allocated(device) - idle)
    live = highest = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal live, highest
            self.tensor, self.size = tensor, tensor.nbytes
            live += self.size
            highest = max(highest, live)

        def __del__(self):
            nonlocal live
            live -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return float(highest)


def test_a_diagnostic_round_needs_little_more_memory_than_a_training_step(config, images, device):
    """The measurements of Theorem 4.11 in the first round, against a later round without them."""
    settings = config(theory__every=None, rounds=3, clients=1, local__batch=16)
    coordinator = Coordinator(settings, parameters_of(build_network(settings)))
    worker = Worker(settings, images)
    needed = []
    for round in (1, 2):
        task = next(iter(coordinator.tasks(round)))
        updates = []
        needed.append(peak(device, lambda task=task, kept=updates: kept.append(worker.run(task))))
        coordinator.receive(updates[0])
        coordinator.close_round()
    assert needed[0] < 1.5 * needed[1]


def test_a_run_goes_from_digits_to_figures(tmp_path):
    from fed_diffusion.config import load_config

    tiny = {
        "model.widths": [8, 16],
        "rounds": 2,
        "local.steps": 3,
        "evaluation.samples": 40,
        "evaluation.steps": 10,
        "theory.every": 0,
    }
    results = run_in_process(Experiment(load_config("digits", tiny), tmp_path / "run"), processes=1)
    assert results["rounds"] == 2
    assert results["quality"]["fid"] > 0
    assert (tmp_path / "run" / "samples" / "final.png").is_file()


def test_times_on_the_device_are_those_of_the_partition(device):
    loss = DSMLoss(U)
    drawn = loss.draw_times(64, torch.Generator(device).manual_seed(0))
    assert drawn.device.type == device.type
    assert bool(torch.isin(drawn.cpu(), U[:-1]).all())
    ordered = drawn.sort(descending=True).values.tolist()
    assert all(a >= b for a, b in itertools.pairwise(ordered))
