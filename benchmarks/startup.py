"""What a command takes beside its work: seconds until the first round is done, in all, and of CPU.

    python benchmarks/startup.py [--checkout PATH ...] [--repeats 3] [--no-flower]

Cases: `--help`; a run of one step (the preset digits, ten clients, one round) in process and on
Flower; a sample of 16 of its digits. Each command is a process of its own, and checkouts take
turns. The first turn is warm-up, since it compiles Python's files; medians of the others. The first
round is done when its line stands in metrics.jsonl. CPU seconds are of all processes that came of
the command: this one adopts those whose parents end, which takes Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fed_diffusion.common.hardware import usable_cores

SUBREAPER = 36
"""The number of PR_SET_CHILD_SUBREAPER, by which orphans among the descendants come here."""
ONE_STEP = ["rounds=1", "local.steps=1", "evaluation.samples=0", "evaluation.grid=16"]
Seconds = tuple[float | None, float, float]
"""Seconds until the first round is done, until the command ends, and of CPU."""


def timed(checkout: Path, words: list[str], run: Path | None = None) -> Seconds:
    """Run a command of a checkout."""
    lines = None if run is None else run / "metrics.jsonl"
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    environment.pop("OMP_NUM_THREADS", None)
    before, began = _cpu_seconds(), time.perf_counter()
    command = [sys.executable, "-P", "-m", "fed_diffusion", *words]  # not of this folder
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        first = None
        while process.poll() is None:
            if first is None and lines is not None and lines.exists() and lines.stat().st_size:
                first = time.perf_counter() - began
            time.sleep(0.005)
        whole = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(words)} failed:\n{said.read().decode()}")
    with suppress(ChildProcessError):
        while True:
            os.wait()
    return first, whole, _cpu_seconds() - before


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def turn(checkout: Path, folder: Path, engines: list[str]) -> dict[str, Seconds]:
    """Run every case once."""
    found = {"--help": timed(checkout, ["--help"])}
    for engine in engines:
        run = folder / engine
        changes = [word for pair in ONE_STEP for word in ("--set", pair)]
        words = ["run", "digits", "--engine", engine, *changes, "--out", str(run)]
        found[f"one step, {engine}"] = timed(checkout, words, run)
    grid = str(folder / "grid.png")
    words = ["sample", str(folder / engines[0]), "--num", "16", "--out", grid]
    return found | {"sample of 16": timed(checkout, words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--checkout", type=Path, nargs="+", default=[here])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-flower", action="store_true")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    engines = ["local"] if arguments.no_flower else ["local", "flower"]
    found: dict[tuple[str, Path], list[Seconds]] = {}
    for repeat in range(arguments.repeats + 1):
        for checkout in arguments.checkout:
            with tempfile.TemporaryDirectory() as folder:
                for case, seconds in turn(checkout.resolve(), Path(folder), engines).items():
                    if repeat:
                        found.setdefault((case, checkout), []).append(seconds)
    load = os.getloadavg()[0]
    print(f"{platform.processor() or 'CPU'}, {usable_cores()} cores, load {load:.1f}\n")
    print("| case | checkout | first round, s | in all, s | CPU, s |\n|---|---|---|---|---|")
    for (case, checkout), all_seconds in sorted(found.items()):
        row = [_median(column) for column in zip(*all_seconds, strict=True)]
        print(f"| {case} | {checkout} | {' | '.join(row)} |")


def _median(column: tuple[float | None, ...]) -> str:
    known = [value for value in column if value is not None]
    return f"{statistics.median(known):.2f}" if known else ""


if __name__ == "__main__":
    main()
