"""pruning.budget auto under real limits: does what a worker picks stay below its cap, and in time?

    python benchmarks/budgets.py [--preset cifar10] [--batch 32] [--steps 2]

1. The whole network's step is taken in a process of its own: its peak above the idle process is
   what a full worker needs.
2. A worker whose process may use half of that (a memory control group where permitted, else
   RLIMIT_DATA) picks a ratio and runs a task of it; its measured peak is stated.
3. Two workers, one with one thread and a busy neighbour on its core, are given one deadline, half
   of what the slow one would need for the whole network; each picks a ratio and runs its task.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.client.budget import demand, seconds_of, training_step
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.compute import pinned_threads
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.config import Config, load_config
from fed_diffusion.data import ImageSet, image_shape
from fed_diffusion.masks.budget import TRAINING_SHARE
from fed_diffusion.protocol.messages import Task
from fed_diffusion.server.coordinator import Coordinator

GROUP = Path("/sys/fs/cgroup/memory/fed-diffusion-budgets")
GROUP_V2 = Path("/sys/fs/cgroup/fed-diffusion-budgets")


def config_of(arguments: argparse.Namespace, **more: Any) -> Config:
    settings = {
        "pruning.kind": "channels",
        "pruning.budget": "auto",
        "clients": 1,
        "local.steps": arguments.steps,
        "local.batch": arguments.batch,
        "data.holdout": 0.0,
        "worker.device": "cpu",
        "worker.threads": usable_cores(),
    }
    return load_config(arguments.preset, settings | more)


def images_for(config: Config) -> ImageSet:
    """Noise in the data set's shape: what memory and time depend on."""
    shape = (config.local.batch, *image_shape(config.data))
    return ImageSet(torch.randint(0, 256, shape, dtype=torch.uint8), None, name="noise")


def warm_up() -> None:
    """A step of a tiny network: what torch imports and allocates for the first one is no demand."""
    config = load_config("digits", {"model.widths": [8], "local.batch": 2})
    setup = Setup.of(config)
    demand(setup, build_network(config).to("meta"))
    training_step(setup, build_network(config), setup.device)()


def whole_step(settings: dict[str, Any]) -> tuple[float, float]:
    """(peak above the idle process, seconds of the second step) of the whole network."""
    config = Config.model_validate(settings)
    warm_up()
    worker = Worker(config, images_for(config))
    with pinned_threads(config.worker.threads), peak_memory(worker.device) as peak:
        step = training_step(worker.setup, build_network(config), worker.device)
        seconds_of(step, worker.device)
        return peak(), seconds_of(step, worker.device)


def limit_memory(cap: float) -> str:
    """Hold this process to `cap` bytes more than it has; says by what means."""
    try:
        if (GROUP.parent / "memory.limit_in_bytes").exists():
            GROUP.mkdir(exist_ok=True)
            (GROUP / "memory.limit_in_bytes").write_text(str(int(cap)))
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))
            return "control group"
        GROUP_V2.mkdir(exist_ok=True)
        (GROUP_V2 / "memory.max").write_text(str(int(cap)))
        (GROUP_V2 / "cgroup.procs").write_text(str(os.getpid()))
        return "control group"
    except OSError:
        data = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (int(data + cap),) * 2)
        return "RLIMIT_DATA"


def task_of(config: Config, keep: float) -> Task:
    """What a server sends to a client that can carry `keep`."""
    server = config.model_copy(
        update={"pruning": config.pruning.model_copy(update={"budget": "level", "keep": keep})}
    )
    coordinator = Coordinator(server, parameters_of(build_network(server)))
    return next(iter(coordinator.tasks(1)))


def limited_worker(settings: dict[str, Any], cap: float) -> dict[str, Any]:
    """Pick a ratio under a real limit, and run a task of it; the kernel kills what exceeds it."""
    config = Config.model_validate(settings)
    warm_up()
    worker = Worker(config, images_for(config))
    tasks = {keep: task_of(config, keep) for keep in config.pruning.ladder}
    how = limit_memory(cap)
    with peak_memory(worker.device) as peak:
        budget = worker.budget()
        worker.run(tasks[budget.keep])
        return {"how": how, "peak": peak(), **budget.to_metrics(), "limit": budget.limit}


def timed_worker(settings: dict[str, Any], busy: bool) -> dict[str, Any]:
    """Pick a ratio for the deadline, run a task of it, say how long its steps took."""
    config = Config.model_validate(settings)
    if busy:  # one core, shared with a process that never rests
        os.sched_setaffinity(0, {0})
        neighbour = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
        neighbour.start()
    worker = Worker(config, images_for(config))
    budget = worker.budget()
    task = task_of(config, budget.keep)
    began = time.perf_counter()
    worker.run(task)
    took = time.perf_counter() - began
    if busy:
        neighbour.kill()
    return {"took": took, **budget.to_metrics(), "limit": budget.limit}


def _spin() -> None:
    while True:
        pass


def alone(function: Any, *arguments: Any) -> Any:
    """Call in a fresh process (not a daemon: it may have a neighbour of its own)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        raise SystemExit(f"{function.__name__} died with exit code {process.exitcode}") from error
    finally:
        process.join()


def _report(sender: Any, function: Any, arguments: tuple) -> None:
    sender.send(function(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    roomy = config_of(arguments, **{"round.deadline_s": 1e6})
    need, seconds = alone(whole_step, roomy.to_dict())
    memory = alone(limited_worker, roomy.to_dict(), need / 2)
    slow = config_of(arguments, **{"worker.threads": 1, "round.deadline_s": 1e6})
    # the slow one has half a core: what its whole network would take, from its own measurement
    pace = alone(timed_worker, slow.to_dict(), True)
    deadline = 0.5 * pace["budget.seconds"] / TRAINING_SHARE
    fast_config = config_of(arguments, **{"round.deadline_s": deadline})
    slow_config = config_of(arguments, **{"worker.threads": 1, "round.deadline_s": deadline})
    timed = {
        "fast": alone(timed_worker, fast_config.to_dict(), False),
        "slow": alone(timed_worker, slow_config.to_dict(), True),
    }
    results = {"need": need, "cap": need / 2, "memory": memory, "deadline": deadline, **timed}
    if arguments.json:
        print(json.dumps(results))
        return
    print(
        f"{arguments.preset}, batch {arguments.batch}, {arguments.steps} steps, {usable_cores()} "
        f"cores, torch {torch.__version__}\n"
        f"whole network: {need / 1e6:.0f} MB above the idle process, {seconds:.2f} s a step\n"
        f"half of that allowed ({memory['how']}): keep {memory['keep']:g} (limit: "
        f"{memory['limit']}), predicted {memory['budget.memory_mb']:.0f} MB, measured "
        f"{memory['peak'] / 1e6:.0f} MB of {need / 2e6:.0f} MB\n"
        f"one deadline of {deadline:.1f} s:"
    )
    for name, worker in timed.items():
        print(
            f"  {name}: keep {worker['keep']:g} (limit: {worker['limit']}), predicted "
            f"{worker['budget.seconds']:.1f} s, took {worker['took']:.1f} s"
        )


if __name__ == "__main__":
    main()
