"""Several runs side by side: only figures that compare, and the reason where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing

from fed_diffusion.config import ConfigError
from fed_diffusion.report import curves
from fed_diffusion.report.figures import FIGURES, Figure, Scale
from fed_diffusion.report.html import trained_on
from fed_diffusion.report.markup import (
    NONE,
    flat,
    mapping,
    page,
    plain,
    plot,
    png,
    scrolled,
    section,
    soft,
    table,
)
from fed_diffusion.report.records import Record, read_record

SHOWN = (*FIGURES, Figure("parameters", "parameters", lambda r: r["parameters"], 0))
NOT_FINISHED = "not finished"
UNKNOWN = "unknown"
CURVES = {"loss": "training loss per dimension", "holdout_loss": "held-out loss per dimension"}
LABELS = ("preset", "flower", "trackers", "worker")
"""The settings that change nothing about a run's figures."""


@dataclass(frozen=True)
class Comparison:
    """Several runs with a table of their figures.

    Attributes
    ----------
    records
        The runs, with names that differ.
    cells
        For each of `SHOWN` what stands in the column of each run: its value as it is written, or
        why it has none that compares with the first run's that has one.
    differing
        The settings that are not the same in all runs: key -> the value in each.
    """

    records: Sequence[Record]
    cells: dict[str, list[str]]
    differing: dict[str, list[str]]


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the runs and set their figures side by side.

    Raises
    ------
    ConfigError
        Fewer than two different runs are given, or one of them is not a run directory.
    """
    if len({path.resolve() for path in paths}) < 2 or len({*map(Path.resolve, paths)}) < len(paths):
        raise ConfigError("compare needs at least two run directories, each of them once.")
    records = _named(paths, [read_record(path) for path in paths])
    cells = {figure.key: _row(figure, records) for figure in SHOWN}
    return Comparison(records, cells, _differing(records))


def _named(paths: Sequence[Path], records: Sequence[Record]) -> list[Record]:
    """Return the records under names that differ, with the folder of a run where that is needed."""
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path.resolve()) for path in paths]
    return [replace(record, name=name) for record, name in zip(records, names, strict=True)]


# --- what compares -------------------------------------------------------------------------------


def _judged(record: Record) -> dict[str, Any]:
    """Return what a quality figure depends on, beside the model."""
    quality = mapping(record.results.get("quality"))
    judge = (quality.get("extractor"), quality.get("extractor_sha256"))
    return {
        "judge": judge,
        "reference": quality.get("reference"),
        "number of samples": quality.get("samples"),
        **_data(record),
    }


def _data(record: Record) -> dict[str, Any]:
    """Return the hash of the images or, where the server has none, what is set about them."""
    data = mapping(record.settings.get("data"))
    keys = ("name", "dir", "size", "channels", "background")
    return {"data": record.images_hash or tuple(str(data.get(key)) for key in keys)}


def _loss(record: Record) -> dict[str, Any]:
    """Return what the loss is a mean over, beside the model: images, and times by their weights."""
    diffusion = mapping(record.settings.get("diffusion"))
    times = tuple(diffusion.get(key) for key in ("T", "delta", "K", "partition"))
    return {**_data(record), "partition of time": times}


def _held_out(record: Record) -> dict[str, Any]:
    holdout = mapping(record.settings.get("data")).get("holdout")
    return {**_loss(record), "part held out": holdout}


CONDITIONS: dict[Scale, Callable[[Record], dict[str, Any]]] = {
    "judged": _judged,
    "loss": _loss,
    "held out": _held_out,
    "fact": lambda record: {},
}


def why_not(scale: Scale, first: Record, other: Record) -> str | None:
    """Return why another run's figure does not compare with the first one's; None if it does."""
    expected, found = CONDITIONS[scale](first), CONDITIONS[scale](other)
    differ = [name for name, value in expected.items() if found[name] != value]
    return f"another {' and '.join(differ)}" if differ else None


def _row(figure: Figure, records: Sequence[Record]) -> list[str]:
    first: Record | None = None
    cells = []
    for record in records:
        value, missing = _value(figure, record)
        if value is None:
            cells.append(missing)
            continue
        first = first or record
        cells.append(why_not(figure.scale, first, record) or figure.written(value))
    return cells


def _value(figure: Figure, record: Record) -> tuple[float | None, str]:
    """Return a run's value of a figure, or None and the reason."""
    if "results.json" in record.damaged:
        return None, "results.json is damaged"
    if not record.results:
        return None, NOT_FINISHED
    try:
        value = figure.value(record.results)
    except (KeyError, TypeError, AttributeError, IndexError):
        return None, UNKNOWN
    if curves.is_number(value) and not isinstance(value, bool):
        return value, ""
    why = mapping(record.results.get("quality")).get("why") if figure.scale == "judged" else None
    return None, str(why) if why else NONE


