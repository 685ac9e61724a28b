"""What a node's warm worker saves: rounds of a deployment with and without it, in turn.

    python -m benchmarks.warm_worker [--rounds 6] [--steps 60]

A SuperLink and two SuperNodes on loopback, two clients, the digits network; each case on nodes of
its own. Seconds are of a round, medians and the range of all but the first; training is what the
clients say of their own. `imports` is the CPU time of importing what a task needs, and of what is
left of it in the process that Flower starts for every message.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.deployment import Deployment

OFF = {"samples": 0, "every": 0, "reference": "none", "denoise": False}
CASES = {
    "a new process for every message": (0, None),
    "the warm worker": (600, None),
    "the same, and SuperExec asks every 0.1 s": (600, "0.1"),
}


def cpu_seconds(code: str) -> float:
    """CPU time of a Python process, the least of three."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def rounds(folder: Path, warm: int, ask: str | None, wanted: int, steps: int) -> list[dict]:
    """The lines of metrics.jsonl of a run, without the first."""
    settings = {f"evaluation.{key}": value for key, value in OFF.items()} | {"local.steps": steps}
    pairs = " ".join(f"{key}={value}" for key, value in settings.items())
    path = folder / "run"
    config = f"preset='digits' clients=2 rounds={wanted} run-dir='{path}' set='{pairs}'"
    with Deployment(folder / "flwr") as flower:
        if ask is not None:
            flower.environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = ask
        for partition in range(2):
            flower.start_node(partition, 2, **{"warm-seconds": warm})
        flower.wait_for_nodes(2)
        printed = flower.run(config, timeout=1800)
    if not (path / "results.json").exists():
        raise SystemExit(printed)
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    whole, thin = (cpu_seconds(f"import client_app.{name}") for name in ("work", "app"))
    print(f"imports: {whole:.2f} s of CPU for a task, {thin:.2f} s in Flower's process\n")
    print("| case | seconds a round | / first | range | training |")
    print("|---|---|---|---|---|")
    first = None
    for case, (warm, ask) in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            lines = rounds(Path(name), warm, ask, arguments.rounds, arguments.steps)
        seconds = [line["seconds"] for line in lines]
        training = statistics.median(c["seconds"] for line in lines for c in line["clients"])
        middle = statistics.median(seconds)
        first = first or middle
        print(
            f"| {case} | {middle:.1f} | {middle / first:.2f} "
            f"| {min(seconds):.1f} to {max(seconds):.1f} | {training:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
