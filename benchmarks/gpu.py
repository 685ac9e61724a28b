"""What a GPU does with this project: is it right, how fast, and how good. See docs/gpu.md.

    python benchmarks/gpu.py check [--minutes 3]
    python benchmarks/gpu.py speed [--minutes 4]
    python benchmarks/gpu.py train [--minutes 8] [--preset cifar10-small] [--data DIR] [--work DIR]

Needs torch, numpy and the project's small dependencies, but neither Flower nor Ray nor a network.
Every part stops by itself when its minutes are over, prints a table last, and writes what it has
measured into --out as it goes: PART.json (all numbers), PART.md (the table), PART.log. Stopped at
any moment, the files are whole. --device cpu and --tiny make it run anywhere, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from gpu_record import Record

if TYPE_CHECKING:
    from gpu_train import Plan

ROOT = Path(__file__).resolve().parent.parent
MINUTES = {"check": 3.0, "speed": 4.0, "train": 8.0}


class Reporter:
    """A pytest plugin: each test is a row as soon as it has ended; no test begins too late."""

    def __init__(self, record: Record):
        self.record = record

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = "" if report.passed else str(report.longrepr).strip().splitlines()[-1][:200]
        name = report.nodeid.split("::")[-1]
        outcome = report.outcome.upper() if report.failed else report.outcome
        self.record.add(name, outcome=outcome, seconds=report.duration, why=why)

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self.record.left() < 0:
            item.session.shouldstop = "the time is over"


def check(record: Record) -> int:
    """Run the tests marked `gpu`, each a row with its outcome and its seconds."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    marks = "gpu"
    if find_spec("diffusers") is None:
        marks = "gpu and not models"
        record.say("diffusers is not installed: its networks are left out")
    chosen = ["tests/gpu", "--confcutdir=tests/gpu", "-m", marks, "-o", "addopts="]
    code = pytest.main([*chosen, "-p", "no:cacheprovider", "-q", "--tb=short"], [Reporter(record)])
    return int(code)


def planned(arguments: argparse.Namespace) -> Plan:
    from gpu_train import VARIANTS, Plan

    from fed_diffusion.config import parse_pairs

    variants = arguments.variants or tuple(VARIANTS)
    if odd := set(variants) - set(VARIANTS):
        raise SystemExit(f"--variants: {odd.pop()!r} is none of {', '.join(map(repr, VARIANTS))}.")
    return Plan(
        preset=arguments.preset,
        data=arguments.data,
        given=parse_pairs(arguments.set),
        variants=variants,
        judges=arguments.judges,
        resnet56=arguments.resnet56,
        chunk=1 if arguments.tiny else arguments.rounds,
        samples=40 if arguments.tiny else arguments.samples,
        tiny=arguments.tiny,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=sorted(MINUTES))
    parser.add_argument("--minutes", type=float, help="3, 4 and 8 for check, speed and train")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a reduced form, for tests")
    parser.add_argument("--preset", default="cifar10-small", help="train: what is trained")
    parser.add_argument("--data", type=Path, help="train: the preset's data.dir")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="train: settings")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="train: some of the five")
    parser.add_argument("--rounds", type=int, default=10, help="train: rounds of a turn")
    parser.add_argument("--samples", type=int, default=5000, help="train: images that are judged")
    parser.add_argument(
        "--judges", nargs="+", default=["classifier"], help="train: as evaluation.extractor"
    )
    parser.add_argument("--resnet56", type=Path, help="train: resnet56_cifar10's file of weights")
    parser.add_argument("--work", type=Path, help="train: where its runs lie (default: OUT/runs)")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # as a worker's
    minutes = arguments.minutes or MINUTES[arguments.part]
    record = Record(arguments.part, arguments.out.resolve(), minutes, torch.device(device))
    record.say(json.dumps(record.about))
    code = 0
    if arguments.part == "check":
        code = check(record)
    elif arguments.part == "speed":
        from gpu_speed import speed

        speed(record, torch.device(device), arguments.tiny)
    else:
        from gpu_train import train

        work = (arguments.work or record.out / "runs").resolve()
        train(record, torch.device(device), planned(arguments), work)
    print("\n" + record.table())
    return code


if __name__ == "__main__":
    sys.exit(main())
