"""What federation costs in quality: ten clients beside one that has all the images, on digits.

    python benchmarks/federated_quality.py [--seeds 3] [--out runs/federated_quality]

Every variant processes the same number of images with the same settings otherwise (the preset
`digits-quick`, level F). Two centralised runs, since not everything can be equal at once: with the
clients' batch and ten times their steps, and with their steps and ten times their batch. FID of
1,000 samples, features of a classifier of the real digits. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

from fed_diffusion.config import load_config
from fed_diffusion.federation.simulate import simulate, usable_cores
from fed_diffusion.runs import RunDir

PRESET = "digits-quick"
N = 10
STEPS, BATCH = 40, 16
IMAGES = N * STEPS * BATCH
"""In each round of each variant."""
VARIANTS: dict[str, dict[str, Any]] = {
    "ten clients": {},
    "ten clients, dirichlet 0.1": {"data.partition": "dirichlet", "data.alpha": 0.1},
    "one client, 10 x steps": {"clients": 1, "local.steps": N * STEPS},
    "one client, 10 x batch": {"clients": 1, "local.batch": N * BATCH},
}


def run(name: str, seed: int, out: Path) -> dict[str, Any]:
    """The results of one run, made unless it is there."""
    path = out / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"
    if not (path.exists() and RunDir(path).finished()):
        config = load_config(PRESET, VARIANTS[name] | {"method": "FedDM-F", "seed": seed})
        assert config.clients * (config.local.steps or 0) * config.local.batch == IMAGES
        simulate(config, path, processes=1)  # variants side by side, each on a core of its own
    return RunDir(path).results()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/federated_quality"))
    arguments = parser.parse_args()
    jobs = [(name, seed, arguments.out) for seed in range(arguments.seeds) for name in VARIANTS]
    with multiprocessing.get_context("spawn").Pool(usable_cores(), maxtasksperchild=1) as pool:
        results = dict(zip(jobs, pool.starmap(run, jobs, chunksize=1), strict=True))
    fids = {
        name: [r["quality"]["fid"] for (n, _, _), r in results.items() if n == name]
        for name in VARIANTS
    }
    print("| variant | FID | each seed | / ten clients |")
    print("|---|---|---|---|")
    for name, values in fids.items():
        ratio = statistics.mean(values) / statistics.mean(fids["ten clients"])
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {statistics.mean(values):.3f} | {each} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
