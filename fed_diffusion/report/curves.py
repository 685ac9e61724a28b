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
from typing import Any, TypeGuard

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Round = Mapping[str, Any]

INK = "#0b0c0e"  # stands for the text colour of whatever page the figure is on
BLUE, ORANGE, RED = "#3d85c6", "#d9822b", "#cc4b4b"  # legible on white and on near-black
COLOURS = (INK, BLUE, ORANGE, "#4f9d69", RED, "#8e63b5", "#8a8f98")
FEW = 40  # points up to which each is marked
FLAT = 0.01  # of the axes' height: what moves by less is a constant to the eye
MOST_CLIENTS = 40
"""The number of clients whose curves are drawn one by one; of more, their range is drawn."""


def loss_figure(rounds: Sequence[Round]) -> Figure:
    """Draw the mean training and held-out loss per dimension, over the loss of each client."""
    figure, axes = _figure("loss per dimension")
    values = [
        *_line(axes, rounds, "loss", "training, mean", BLUE),
        *_line(axes, rounds, "holdout_loss", "held out, mean", ORANGE),
        *_client_lines(axes, rounds),
    ]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        logarithmic(axes)
    return _finished(figure, axes, rounds)


def logarithmic(axes: Axes) -> None:
    """Give the axes a logarithmic scale whose ticks are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _client_lines(axes: Axes, rounds: Sequence[Round]) -> list[float]:
    """Draw the clients' training losses, thin and behind the means; return the values drawn."""
    clients: dict[str, list[tuple[int, float]]] = {}
    for number, entry in zip(_numbers(rounds), rounds, strict=True):
        for client in entry.get("clients") or ():
            if is_number(loss := client.get("loss")):
                clients.setdefault(str(client.get("client")), []).append((number, loss))
    if len(clients) > MOST_CLIENTS:
        at: dict[int, list[float]] = {}
        for number, loss in sorted(point for points in clients.values() for point in points):
            at.setdefault(number, []).append(loss)
        low, high = [min(losses) for losses in at.values()], [max(v) for v in at.values()]
        label = "training, all clients"
        axes.fill_between(list(at), low, high, color=BLUE, alpha=0.2, lw=0, label=label)
        return low + high
    for index, points in enumerate(clients.values()):
        (line,) = axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=0.8, alpha=0.45)
        line.set(zorder=1, label="training, each client" if index == 0 else None)
    return [loss for points in clients.values() for _, loss in points]


def overlay(
    axes: Axes,
    groups: Mapping[str, Sequence[Sequence[Round]]],
    key: str = "loss",
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw one curve per group of runs: their mean by round, in a band of the deviation.

    Parameters
    ----------
    groups
        Label -> the rounds of each run of the group. A round that one of them has no value of is
        left out of the group's curve.
    colours
        Label -> colour; default: in turn.
    """
    for index, (label, runs) in enumerate(groups.items()):
        colour = (colours or {}).get(label, COLOURS[index % len(COLOURS)])
        known = [{line["round"]: line.get(key) for line in rounds} for rounds in runs]
        common = [r for r in known[0] if all(is_number(k.get(r)) for k in known)]
        rounds = np.array(common)
        values = np.array([[one[number] for number in common] for one in known])
        mean = values.mean(axis=0)
        marker = "o" if len(common) <= FEW else ""
        axes.plot(rounds, mean, color=colour, label=label, lw=1.6, marker=marker, ms=2.5)
        if len(runs) > 1:
            band = values.std(axis=0, ddof=1)
            axes.fill_between(rounds, mean - band, mean + band, color=colour, alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.legend(frameon=False, fontsize="small", labelcolor=INK)


def overlaid_figure(
    groups: Mapping[str, Sequence[Sequence[Round]]], key: str, what: str, colours: Mapping[str, str]
) -> Figure:
    """Draw `overlay` as a figure for a page."""
    figure, axes = _figure(what)
    overlay(axes, groups, key, colours)
    logarithmic(axes)
    return figure


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value from a record can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def varies(figure: Figure) -> bool:
    """Return whether a figure shows anything but constants: a sloping line, or unequal bars."""
    for axes in figure.axes:
        height = axes.transData - axes.transAxes  # in parts of the axes' height
        for line in axes.lines:
            points = np.asarray(line.get_xydata(), dtype=float)
            shown = height.transform(points[np.isfinite(points).all(axis=1)])[:, 1]
            if len(shown) > 1 and np.ptp(shown) > FLAT:
                return True
        bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        sizes = ({bar.get_height() for bar in bars}, {bar.get_width() for bar in bars})
        if any(len(size) > 1 for size in sizes):
            return True
    return False


def gamma_figure(rounds: Sequence[Round], clients: int | None) -> Figure:
    """Draw Gamma_r, the trainers of the least-covered coordinate, under the line of N clients."""
    figure, axes = _figure("trainers per coordinate")
    if clients is not None:
        axes.axhline(clients, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"N = {clients}")
    gammas = _line(axes, rounds, "gamma", "Γ, the fewest", BLUE)
    axes.set_ylim(0, max(1, clients or 0, *gammas) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axes, rounds)


def bytes_figure(rounds: Sequence[Round]) -> Figure:
    """Draw the megabytes to and from the clients, beside those of the whole network in fp32."""
    figure, axes = _figure("MB per round")
    _line(axes, rounds, "dense_bytes", "fp32, whole network, one way", INK, 1e-6, dashed=True)
    _line(axes, rounds, "bytes_up", "up, clients to server", BLUE, 1e-6)
    _line(axes, rounds, "bytes_down", "down, server to clients", ORANGE, 1e-6)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, rounds)


def gap_figure(rounds: Sequence[Round]) -> Figure:
    """Draw the gap of an adapter, as a part of the norm of the mean product."""
    figure, axes = _figure("gap, part of the mean product")
    parts = [{**entry, "gap": (entry.get("adapter_gap") or {}).get("relative")} for entry in rounds]
    _line(axes, parts, "gap", "between the product of the means and the mean product", BLUE)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, rounds)


def rejected_figure(rounds: Sequence[Round]) -> Figure:
    """Draw how many updates were rejected in each round."""
    figure, axes = _figure("rejected updates")
    counts = [len(entry.get("rejected") or ()) for entry in rounds]
    axes.bar(_numbers(rounds), counts, color=RED, width=0.8)
    axes.set_ylim(0, max([1, *counts]) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axes, rounds)


def to_svg(figure: Figure, label: str) -> str:
    """Return the figure as an `<svg>` element for an HTML page, without metadata or fonts.

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
    """Return axes over rounds, with no more ink than a reader needs to read a value."""
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
    """Draw one curve if it has any value, and return the values drawn."""
    values = [entry.get(key) for entry in rounds]
    points = [
        (number, value * unit)
        for number, value in zip(_numbers(rounds), values, strict=True)
        if is_number(value)
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
