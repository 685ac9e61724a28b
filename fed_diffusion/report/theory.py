"""The bound of Theorem 4.11, drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from fed_diffusion.report.curves import BLUE, INK, styled
from fed_diffusion.theory.advisor import Row


def moves_figure(moves: Mapping[str, Sequence[Row]]) -> Figure:
    """The bound in nats against each argument, a panel each; infinite values are left out."""
    figure = Figure(figsize=(3.2 * len(moves), 2.9), layout="constrained")
    for axes, (name, rows) in zip(
        figure.subplots(1, len(moves), squeeze=False)[0], moves.items(), strict=True
    ):
        styled(axes)
        points = [(r.value, r.bound.total) for r in rows if math.isfinite(r.bound.total)]
        if points:
            axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=3.5)
            axes.set_yscale("log")
        if name == "K":
            axes.set_xscale("log")
        axes.set_xlabel(name, color=INK)
        axes.set_ylabel("bound, nats", color=INK)
    return figure
