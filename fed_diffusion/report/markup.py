"""Pieces of the report's HTML: sections, tables, plots, and values as a reader wants them.

What goes in as a cell or a body is ready HTML; `plain` makes text of whatever came from a run.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fed_diffusion.report.curves import to_svg

MOST_ROWS = 200
NONE = "–"


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"


def warning(text: str) -> str:
    return f'<p class="warn">{text}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Rows of ready HTML; the columns in `text` are set as running text."""
    kind = [' class="text"' if i in text else "" for i in range(len(head))]
    cells = "".join(f"<th{k}>{name}</th>" for k, name in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    whole = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def more(total: int) -> str:
    hidden = total - MOST_ROWS
    return f'<p class="soft">and {hidden:,} more in metrics.jsonl</p>' if hidden > 0 else ""


def plot(figure: Figure, label: str) -> str:
    return f'<figure class="wide">{to_svg(figure, label)}</figure>'


def png(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    return [mapping(item) for item in value] if isinstance(value, list) else []


def plain(value: Any) -> str:
    return NONE if value is None else escape(str(value))


def number(value: Any) -> str:
    """An integer with separators, a float to four digits; a dash for null and NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else NONE


def pair(value: Any, between: str) -> str:
    """A number, or several of them."""
    numbers = value if isinstance(value, list) else [value]
    return between.join(map(number, numbers)) or NONE


def percent(share: float) -> str:
    return f"{math.floor(share * 1000) / 10:g} %"  # rounded down: 100 % is said of all only


def duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def byte_size(count: Any) -> str:
    if not isinstance(count, int | float) or not math.isfinite(count):
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
