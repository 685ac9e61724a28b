"""The bound of Theorem 4.11, drawn: in a run's report, and as `fed-diffusion plan` shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fed_diffusion.report.curves import BLUE, FEW, INK, ORANGE, Round, gamma_figure, styled
from fed_diffusion.report.markup import (
    MOST_ROWS,
    NONE,
    folded,
    mapping,
    mappings,
    number,
    pair,
    part,
    percent,
    plain,
    plot,
    section,
    soft,
    table,
    warning,
)
from fed_diffusion.report.records import Record

if TYPE_CHECKING:
    from fed_diffusion.analysis.advisor import Row

TERMS = {
    "initial": "F(θ₀)",
    "gap": "|Fₙ(θ₀) – F(θ₀)|",
    "drift": "σ₂ ‖θ_R – θ₀‖",
    "pruning": "pruning, w² L² N / Γ*",
    "heterogeneity": "heterogeneity, σ₂² N / Γ*",
    "noise": "noise, σ₁² N / Γ*²",
    "variance": "variance, σ₁² + σ₂²",
    "kappa2_d_K": "steps, κ² d K",
    "kappa_M2": "steps, κ M₂",
    "kappa_d_T": "steps, κ d T",
    "prior": "prior, (d + M₂) e^(–2T)",
}
"""The terms of Theorem 4.11 as they are drawn; C_1 is unknown for a run, and left out."""
NAMES = {
    "F": "F(θ₀) / (Z d)",
    "Fn": "Fₙ(θ₀) / (Z d), largest worker's",
    "gradient": "‖∇F(θ₀)‖",
    "sigma1": "σ₁, mean over workers and rounds",
    "sigma2": "σ₂, largest worker's, mean over rounds",
    "L": "L, power iteration on one minibatch",
    "L_secant": "L, secant between rounds",
}
MOST_WORKERS = 40
"""The number of workers whose w² is drawn."""


def theory_section(record: Record) -> str:
    """Return what the theory says of a run, folded: Γ, the bound and its terms, w², Lemma 4.6."""
    summary = "How many clients trained each parameter, and what Theorem 4.11 says of that"
    return section("Theory", folded(summary, _gamma(record) + part("The bound", _bound(record))))


def _gamma(record: Record) -> str:
    if not record.rounds:
        return ""
    known = [entry["gamma"] for entry in record.rounds if entry.get("gamma") is not None]
    least = record.results.get("gamma_star", min(known, default=None))
    text = f"Γ* = {number(least)}: the fewest trainers that any coordinate had in any round."
    if least == 0:
        text += " That is outside Theorem 4.11: with Γ* = 0 its bound is infinite."
    covered = [float(e["trained"]) for e in record.rounds if e.get("trained") is not None]
    if covered:
        text += f" In the round of least coverage {percent(min(covered))} of the coordinates"
        text += " had a trainer" + ("; the others kept their values." if min(covered) < 1 else ".")
    if mapping(record.settings.get("round")).get("fraction", 1) != 1:
        text += " Only a part of the clients is drawn each round, which the theorem does not cover."
    factor = [float(v) for e in record.rounds if (v := e.get("w2_n_over_gamma")) is not None]
    if factor:
        text += f" w² N / Γ, as it stands in the bound, was at most {number(max(factor))}."
    clients = record.fact("clients")
    drawn = plot(
        gamma_figure(record.rounds, clients if isinstance(clients, int) else None),
        "Gamma per round",
    )
    return part("Γ and coverage", f"<p>{text}</p>{drawn}{_masks(record)}")


def _bound(record: Record) -> str:
    found = mapping(record.results.get("theory"))
    if not found:
        return ""
    if found.get("why"):
        text = f'<p class="soft">The bound is not evaluated: {plain(found["why"])}.</p>'
        return text + _unanswered(found)
    bounds = mapping(found.get("bound"))
    proved, printed = (mapping(bounds.get(v)) for v in ("as_proved", "as_printed"))
    return (
        _said(found, proved, printed)
        + plot(terms_figure(mapping(proved.get("terms"))), "terms of the bound")
        + _lemma(found)
        + _estimates(found)
        + _unanswered(found)
        + _conditions(found)
        + _images(found)
    )


def _said(found: Mapping[str, Any], proved: Mapping[str, Any], printed: Mapping[str, Any]) -> str:
    """Return the bound in words, and what dominates it."""
    text = (
        f"Theorem 4.11 bounds KL(q<sub>δ</sub> ‖ p) by {number(proved.get('total'))} nats as "
        f"proved{_between(proved)}, {number(printed.get('total'))} as printed"
        f"{_between(printed)} (constant 1, C₁ taken as 0). {plain(found.get('says'))}"
    )
    note = ""
    if found.get("infinite"):
        text = plain(found.get("says"))
    elif not found.get("covered"):
        note = warning("Not every condition of the theorem holds; the number is no guarantee.")
    return f"{note}<p>{text}</p>"


def _between(bound: Mapping[str, Any]) -> str:
    """Return the interval that those of the estimates imply."""
    if bound.get("low") is None or bound.get("high") is None:
        return ""
    return f" ({number(bound['low'])} to {number(bound['high'])} by the estimates' 95 % intervals)"


def _masks(record: Record) -> str:
    """Return coverage, w² and what they make together, which are known for every run."""
    rounds = record.rounds
    drawn = ""
    if any(entry.get("coverage") for entry in rounds):
        drawn += plot(coverage_figure(rounds), "trainers per coordinate")
    if any(float(c.get("w2") or 0) > 0 for e in rounds for c in mappings(e.get("clients"))):
        drawn += plot(w2_figure(rounds), "w² per worker") or _last_w2(rounds)
    return drawn


def _last_w2(rounds: Sequence[Round]) -> str:
    """Return w² of each worker in the last round, for a run in which w² hardly moves."""
    clients = mappings(rounds[-1].get("clients"))
    rows = [(plain(client.get("client")), number(client.get("w2"))) for client in clients]
    if len({w2 for _, w2 in rows}) == 1:
        return f"<p>w² is {rows[0][1]} for every worker in the last round.</p>"
    shown = table(("worker", "w² in the last round"), rows[:MOST_WORKERS])
    hidden = len(rows) - MOST_WORKERS
    return shown + (soft(f"and {hidden:,} more in metrics.jsonl") if hidden > 0 else "")


def _estimates(found: Mapping[str, Any]) -> str:
    rows = [
        (
            NAMES.get(name, plain(name)),
            number(entry.get("value")),
            _interval(entry),
            "from below" if entry.get("lower") else "",
        )
        for name, entry in mapping(found.get("estimates")).items()
        if isinstance(entry, Mapping)
    ]
    text = (
        f"Measured in rounds {pair(found.get('rounds'), ', ')} by "
        f"{number(found.get('workers'))} workers that held the whole network, on "
        f"{number(found.get('minibatches'))} minibatches each or more, on the scale of the "
        f"simple loss; F is Z d = {number(found.get('Z_d'))} times as large. w² N / Γ* = "
        f"{number(found.get('w2_n_over_gamma'))}, ‖θ_R – θ₀‖ = {number(found.get('drift'))}, "
        f"M₂ = {number(found.get('M2'))}. From below: what is estimated is at most the largest "
        "value anywhere, which the theorem asks for; the estimate's noise is in its interval. One "
        "minibatch's loss is more curved than Fₙ."
    )
    return f"<p>{text}</p>" + table(("quantity", "value", "95 % interval", "estimated"), rows)


def _interval(entry: Mapping[str, Any]) -> str:
    value, error, ends = (entry.get(key) for key in ("value", "error", "ends"))
    if isinstance(ends, list) and len(ends) == 2:
        return f"{number(ends[0])} to {number(ends[1])}"
    if not isinstance(value, int | float) or not isinstance(error, int | float):
        return NONE
    return "exact" if error == 0 else f"{number(value - error)} to {number(value + error)}"


def _unanswered(found: Mapping[str, Any]) -> str:
    rows = [
        (number(entry.get("round")), number(entry.get("client")), plain(entry.get("reason")))
        for entry in mappings(found.get("unanswered"))[:MOST_ROWS]
    ]
    if not rows:
        return ""
    text = warning("Some workers could not measure everything; their updates count all the same.")
    return text + table(("round", "worker", "why"), rows, text=(2,))


def _lemma(found: Mapping[str, Any]) -> str:
    """Return Lemma 4.6: both sides, the left one as it was measured."""
    lemma = mapping(found.get("lemma_4_6"))
    if lemma.get("rounds") and lemma.get("right") is not None:
        allows = (
            f"Lemma 4.6 allows ‖∇F‖² {number(lemma['right'])} nats² on average over θ₀, …, "
            f"θ<sub>{number(lemma['rounds'] - 1)}</sub>, as F was last measured at "
            f"θ<sub>{number(lemma['rounds'])}</sub>."
        )
    else:
        allows = "Lemma 4.6 needs F at two θ, and it was measured at θ₀ only, or Γ* = 0."
    rows = [
        (number(point[0]), number(point[1]), _interval({"value": point[1], "error": error}))
        for point, error in _points(lemma)
    ]
    head = ("at the start of round", "‖∇F‖², nats², unbiased: noise can bring it below 0", "95 %")
    figure = plot(gradient_figure(found), "squared gradient norm and Lemma 4.6")
    return f"<p>{allows}</p>{figure}{table(head, rows)}"


def _points(lemma: Mapping[str, Any]) -> list[tuple[list[Any], float | None]]:
    """Return [round, ||grad F||²] and half its interval, for a record of any age."""
    left = [point for point in lemma.get("left") or [] if isinstance(point, list)]
    known = [point for point in left if len(point) >= 2 and point[1] is not None]
    return [(point[:2], point[2] if len(point) > 2 else None) for point in known]


def _conditions(found: Mapping[str, Any]) -> str:
    rows = [
        (plain(c.get("name")), "yes" if c.get("holds") else "no", plain(c.get("says")))
        for c in mappings(found.get("conditions"))
    ]
    caveats = found.get("caveats")
    beside = caveats if isinstance(caveats, list) else []
    items = "".join(f"<li>{plain(caveat)}</li>" for caveat in beside)
    text = f"<p>Whether they hold or not:</p><ul>{items}</ul>" if items else ""
    return table(("condition", "holds", "in this run"), rows, text=(2,)) + text


def _images(found: Mapping[str, Any]) -> str:
    """Return which images the bound is about, and which images the run sampled."""
    images = mapping(found.get("images"))
    if not images:
        return ""
    differences = images.get("differences")
    differ = differences if isinstance(differences, list) else []
    rows = [
        ("the bound is about", plain(images.get("bound"))),
        ("compared with", plain(images.get("compared_with"))),
        ("this run sampled", plain(images.get("run"))),
        ("what differs", plain("; ".join(map(str, differ)) or "nothing")),
    ]
    return table(("images", "which"), rows, text=(1,))


# --- figures -------------------------------------------------------------------------------------


def terms_figure(terms: Mapping[str, Any]) -> Figure:
    """Draw the terms of the bound in nats, a bar each on a logarithmic scale; zeros have no bar."""
    known = {TERMS[name]: v for name, v in terms.items() if name in TERMS and v}
    figure = Figure(figsize=(7.2, 0.6 + 0.27 * max(len(known), 1)), layout="constrained")
    axes = _axes(figure, "nats", "")
    axes.barh(list(known), list(known.values()), color=BLUE, height=0.7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.8)
    return figure


def coverage_figure(rounds: Sequence[Round]) -> Figure:
    """Draw the share of the coordinates by how many workers trained them, for the worst round."""
    known = [entry for entry in rounds if entry.get("coverage")]
    least = min(known, key=lambda entry: entry.get("gamma") or 0)
    counts = {int(count): int(coordinates) for count, coordinates in least["coverage"].items()}
    total = sum(counts.values())
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    axes = _axes(figure, f"trainers of a coordinate, round {least.get('round')}", "share")
    axes.bar(list(counts), [n / total for n in counts.values()], color=BLUE, width=0.8)
    axes.set_xlim(-0.6, max(counts) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def w2_figure(rounds: Sequence[Round]) -> Figure:
    """Draw w² of every worker under a mask, and w² N / Gamma, over the rounds."""
    workers: dict[str, list[tuple[int, float]]] = {}
    for entry in rounds:
        for client in mappings(entry.get("clients")):
            if float(client.get("w2") or 0) > 0:
                point = (int(entry["round"]), float(client["w2"]))
                workers.setdefault(str(client.get("client")), []).append(point)
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = _axes(figure, "round", "w²")
    marker = "o" if len(rounds) <= FEW else ""
    for index, points in enumerate(list(workers.values())[:MOST_WORKERS]):
        label = "w² of each worker" if index == 0 else None
        (line,) = axes.plot(*zip(*points, strict=True), label=label, color=BLUE, linewidth=1.2)
        line.set(alpha=0.6, marker=marker, markersize=3)
    factor = [
        (int(e["round"]), float(v)) for e in rounds if (v := e.get("w2_n_over_gamma")) is not None
    ]
    if factor:
        axes.plot(*zip(*factor, strict=True), color=ORANGE, linewidth=1.8, label="w² N / Γ")
    values = [value for points in (*workers.values(), factor) for _, value in points]
    if max(values) > 20 * min(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * max(values))
    axes.legend(frameon=False, labelcolor=INK, fontsize="small")
    return figure


def gradient_figure(found: Mapping[str, Any]) -> Figure:
    """Draw ||grad F||² as it was measured, with its interval, and the right side of Lemma 4.6.

    The axis is logarithmic away from 0, and shows what noise has brought below 0.
    """
    lemma = mapping(found.get("lemma_4_6"))
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    axes = _axes(figure, "round", "‖∇F‖², nats²")
    points = _points(lemma)
    if points:
        rounds, values = zip(*(point for point, _ in points), strict=True)
        errors = [error or 0.0 for _, error in points]
        axes.errorbar(rounds, values, errors, color=BLUE, marker="o", capsize=3, label="measured")
        axes.axhline(0, color=INK, linewidth=0.6)
    sizes = [abs(point[1]) for point, _ in points if point[1]]
    right = lemma.get("right")
    if right is not None:
        axes.axhline(right, color=ORANGE, label="Lemma 4.6 allows, on average")
        sizes.append(abs(right))
    axes.set_yscale("symlog", linthresh=min(filter(None, sizes), default=1.0))
    if points or right is not None:
        axes.legend(frameon=False, labelcolor=INK, fontsize="small")
    return figure


def _axes(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.add_subplot()
    styled(axes)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    return axes


def moves_figure(moves: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw the bound in nats against each argument, a panel each; infinite values are left out."""
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
