"""What a part of benchmarks/gpu.py writes down: its rows, its log and its table."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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
