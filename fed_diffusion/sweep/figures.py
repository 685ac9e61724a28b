"""A sweep's figures: loss curves by method (Figures 2 and 3), samples by method (4 to 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fed_diffusion.report.curves import INK, overlay, styled
from fed_diffusion.report.records import Record
from fed_diffusion.sweep.grid import Run

FAMILIES = {"R": "random masks", "T": "top-k masks", "C": "channels", "B": "balanced masks"}
DPI = 120
COLUMNS = 4

Done = Sequence[tuple[Run, Record]]


def save_loss_figure(done: Done, path: Path) -> Path:
    """Draw the training loss by round: a row per preset, a column per family, F in each."""
    presets = list(dict.fromkeys(run.config.preset for run, _ in done))
    found = dict.fromkeys(f for run, _ in done if (f := family(run.method)))
    families: list[str | None] = [*found] or [None]
    size = (0.6 + 4.6 * len(families), 0.4 + 3.1 * len(presets))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(len(presets), len(families), sharey="row", squeeze=False)
    for line, preset in zip(panels, presets, strict=True):
        for axes, name in zip(line, families, strict=True):
            mine = [d for d in done if d[0].config.preset == preset]
            _curves(axes, [d for d in mine if family(d[0].method) in (None, name)])
            axes.set_title(" · ".join(filter(None, (preset, FAMILIES.get(name or "")))), size=10)
        line[0].set_ylabel("loss per dimension", color=INK)
    figure.savefig(path, facecolor="white")
    return path


def family(method: str) -> str | None:
    """Return the letter of a method's masks; None for a method that belongs beside every family."""
    letter, dash, _ = method.partition("-FedDM")
    return letter if dash else None


def _curves(axes: Axes, done: Done) -> None:
    by_method: dict[str, list[Record]] = {}
    for run, record in done:
        by_method.setdefault(run.method, []).append(record)
    styled(axes)
    overlay(axes, {method: [r.rounds for r in records] for method, records in by_method.items()})


def save_samples_figure(done: Done, path: Path) -> Path | None:
    """Draw the first seed's final grid of each method, preset by preset; return None without
    any.
    """
    panels: dict[str, dict[str, Path]] = {}
    for run, record in done:
        if record.final is not None:
            panels.setdefault(run.config.preset, {}).setdefault(run.method, record.final)
    if not panels:
        return None
    lines = [math.ceil(len(methods) / COLUMNS) for methods in panels.values()]
    columns = min(COLUMNS, max(len(methods) for methods in panels.values()))
    figure = Figure(figsize=(2.9 * columns, 3.2 * sum(lines)), dpi=DPI, layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=lines, squeeze=False)[:, 0]
    for part, count, (preset, methods) in zip(parts, lines, panels.items(), strict=True):
        part.suptitle(preset, size=11, color=INK)
        places = part.subplots(count, columns, squeeze=False).ravel()
        for axes in places:
            axes.axis("off")
        for axes, (method, image) in zip(places, methods.items(), strict=False):
            axes.imshow(matplotlib.image.imread(image), cmap="gray", vmin=0, vmax=1)
            axes.set_title(method, size=9, color=INK)
    figure.savefig(path, facecolor="white")
    return path
