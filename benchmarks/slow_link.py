"""Rounds over a slow link: dense fp32 against int8 differences of half of the weights.

    python -m benchmarks.slow_link [--mbit 20] [--ms 40] [--rounds 3] [--preset cifar10]

As root, with iproute2 and nginx: a server and two nodes on hosts of their own, each node on a
cable of so many Mbit/s each way and milliseconds one way; TLS, node authentication and the proxy,
all by the scripts that `deploy init` writes. The nodes' images are the digits at the preset's size,
and one local step is trained: the time is the network's. Both cases in turn on the same deployment.
Bytes are the ledger's; seconds are of a round, the first (with the cold start) left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import ClassVar

from torch.nn.functional import interpolate

from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset
from tests.lab.hosts import why_not
from tests.lab.lab import Lab

IMAGES = 100
COMMON = {
    "clients": 2,
    "local.epochs": None,
    "local.steps": 1,
    "local.batch": 4,
    "evaluation.samples": 0,
    "evaluation.every": 0,
    "evaluation.reference": "none",
    "evaluation.denoise": False,
    "evaluation.steps": 10,
    "evaluation.grid": 1,
}
CASES = {
    "dense fp32": {},
    "int8 differences, keep 0.5": {
        "pruning.kind": "random",
        "pruning.keep": 0.5,
        "wire.down": "int8",
        "wire.up": "int8",
        "wire.differences": True,
    },
}


class SlowLab(Lab):
    """Its nodes are far away. The SuperLink's SQLite is left out: see docs/deployment.md."""

    environment: ClassVar = {"DATABASE": ""}

    def __init__(self, folder: Path, images, mbit: float, ms: float):
        super().__init__(folder, images)
        self._pace = mbit, ms

    def prepare(self) -> None:
        for node in (1, 2):
            self.lengthen(node, *self._pace)


def measured(lab: SlowLab, path: Path, settings: dict) -> dict[str, float]:
    """Medians over the rounds after the first."""
    code = lab.submit(path, **settings).wait(3600)
    if code:
        raise SystemExit(lab.read("train.log"))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()][1:]
    names = ("seconds", "bytes_down", "bytes_up")
    return {name: statistics.median(line[name] for line in lines) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, default=20)
    parser.add_argument("--ms", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="cifar10")
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    data = load_config(arguments.preset).data
    size, channels = (32, 3) if data.name == "cifar10" else (8, 1)
    images = load_dataset(load_config("digits").data).images[:IMAGES]
    images = interpolate(images.float(), (size, size)).byte().expand(-1, channels, -1, -1)
    common = COMMON | {"preset": arguments.preset, "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with SlowLab(folder, images, arguments.mbit, arguments.ms) as lab:
            found = {
                case: measured(lab, folder / f"run-{i}", common | more)
                for i, (case, more) in enumerate(CASES.items())
            }
    dense = found["dense fp32"]
    print("| case | seconds a round | / dense | MB down | MB up | bytes / dense |")
    print("|---|---|---|---|---|---|")
    total = dense["bytes_down"] + dense["bytes_up"]
    for case, it in found.items():
        part = (it["bytes_down"] + it["bytes_up"]) / total
        print(
            f"| {case} | {it['seconds']:.1f} | {it['seconds'] / dense['seconds']:.3f} "
            f"| {it['bytes_down'] / 1e6:.1f} | {it['bytes_up'] / 1e6:.1f} | {part:.3f} |"
        )


if __name__ == "__main__":
    main()
