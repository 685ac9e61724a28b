"""A thousand virtual clients on one machine: the server's memory over the rounds, and its pace.

    python benchmarks/scale.py [--clients 1000] [--rounds 30] [--per-round 20 200]

Runs a small U-Net on digits on Flower's Ray engine, a part of the clients each round. The server is
the process that holds the ServerApp (and Ray's driver); its resident memory is looked at twice a
second and stated as the median over each third of the rounds. Rounds per minute leave out the first
round, which waits for Ray.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import load_config
from fed_diffusion.engines.flower import run_on_flower


def server_memory() -> float | None:
    """Resident bytes of the process with the ServerApp, which this process has started."""
    for child in psutil.Process().children(recursive=True):
        try:
            # the oldest of the family: Ray's workers carry its name for a moment
            if any(part.endswith("flwr-simulation") for part in child.cmdline()):
                return float(child.memory_info().rss)
        except psutil.Error:
            continue
    return None


def run(clients: int, per_round: int, rounds: int, out: Path) -> str:
    settings = {
        "clients": clients,
        "rounds": rounds,
        "round.fraction": per_round / clients,
        "model.widths": [32, 64],
        "local.steps": 2,
        "local.state": "fresh",
        "data.holdout": 0.0,
        "evaluation.samples": 0,
        "evaluation.every": 0,
        "evaluation.grid": 1,
        "flower.supernodes": clients,
    }
    config = load_config("digits", settings)
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            memory = server_memory()
            if memory is not None:
                seen.append((time.monotonic(), memory))

    watcher = threading.Thread(target=look)
    watcher.start()
    ends: list[float] = []
    began = time.monotonic()
    run_on_flower(config, out, progress=lambda line: ends.append(time.monotonic()))
    total = time.monotonic() - began
    done.set()
    watcher.join()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert all(len(line["clients"]) == per_round for line in lines)
    third = len(ends) // 3
    spans = [(ends[i * third], ends[min((i + 1) * third, len(ends) - 1)]) for i in range(3)]
    medians = [
        statistics.median([m for t, m in seen if first <= t <= last] or [float("nan")]) / 1e6
        for first, last in spans
    ]
    pace = 60 * (len(ends) - 1) / (ends[-1] - ends[0])
    memory = ", ".join(f"{value:.0f}" for value in medians)
    return f"| {clients} | {per_round} | {rounds} | {pace:.1f} | {memory} | {total:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--per-round", type=int, nargs="+", default=[20, 200])
    arguments = parser.parse_args()
    print(f"{usable_cores()} cores, torch {torch.__version__}, seed 0\n")
    print("| clients | per round | rounds | rounds / min | server MB, by thirds | seconds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for per_round in arguments.per_round:
            out = Path(folder) / str(per_round)
            print(run(arguments.clients, per_round, arguments.rounds, out), flush=True)


if __name__ == "__main__":
    main()
