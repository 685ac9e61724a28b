"""Ten workers of very unequal size: what each way to shrink the network costs in quality.

    python benchmarks/unequal_clients.py [--out runs/unequal] [--seeds 3] [--only NAME ...]
        [--set KEY=VALUE ...]

Every variant trains `digits-unequal` (keep ratios 1 to 0.125) on the same images per worker; each
run is a run directory under --out, and one that is finished is not run again. Ends with a table in
Markdown (also written to --out/table.md): means over the seeds, with the range of FID. --set
changes every variant, as in --set local.state=fresh (with another --out).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from made import made

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.build import Setup
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config, load_config, parse_pairs
from fed_diffusion.generate import RunDir
from fed_diffusion.masks.families import derive
from fed_diffusion.masks.mask import kept_values, pruning_error
from fed_diffusion.masks.plan import plan_round

PRESET = "digits-unequal"


def masks(kind: str, **more: str) -> dict[str, Any]:
    return {"pruning.kind": kind} | {f"pruning.{key}": value for key, value in more.items()}


FULL = {"method": "FedDM-F"}
INT8_UP = {"wire.up": "int8", "wire.differences": True}
VARIANTS = {
    "F": FULL,
    "channels, ordered": masks("channels"),
    "channels, rolling": masks("channels", choice="rolling"),
    "channels, random": masks("channels", choice="random"),
    "channels, magnitude": masks("channels", choice="magnitude"),
    "balanced channels": masks("balanced", unit="channels"),
    "balanced weights": masks("balanced"),
    "balanced by magnitude": masks("balanced", by="magnitude"),
    "balanced by magnitude, global": masks("balanced", by="magnitude", per="global"),
    "random weights": masks("random"),
    "top-k weights": masks("topk"),
    "top-k weights, global": masks("topk", per="global"),
    "exclusive": masks("random", baseline="exclusive"),
    "small": masks("random", baseline="small"),
    "F, int8 differences up": FULL | INT8_UP,
    "F, int8 both ways": FULL | {"method": "FedDM-F-quant"},
    "channels, rolling, int8 both ways": masks("channels", choice="rolling")
    | INT8_UP
    | {"wire.down": "int8"},
}


def run(variant: str, seed: int, root: Path, changes: dict[str, Any]) -> Path:
    """The finished run directory of one variant."""
    path = root / f"{variant.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    config = load_config(PRESET, VARIANTS[variant] | {"seed": seed} | changes)
    began = time.perf_counter()
    results = made(config, path)
    fid = results["quality"]["fid"]
    print(f"{path.name}: FID {fid:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    return path


def row(variant: str, paths: list[Path]) -> dict:
    """One line of the table from the runs of all seeds."""
    results = [json.loads((path / "results.json").read_text()) for path in paths]
    rounds = [json.loads(line) for path in paths for line in (path / "metrics.jsonl").open()]
    fids = [r["quality"]["fid"] for r in results]
    worker = sum(c["seconds"] for line in rounds for c in line["clients"]) / len(paths)
    return {
        "variant": variant,
        "FID": statistics.mean(fids),
        "range": f"{min(fids):.2f} to {max(fids):.2f}",
        "held-out loss": statistics.mean(r["holdout_loss"] or float("nan") for r in results),
        "training loss": statistics.mean(r["loss"] for r in results),
        "Gamma*": min(r["gamma_star"] for r in results),
        "w2": max(r["w2_max"] for r in results),
        "w2 N / Gamma": max(line["w2_n_over_gamma"] or float("inf") for line in rounds),
        "kept": statistics.mean(c["keep"] for line in rounds for c in line["clients"]),
        "MB": statistics.mean((r["bytes_up"] + r["bytes_down"]) / 1e6 for r in results),
        "worker seconds": worker,
    }


def table(rows: list[dict], seeds: int) -> str:
    base = {row["variant"]: row for row in rows}.get("F")
    lines = [
        "| variant | FID | range | FID / F | held-out loss | training loss | Gamma* | w² | "
        "w² N / Gamma | mean part kept | MB, both ways | worker seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: r["FID"]):
        ratio = f"{r['FID'] / base['FID']:.2f}" if base else ""
        lines.append(
            f"| {r['variant']} | {r['FID']:.3f} | {r['range']} | {ratio} | "
            f"{r['held-out loss']:.4f} | {r['training loss']:.4f} | {r['Gamma*']} | "
            f"{r['w2']:.0f} | {r['w2 N / Gamma']:.0f} | {r['kept']:.3f} | {r['MB']:.0f} | "
            f"{r['worker seconds']:.0f} |"
        )
    return "\n".join(lines) + f"\n\n{seeds} seeds.\n"


def on_one_theta(path: Path) -> str:
    """w^2, Gamma and w^2 N / Gamma of every kind of mask on the theta that one run ended with."""
    theta = RunDir.open(path).load_theta(ema=False)
    lines = [
        "| masks on one theta | w² mean | w² max | Gamma | w² N / Gamma |",
        "|---|---|---|---|---|",
    ]
    for variant, settings in VARIANTS.items():
        config = load_config(PRESET, settings)
        if config.pruning.kind == "full" or config.pruning.baseline or "int8" in variant:
            continue
        w2, gamma = spread(config, theta)
        bound = max(w2) * config.clients / gamma if gamma else float("inf")
        lines.append(
            f"| {variant} | {statistics.mean(w2):.1f} | {max(w2):.1f} | {gamma} | {bound:.0f} |"
        )
    return "\n".join(lines) + "\n"


def spread(config: Config, theta: dict[str, torch.Tensor]) -> tuple[list[float], int]:
    setup = Setup.of(config)
    family, layout, keeps = setup.family, setup.layout, setup.known_ratios()
    recipes = plan_round(family, config.pruning.kind, config.rounds, keeps, theta, layout)
    mean, w2 = MaskedMean(theta), []
    for recipe in recipes.values():
        kept = derive(family, recipe, theta, layout)
        w2.append(pruning_error(kept, theta))
        mean.add(kept_values(theta, kept), kept)
    return w2, mean.coverage.gamma()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/unequal"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    changes = parse_pairs(arguments.set)
    began = time.perf_counter()
    done: dict[str, list[Path]] = {name: [] for name in arguments.only}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            done[name].append(run(name, seed, arguments.out, changes))
    text = table([row(name, paths) for name, paths in done.items()], arguments.seeds)
    if "F" in done:
        text += "\n" + on_one_theta(done["F"][0])
    (arguments.out / "table.md").write_text(text)
    print(
        f"{text}\n{time.perf_counter() - began:.0f} s on {usable_cores()} cores, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
