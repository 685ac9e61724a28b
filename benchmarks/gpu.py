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
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MINUTES = {"check": 3.0, "speed": 4.0, "train": 8.0}
PACKAGES = ("torch", "torchvision", "numpy", "pydantic", "torch-fidelity", "scikit-learn", "pytest")


class Record:
    """The figures of one part: on disk after each of them, and a table at the end."""

    def __init__(self, part: str, out: Path, minutes: float, device: torch.device):
        out.mkdir(parents=True, exist_ok=True)
        if (out / f"{part}.json").exists():  # of an earlier call: it is kept
            earlier = len(list(out.glob(f"{part}-*.json"))) + 1
            (out / f"{part}.json").rename(out / f"{part}-{earlier}.json")
        self.part, self.out = part, out
        self.ends = time.monotonic() + 60 * minutes
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.about = {
            "part": part,
            "command": " ".join(["python", *sys.argv]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "packages": {name: installed(name) for name in PACKAGES},
            "minutes": minutes,
        }

    def left(self) -> float:
        """Seconds until this part's time is over."""
        return self.ends - time.monotonic()

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.began:6.1f} s] {text}"
        print(line, flush=True)
        with (self.out / f"{self.part}.log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def add(self, name: str, **figures: Any) -> None:
        """Note a row; the JSON file holds it before the next thing is measured."""
        self.rows.append({"name": name, **figures})
        self.say(f"{name}: " + ", ".join(f"{k} {shown(v)}" for k, v in figures.items()))
        self._replace(f"{self.part}.json", json.dumps({**self.about, "rows": self.rows}, indent=1))
        self._replace(f"{self.part}.md", self.table())

    def table(self) -> str:
        """The rows as Markdown, in one table for each set of columns that follow one another."""
        lines, columns = [], []
        for row in self.rows:
            if list(row) != columns:
                columns = list(row)
                lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            lines.append("| " + " | ".join(map(shown, row.values())) + " |")
        return "\n".join(lines).strip() + "\n"

    def _replace(self, name: str, text: str) -> None:
        beside = self.out / f".{name}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.out / name)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
