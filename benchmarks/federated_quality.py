"""What federation costs in quality: ten clients beside one that has all the images, on digits.

    python benchmarks/federated_quality.py [--seeds 3] [--out runs/federated_quality] [--causes]

Every variant processes the same number of images with the same settings otherwise (the preset
`digits-quick`, level F). Two centralised runs, since not everything can be equal at once: with the
clients' batch and ten times their steps, and with their steps and ten times their batch. FID of
1,000 samples, features of a classifier of the real digits. Finished runs are not repeated.
With --causes: ten clients with larger steps, with more and shorter rounds, and both sides with
four times the rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import load_config
from fed_diffusion.engines.local import simulate
from fed_diffusion.generate import RunDir

PRESET = "digits-quick"
N = 10
STEPS, BATCH = 40, 16
IMAGES = 10 * N * STEPS * BATCH
"""In each run, but for those of four times the rounds."""
VARIANTS: dict[str, dict[str, Any]] = {
    "ten clients": {},
    "ten clients, dirichlet 0.1": {"data.partition": "dirichlet", "data.alpha": 0.1},
    "one client, 10 x steps": {"clients": 1, "local.steps": N * STEPS},
    "one client, 10 x batch": {"clients": 1, "local.batch": N * BATCH},
}
LONG: dict[str, Any] = {"rounds": 40, "ema.decay": 0.84}
"""The moving average over the same part of the run: 0.84^4 = 0.957^16 = 0.5."""
CAUSES: dict[str, dict[str, Any]] = {
    "ten clients, 3 x eta": {"local.eta": 3e-3},
    "ten clients, 40 rounds of 10 steps": LONG | {"local.steps": STEPS // 4},
    "ten clients, 40 rounds of 10 steps, 3 x eta": LONG
    | {"local.steps": STEPS // 4, "local.eta": 3e-3},
    "ten clients, 4 x rounds": LONG,
    "ten clients, 4 x images in 160 rounds of 10 steps": {
        "rounds": 160,
        "ema.decay": 0.957,
        "local.steps": STEPS // 4,
    },
    "one client, 10 x batch, 4 x rounds": LONG | {"clients": 1, "local.batch": N * BATCH},
}


def run(name: str, seed: int, out: Path) -> dict[str, Any]:
    """The results of one run, made unless it is there."""
    path = out / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"
    if not (path.exists() and RunDir(path).finished()):
        config = load_config(
            PRESET, (VARIANTS | CAUSES)[name] | {"method": "FedDM-F", "seed": seed}
        )
        images = config.rounds * config.clients * (config.local.steps or 0) * config.local.batch
        assert images == IMAGES * (4 if "4 x" in name else 1)
        simulate(config, path, processes=1)  # variants side by side, each on a core of its own
    return RunDir(path).results()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/federated_quality"))
    parser.add_argument("--causes", action="store_true")
    arguments = parser.parse_args()
    causes = ["ten clients", "one client, 10 x batch", *CAUSES]
    names = causes if arguments.causes else list(VARIANTS)
    jobs = [(name, seed, arguments.out) for seed in range(arguments.seeds) for name in names]
    with multiprocessing.get_context("spawn").Pool(usable_cores(), maxtasksperchild=1) as pool:
        results = dict(zip(jobs, pool.starmap(run, jobs, chunksize=1), strict=True))
    fids = {
        name: [r["quality"]["fid"] for (n, _, _), r in results.items() if n == name]
        for name in names
    }
    print("| variant | FID | each seed | / ten clients |")
    print("|---|---|---|---|")
    for name, values in fids.items():
        ratio = statistics.mean(values) / statistics.mean(fids["ten clients"])
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {statistics.mean(values):.3f} | {each} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
