"""FID against network evaluations, for every sampler and partition on one trained network.

    python benchmarks/sampler_quality.py [RUN] [--out runs/samplers] [--samples 1000] [--seeds 3]
        [--evaluations 10 20 ...] [--only "second_order, geometric" ...]

Without RUN the `digits` preset is trained first, to --out/run. Features are those of the classifier
trained on the run's own images (seed 0). A figure is the mean over the seeds of sampling, with its
standard deviation; evaluations count the final Tweedie step where the run has one. What is measured
is kept in --out, so that an interrupted benchmark goes on. Ends with a table in Markdown
(--out/table.md) and a figure (--out/fid.png).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from made import made

from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data import load_dataset, to_unit
from fed_diffusion.evaluation.features import fingerprint, reproducible, trained_classifier
from fed_diffusion.evaluation.quality import fid_floor, frechet_distance
from fed_diffusion.generate import Sampler

EVALUATIONS = (5, 10, 20, 40, 100, 200)
VARIANTS = {
    f"{sampler}, {partition}": (sampler, partition)
    for sampler, partitions in {
        "exponential_integrator": (
            "kappa_minimal",
            "half_half",
            "geometric",
            "uniform",
            "ddpm_linear",
        ),
        "probability_flow": ("kappa_minimal", "geometric"),
        "second_order": ("kappa_minimal", "geometric"),
        "second_order_sde": ("kappa_minimal", "geometric"),
    }.items()
    for partition in partitions
}
Figures = dict[str, dict[str, list[float]]]
"""{variant: {evaluations: [FID of each seed]}}; an empty list where there is no such partition."""


class Judge:
    """FID against the run's own images, by the classifier's features."""

    def __init__(self, model: Sampler):
        reference = load_dataset(model.config.data)
        self.classifier = trained_classifier(fingerprint(reference), model.config.seed, "cpu")
        self.real = self.features(reference.images)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        with reproducible():
            parts = [self.classifier.features(to_unit(part)) for part in images.split(512)]
        return torch.cat(parts)

    def fid(self, images: torch.Tensor) -> float:
        return frechet_distance(self.features(images), self.real)


def measure(model: Sampler, judge: Judge, variant: str, nfe: int, samples: int, seed: int) -> float:
    sampler, partition = VARIANTS[variant]
    steps = nfe - int(model.config.evaluation.denoise)
    return judge.fid(
        model.sample(
            samples, seed=seed, steps=steps, sampler=sampler, partition=partition, guidance=0.0
        )
    )


def measure_all(
    model: Sampler, judge: Judge, path: Path, plan: Iterable[tuple[int, int, str]], samples: int
) -> Figures:
    """FID for each (seed, evaluations, variant) of the plan that path does not hold yet."""
    figures: Figures = json.loads(path.read_text()) if path.is_file() else {}
    for seed, nfe, variant in plan:
        fids = figures.setdefault(variant, {}).setdefault(str(nfe), [])
        if seed != len(fids):
            continue  # known already, or there is no such partition
        began = time.perf_counter()
        try:
            fids.append(measure(model, judge, variant, nfe, samples, seed))
        except ConfigError as error:
            print(f"{variant}, {nfe} evaluations: {error}", flush=True)
            continue
        path.write_text(json.dumps(figures, indent=2))
        took = time.perf_counter() - began
        print(
            f"seed {seed}, {nfe} evaluations, {variant}: {fids[-1]:.3f}, {took:.0f} s", flush=True
        )
    return figures


def known(figures: Figures, variant: str, nfe: int) -> list[float]:
    return figures.get(variant, {}).get(str(nfe), [])


def shown(fids: list[float]) -> str:
    if not fids:
        return "–"
    spread = f" ± {statistics.stdev(fids):.3f}" if len(fids) > 1 else ""
    return f"{statistics.mean(fids):.3f}{spread}"


def table(figures: Figures, counts: list[int]) -> str:
    """Evaluations across, samplers and partitions down."""
    lines = [
        "| sampler | partition | " + " | ".join(map(str, counts)) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    for variant, (sampler, partition) in VARIANTS.items():
        cells = " | ".join(shown(known(figures, variant, nfe)) for nfe in counts)
        lines.append(f"| {sampler} | {partition} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(figures: Figures, counts: list[int], floor: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "exponential_integrator": "-",
        "probability_flow": ":",
        "second_order": "--",
        "second_order_sde": "-.",
    }
    partitions = list(dict.fromkeys(partition for _, partition in VARIANTS.values()))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for variant, (sampler, partition) in VARIANTS.items():
        measured = [nfe for nfe in counts if known(figures, variant, nfe)]
        fids = [known(figures, variant, nfe) for nfe in measured]
        axes.errorbar(
            measured,
            [statistics.mean(values) for values in fids],
            [statistics.stdev(values) if len(values) > 1 else 0 for values in fids],
            label=variant,
            linestyle=styles[sampler],
            color=f"C{partitions.index(partition)}",
            marker="o",
            markersize=3,
        )
    axes.axhline(floor, color="grey", linewidth=0.8, label="real against real")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="FID (classifier)")
    axes.set_xticks(counts, [str(nfe) for nfe in counts])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="default: train the digits preset")
    parser.add_argument("--out", type=Path, default=Path("runs/samplers"))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, nargs="+", default=list(EVALUATIONS))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    began, out = time.perf_counter(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    run = arguments.run or out / "run"
    if arguments.run is None:
        made(load_config("digits"), run)
    model = Sampler.from_run(run)
    judge = Judge(model)
    floor = fid_floor(judge.real, min(arguments.samples, len(judge.real) // 2), model.config.seed)
    counts, seeds = sorted(arguments.evaluations), arguments.seeds
    # every variant with the first seed, then with the next: rough figures soon
    plan = itertools.product(range(seeds), counts, arguments.only)
    path = out / f"{run.name}-{arguments.samples}.json"
    figures = measure_all(model, judge, path, plan, arguments.samples)
    counts = sorted({int(nfe) for of_variant in figures.values() for nfe in of_variant})
    text = table(figures, counts)
    text += (
        f"\n{arguments.samples} samples; mean ± standard deviation over the seeds (one seed where "
        f"there is none); real against real: {floor:.3f}.\n"
    )
    (out / "table.md").write_text(text)
    draw(figures, counts, floor, out / "fid.png")
    print(f"{text}\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}")


if __name__ == "__main__":
    main()
