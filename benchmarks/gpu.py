"""What a GPU does with this project: is it right, how fast, and how good. See docs/gpu.md.

    python benchmarks/gpu.py check [--minutes 3]
    python benchmarks/gpu.py speed [--minutes 4]
    python benchmarks/gpu.py train [--minutes 8] --data FOLDER_OF_CLASSES [--work DIR]

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
from pathlib import Path

import pytest
import torch
from gpu_record import Record

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
    chosen = ["tests/gpu", "--confcutdir=tests/gpu", "-m", "gpu", "-o", "addopts="]
    code = pytest.main([*chosen, "-p", "no:cacheprovider", "-q", "--tb=short"], [Reporter(record)])
    return int(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=sorted(MINUTES))
    parser.add_argument("--minutes", type=float, help="3, 4 and 8 for check, speed and train")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a reduced form, for tests")
    parser.add_argument("--data", type=Path, help="train: a folder with a sub-folder per class")
    parser.add_argument(
        "--judges", nargs="+", default=[], help="train: further judges, as efficientnet_lite0"
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
        from gpu_train import Judges, train

        work = (arguments.work or record.out / "runs").resolve()
        judges = Judges(arguments.judges, arguments.resnet56)
        train(record, torch.device(device), arguments.tiny, arguments.data, work, judges)
    print("\n" + record.table())
    return code


if __name__ == "__main__":
    sys.exit(main())
