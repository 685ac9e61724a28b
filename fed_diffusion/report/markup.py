"""Pieces of the report's HTML: sections, tables, plots, and values as a reader wants them.

What goes in as a cell or a body is ready HTML; `plain` makes text of whatever came from a run.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fed_diffusion.common.text import shown
from fed_diffusion.report.curves import to_svg, varies
from fed_diffusion.report.style import CSS

MOST_ROWS = 200
NONE = "–"


def page(title: str, body: str) -> str:
    """Return a whole page around the body of its `<main>`; the title is text.

    Characters that cannot be shown are question marks on it, whatever part they stand in.
    """
    # the policy makes the browser hold the page to its promise of fetching nothing
    return shown(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}"
        "</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a section of the page, or nothing where its body is empty."""
    return f"<section><h2>{title}</h2>{body}</section>\n" if body else ""


def part(title: str, body: str) -> str:
    """Return a part of a section under its heading, or nothing where its body is empty."""
    return f"<h3>{title}</h3>{body}" if body else ""


def folded(summary: str, body: str) -> str:
    """Return what is shown when the reader opens it, or nothing where the body is empty."""
    return f"<details><summary>{summary}</summary>{body}</details>" if body else ""


def warning(text: str) -> str:
    return f'<p class="warn">{text}</p>'


def soft(text: str) -> str:
    return f'<p class="soft">{text}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Return rows of ready HTML as a table; the columns in `text` are set as running text.

    A column without any value is left out, and so is a table in which only its first column would
    be left.
    """
    rows = list(rows)
    shown = [i for i in range(len(head)) if any(row[i] not in ("", NONE) for row in rows)]
    if not set(shown) - {0}:
        return ""
    kind = [' class="text"' if i in text else "" for i in range(len(head))]
    cells = "".join(f'<th scope="col"{kind[i]}>{head[i]}</th>' for i in shown)
    body = "".join(
        "<tr>" + "".join(f"<td{kind[i]}>{row[i]}</td>" for i in shown) + "</tr>" for row in rows
    )
    whole = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return scrolled(f"table of {', '.join(head[i] for i in shown)}", whole)


def scrolled(label: str, body: str, kind: str = "") -> str:
    """Return a box that scrolls by itself, by keyboard too: the page is never wider than a
    phone.
    """
    name = escape(re.sub("<[^>]*>", "", label))
    kinds = f"wide {kind}".strip()
    return f'<div class="{kinds}" role="group" aria-label="{name}" tabindex="0">{body}</div>'


def more(total: int) -> str:
    hidden = total - MOST_ROWS
    return soft(f"and {hidden:,} more in metrics.jsonl") if hidden > 0 else ""


def plot(figure: Figure, label: str) -> str:
    """Return a figure as SVG, or nothing where it would show only a constant or a single point."""
    if not varies(figure):
        return ""
    return f"<figure>{scrolled(f'figure: {label}', to_svg(figure, label))}</figure>"


def png(source: Path | bytes, what: str) -> str:
    """Return a PNG as an `<img>` that holds its bytes.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    content = source if isinstance(source, bytes) else source.read_bytes()
    data = base64.b64encode(content).decode("ascii")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def spread(items: list[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
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
    """Return an integer with separators, a float to four digits, and a dash for null and NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else NONE


def pair(value: Any, between: str) -> str:
    """Return a number, or several of them, as text."""
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
