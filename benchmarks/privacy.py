"""What differential privacy of clients costs in quality: digits FID against epsilon.

    python benchmarks/privacy.py [--clients 100] [--rounds 25] [--clip 1] [--out runs/privacy]

Virtual clients in one process, each round draws `--fraction` of them; every run trains the same
network for as many rounds, seed 0. Without privacy, then with clipping to C and each noise
multiplier z: sigma = z C on the sum. FID of 1,000 samples of the moving average, features of a
classifier of the real digits; the first line is real images against real images. Finished runs are
not repeated. A private run is not repeated to the bit: its noise is the operating system's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from made import made

from fed_diffusion.config import load_config

COMMON: dict[str, Any] = {
    "model.widths": [16, 32],
    "local.steps": 10,
    "local.eta": 1e-3,
    "local.state": "fresh",
    "local.batch": 8,
    "evaluation.every": 0,
    "ema.decay": 0.8,
}


def run(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results of one run, made unless it is there."""
    return made(load_config("digits", settings), path, processes=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.02, 0.1, 0.5])
    parser.add_argument("--out", type=Path, default=Path("runs/privacy"))
    arguments = parser.parse_args()
    common = COMMON | {
        "clients": arguments.clients,
        "rounds": arguments.rounds,
        "round.fraction": arguments.fraction,
        "wire.differences": True,
    }
    print("| z | epsilon | FID | 95 % interval | seconds |")
    print("|---|---|---|---|---|")
    for noise in (None, *arguments.noise):
        private = {"privacy.clip": arguments.clip, "privacy.noise_multiplier": noise}
        found = run(arguments.out / f"z-{noise}", common | (private if noise else {}))
        quality = found["quality"]
        low, high = quality["intervals"]["fid"]
        epsilon = f"{found['privacy']['epsilon']:.4g}" if noise else "none"
        if noise is None:
            print(f"| real images | | {quality['fid_floor']:.2f} | | |")
        print(
            f"| {noise if noise else 'no privacy'} | {epsilon} | {quality['fid']:.2f} "
            f"| {low:.2f} to {high:.2f} | {found['seconds']['total']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