def _differing(records: Sequence[Record]) -> dict[str, list[str]]:
    each = [dict(flat(record.settings)) for record in records]
    found = {}
    for key in dict.fromkeys(key for settings in each for key in settings):
        values = [NONE if (v := settings.get(key)) is None else str(v) for settings in each]
        if len(set(values)) > 1 and key.partition(".")[0] not in LABELS:
            found[key] = values
    return found


# --- the page ------------------------------------------------------------------------------------


def page_of(comparison: Comparison) -> str:
    """Return the comparison as a page, with the curves of the runs over one another."""
    records = comparison.records
    trained = ", ".join(dict.fromkeys(map(trained_on, records)))
    title = f"{trained}: {len(records)} runs compared"
    head = ("", *(plain(record.name) for record in records))
    rows = [(figure.title, *map(plain, comparison.cells[figure.key])) for figure in SHOWN]
    rows = [row for row in rows if set(row[1:]) != {NONE}]
    settings = [
        (f"<code>{plain(k)}</code>", *map(plain, v)) for k, v in comparison.differing.items()
    ]
    wide = range(1, len(head))
    body = (
        f"<header><h1>{escape(title)}</h1></header>\n"
        + section("Samples", _samples(records))
        + section("Figures", table(("figure", *head[1:]), rows, wide) + soft(EXPLAINED))
        + section("Curves", _curves(records))
        + section(
            "Settings that differ",
            table(("setting", *head[1:]), settings, wide)
            or soft("There are none: the runs have the same settings."),
        )
    )
    return page(title, body)


EXPLAINED = (
    "A figure stands here only if it compares with that of the first run that has one: the same "
    "judge, reference, number of samples and data for quality, the same data and partition of time "
    "for losses. Seconds are those of each run's own machine."
)


def _samples(records: Sequence[Record]) -> str:
    figures = "".join(
        f"<figure>{png(record.final, f'images generated by {record.name}')}"
        f"<figcaption>{plain(record.name)}</figcaption></figure>"
        for record in records
        if record.final is not None
    )
    return scrolled("images that each run generates", figures, "timeline") if figures else ""


def _curves(records: Sequence[Record]) -> str:
    body = ""
    for key, what in CURVES.items():
        drawing, left_out = overlaid(records, key)
        body += plot(drawing, f"{what} by round, of each run") if drawing is not None else ""
        said = "; ".join(f"{plain(name)}: {plain(why)}" for name, why in left_out.items())
        body += soft(f"Not drawn for the {what}: {said}.") if said else ""
    return body


def overlaid(records: Sequence[Record], key: str) -> tuple[Drawing | None, dict[str, str]]:
    """Return the curves of one loss that compare, over one another, and why others are left out."""
    scale: Scale = "held out" if key == "holdout_loss" else "loss"
    known = [r for r in records if any(curves.is_number(e.get(key)) for e in r.rounds)]
    left_out = {r.name: "no such curve" for r in records if all(r is not k for k in known)}
    left_out |= {r.name: why for r in known if (why := why_not(scale, known[0], r))}
    drawn = {r.name: [r.rounds] for r in known if r.name not in left_out}
    if not drawn:
        return None, left_out
    colours = zip((r.name for r in records), _cycle(len(records)), strict=True)
    return curves.overlaid_figure(drawn, key, CURVES[key], dict(colours)), left_out


def _cycle(number: int) -> list[str]:
    return [curves.COLOURS[i % len(curves.COLOURS)] for i in range(number)]


def free_name(path: Path) -> Path:
    """Return the path, or the path with a number in its name where a file exists already."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())
