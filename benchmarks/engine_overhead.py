"""What the method costs beside its arithmetic: a round in each engine against a bare loop.

    python benchmarks/engine_overhead.py [--preset digits] [--rounds 8] [--no-flower]

The bare loop takes the same optimiser steps on the same network, batch size and loss, with the same
threads and as many clients at once, and does nothing else: no masks, no wire, no aggregation, no
held-out loss. Rounds of the bare loop and of `simulate` alternate in one process pool each; Flower
runs between two batches of bare rounds. Medians; the first round of everything is warm-up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fed_diffusion.build import build_network
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config, load_config, parse_pairs
from fed_diffusion.data import ImageSet, load_dataset, to_unit
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.engines.flower import run_on_flower
from fed_diffusion.engines.pool import task_runner
from fed_diffusion.experiment import Experiment
from fed_diffusion.protocol.messages import Update

_bare: tuple[Config, torch.nn.Module, ImageSet] | None = None


def start_bare(settings: dict) -> None:
    global _bare
    config = Config.model_validate(settings)
    torch.set_num_threads(config.worker.threads)
    network = build_network(config).to(memory_format=torch.channels_last)
    _bare = config, network, load_dataset(config.data)


def bare_client(client: int) -> float:
    """One client's local steps, and nothing else."""
    assert _bare is not None
    config, network, dataset = _bare
    diffusion = config.diffusion
    loss = DSMLoss(PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K))
    optimizer = torch.optim.Adam(network.parameters(), lr=config.local.eta, fused=True)
    noise = torch.Generator().manual_seed(client)
    for _ in range(config.local.steps or 1):
        batch = torch.randint(len(dataset), (config.local.batch,), generator=noise)
        labels = dataset.labels[batch] if config.model.conditional else None
        optimizer.zero_grad(set_to_none=True)
        loss(network, to_unit(dataset.images[batch]), noise, labels).backward()
        optimizer.step()
    return client


def bare_round(pool: ProcessPoolExecutor, clients: int) -> float:
    began = time.perf_counter()
    list(pool.map(bare_client, range(clients)))
    return time.perf_counter() - began


def simulated_round(experiment: Experiment, run, round: int) -> float:
    began = time.perf_counter()
    for task, outcome in run(experiment.tasks(round)):
        assert isinstance(outcome, Update), (task.client, outcome)
        experiment.receive(outcome)
    experiment.close_round()
    return time.perf_counter() - began


def flower_rounds(config: Config, out: Path) -> list[float]:
    run_on_flower(config, out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--no-flower", action="store_true")
    arguments = parser.parse_args()
    quiet = {"rounds": arguments.rounds + 1, "evaluation.samples": 0, "evaluation.every": 0}
    config = load_config(arguments.preset, parse_pairs(arguments.set) | quiet)
    atonce = max(1, usable_cores() // config.worker.threads)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(atonce, context, start_bare, (config.to_dict(),)) as pool,
    ):
        experiment = Experiment(config, Path(folder) / "local")
        bare, simulated = [], []
        with task_runner(config, experiment.dataset, atonce) as run:
            for round in range(1, config.rounds + 1):
                bare.append(bare_round(pool, config.clients))
                simulated.append(simulated_round(experiment, run, round))
        flower = [] if arguments.no_flower else flower_rounds(config, Path(folder) / "flower")
        bare += [bare_round(pool, config.clients) for _ in range(len(flower) // 2)]
    report(config, atonce, {"bare": bare[1:], "simulate": simulated[1:], "flower": flower})


def report(config: Config, atonce: int, seconds: dict[str, list[float]]) -> None:
    print(
        f"{config.preset}: {config.clients} clients, {atonce} at once, {config.local.steps} steps "
        f"of batch {config.local.batch}, seed {config.seed}; {platform.processor() or 'CPU'}, "
        f"{usable_cores()} cores, torch {torch.__version__}"
    )
    base = statistics.median(seconds["bare"])
    for name, values in seconds.items():
        if values:
            median = statistics.median(values)
            spread = f"{min(values):.2f} to {max(values):.2f}"
            print(
                f"{name:>9}: {median:6.2f} s a round ({spread}, n = {len(values)}), "
                f"{median / base:.3f} x bare"
            )


if __name__ == "__main__":
    main()
