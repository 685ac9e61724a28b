"""A run's curves over its rounds: matplotlib figures, and SVG that takes on the page's colours.

Each function takes the rounds of `metrics.jsonl`, a mapping per round; a value that is missing,
null or not finite is left out of its curve.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Round = Mapping[str, Any]

INK = "#0b0c0e"  # stands for the text colour of whatever page the figure is on
BLUE, ORANGE, RED = "#3d85c6", "#d9822b", "#cc4b4b"  # legible on white and on near-black
FEW = 40  # points up to which each is marked


def loss_figure(rounds: Sequence[Round]) -> Figure:
    """Mean training loss and held-out loss per dimension."""
    figure, axes = _figure("loss per dimension")
    values = [
        *_line(axes, rounds, "loss", "training", BLUE),
        *_line(axes, rounds, "holdout_loss", "held out", ORANGE),
    ]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    return _finished(figure, axes, rounds)


def gamma_figure(rounds: Sequence[Round], clients: int | None) -> Figure:
    """Gamma_r, the trainers of the least-covered coordinate, under the line of N clients."""
    figure, axes = _figure("trainers per coordinate")
    if clients is not None:
        axes.axhline(clients, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"N = {clients}")
    gammas = _line(axes, rounds, "gamma", "Γ, the fewest", BLUE)
    axes.set_ylim(0, max(1, clients or 0, *gammas) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axes, rounds)


def bytes_figure(rounds: Sequence[Round]) -> Figure:
    """Megabytes to and from the clients, with the whole network in fp32 one way as the measure."""
    figure, axes = _figure("MB per round")
    _line(axes, rounds, "dense_bytes", "fp32, whole network, one way", INK, 1e-6, dashed=True)
    _line(axes, rounds, "bytes_up", "up, clients to server", BLUE, 1e-6)
    _line(axes, rounds, "bytes_down", "down, server to clients", ORANGE, 1e-6)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, rounds)


def rejected_figure(rounds: Sequence[Round]) -> Figure:
    """How many updates were rejected in each round."""
    figure, axes = _figure("rejected updates")
    counts = [len(entry.get("rejected") or ()) for entry in rounds]
    axes.bar(_numbers(rounds), counts, color=RED, width=0.8)
    axes.set_ylim(0, max([1, *counts]) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axes, rounds)


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element for an HTML page: no namespaces, no metadata, no fonts.

    Parameters
    ----------
    label
        What a screen reader says; also keeps the ids of several figures on a page apart.
    """
    buffer = io.StringIO()
    # text stays text, in the page's own font; the salt makes the same figure the same string
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _figure(what: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    styled(axes)
    axes.set_ylabel(what, color=INK)
    return figure, axes


def styled(axes: Axes) -> None:
    """Axes over rounds, with no more ink than it takes to read a value."""
    axes.set_xlabel("round", color=INK)
    axes.tick_params(colors=INK, which="both", length=3)
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _line(
    axes: Axes,
    rounds: Sequence[Round],
    key: str,
    label: str,
    colour: str,
    unit: float = 1.0,
    dashed: bool = False,
) -> list[float]:
    """Draw one curve if it has any value; the values drawn."""
    values = [entry.get(key) for entry in rounds]
    points = [
        (number, value * unit)
        for number, value in zip(_numbers(rounds), values, strict=True)
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            label=label,
            linewidth=1 if dashed else 1.8,
            linestyle=(0, (4, 3)) if dashed else "-",
            marker="o" if len(points) <= FEW and not dashed else "",
            markersize=3.5,
        )
    return [value for _, value in points]


def _numbers(rounds: Sequence[Round]) -> list[int]:
    return [int(entry.get("round", i + 1)) for i, entry in enumerate(rounds)]


def _finished(figure: Figure, axes: Axes, rounds: Sequence[Round]) -> Figure:
    numbers = _numbers(rounds) or [1]
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, fontsize="small", loc="best")
    return figure
