"""What federation costs in quality: ten clients beside one that has all the images, on digits.

    python benchmarks/federated_quality.py [--seeds 3] [--out runs/federated_quality]
        [--causes | --state | --only PATTERN ...]

Every variant processes the same number of images with the same settings otherwise (the preset
`digits-quick` at level F, in 10 rounds of 40 steps at eta 1e-3, with Adam's moments fresh in every
round as in the paper, where the variant's name does not say otherwise). Two centralised runs, since
not everything can be equal at once: with the clients' batch and ten times their steps, and with
their steps and ten times their batch. FID of 1,000 samples, features of a classifier of the real
digits. Finished runs are not repeated.
With --causes: ten clients with larger steps, with more and shorter rounds, and both sides with
four times the rounds. With --state: Adam's moments fresh in every round or shared (local.state), in
10 rounds of 40 steps and in 40 of 10, also under Dirichlet 0.1, beside one client with ten times
the batch, each at the same three etas; the best eta of each is named. --only runs the variants
whose name matches one of the patterns ("ten shared 40x10 *"), of all that there are.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

from made import made

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import load_config

PRESET = "digits-quick"
N = 10
STEPS, BATCH = 40, 16
IMAGES = 10 * N * STEPS * BATCH
"""In each run, but for those of four times the rounds."""
BASE: dict[str, Any] = {
    "method": "FedDM-F",
    "rounds": 10,
    "local.steps": STEPS,
    "local.eta": 1e-3,
    "local.state": "fresh",
    "wire.state": "fp32",
    "ema.decay": 0.5,
}
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
ETAS = {"1e-3": 1e-3, "2e-3": 2e-3, "3e-3": 3e-3}
SHAPES: dict[str, dict[str, Any]] = {
    "10x40": {},
    "40x10": LONG | {"local.steps": STEPS // 4},
}
"""Rounds x local steps."""
SIDES: dict[str, dict[str, Any]] = {
    "ten fresh": {},
    "ten shared": {"local.state": "shared"},
    "ten fresh dirichlet": {"data.partition": "dirichlet", "data.alpha": 0.1},
    "ten shared dirichlet": {
        "data.partition": "dirichlet",
        "data.alpha": 0.1,
        "local.state": "shared",
    },
    "one": {"clients": 1, "local.batch": N * BATCH},
}
"""With one client a shared state is one run of Adam; `one` begins anew in every round, as it did,
and `one shared` does not."""
SIDES["one shared"] = SIDES["one"] | {"local.state": "shared"}
SIDES["ten shared int4"] = SIDES["ten shared"] | {"wire.state": "int4"}
STATE: dict[str, dict[str, Any]] = {
    f"{side} {shape} eta {eta}": SIDES[side] | SHAPES[shape] | {"local.eta": ETAS[eta]}
    for side in SIDES
    for shape in SHAPES
    for eta in ETAS
}
ALL = VARIANTS | CAUSES | STATE


def run(name: str, seed: int, out: Path) -> dict[str, Any]:
    """The results of one run, made unless it is there."""
    path = out / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"
    config = load_config(PRESET, BASE | ALL[name] | {"seed": seed})
    images = config.rounds * config.clients * (config.local.steps or 0) * config.local.batch
    assert images == IMAGES * (4 if "4 x" in name else 1)
    return made(config, path, processes=1)  # variants side by side, each on a core of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/federated_quality"))
    parser.add_argument("--processes", type=int, default=usable_cores())
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--causes", action="store_true")
    which.add_argument("--state", action="store_true")
    which.add_argument("--only", nargs="+", metavar="PATTERN")
    arguments = parser.parse_args()
    if arguments.only:
        found = [n for n in ALL if any(fnmatch.fnmatch(n, p) for p in arguments.only)]
        if not found:
            parser.error(f"no variant matches {arguments.only}; there are: {', '.join(ALL)}")
        names, first = found, found[0]
    elif arguments.state:
        names, first = list(STATE), "one 40x10 eta 2e-3"
    elif arguments.causes:
        names, first = ["ten clients", "one client, 10 x batch", *CAUSES], "ten clients"
    else:
        names, first = list(VARIANTS), "ten clients"
    jobs = [(name, seed, arguments.out) for seed in range(arguments.seeds) for name in names]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        results = dict(zip(jobs, pool.starmap(run, jobs, chunksize=1), strict=True))
    rows = {name: [r for (n, _, _), r in results.items() if n == name] for name in names}
    fids = {name: [r["quality"]["fid"] for r in found] for name, found in rows.items()}
    print(f"| variant | FID | each seed | / {first} | held-out loss | MB a round |")
    print("|---|---|---|---|---|---|")
    for name, values in fids.items():
        ratio = statistics.mean(values) / statistics.mean(fids[first])
        each = ", ".join(f"{value:.3f}" for value in values)
        loss = statistics.mean(float(r["holdout_loss"]) for r in rows[name])
        moved = statistics.mean((r["bytes_down"] + r["bytes_up"]) / r["rounds"] for r in rows[name])
        print(
            f"| {name} | {statistics.mean(values):.3f} | {each} | {ratio:.2f} | {loss:.4f} "
            f"| {moved / 1e6:.2f} |"
        )
    print_best({name: statistics.mean(values) for name, values in fids.items()})


def print_best(fids: dict[str, float]) -> None:
    """The eta of each variant that has several, and the FID that it gives."""
    best: dict[str, tuple[float, str]] = {}
    for name, value in fids.items():
        variant, sep, eta = name.partition(" eta ")
        if sep:
            best[variant] = min(best.get(variant, (value, eta)), (value, eta))
    for variant, (value, eta) in best.items():
        print(f"best of {variant}: {value:.3f} at eta {eta}")


if __name__ == "__main__":
    main()
