"""The first part of the page: what the model draws, beside real images, class by class."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from fed_diffusion.report.grids import grid, tiles
from fed_diffusion.report.markup import (
    mapping,
    part,
    plain,
    png,
    scrolled,
    section,
    soft,
    spread,
)
from fed_diffusion.report.records import Record

MOST_CLASSES = 20
MOST_OF_A_CLASS = 12
IN_A_ROW = 6
MOST_GRIDS = 12

Drawn = tuple[Tensor, list[int]]
"""Images with their classes."""


def samples_section(record: Record) -> str:
    """Return generated images beside real ones, and the same noise round by round."""
    return section("Samples", _beside(record) + _timeline(record))


def _beside(record: Record) -> str:
    if record.final is None:
        if record.results or not record.timeline:
            return soft("No images have been drawn yet; the final ones are drawn at the end.")
        newest, path = record.timeline[-1]
        said = soft(f"Drawn after round {newest}; the final images are drawn at the end.")
        return said + _whole(path, record.real) + _about_real(record)
    generated = tiles(record.final)
    real = tiles(record.real) if record.real is not None else None
    if generated is not None and len(set(generated[1])) > 1:
        body = _by_class(generated, real, class_names(record))
    else:
        body = _whole(record.final, record.real)
    return body + _about_real(record)


def class_names(record: Record) -> list[str]:
    """Return the names of the classes by label, as far as the run directory has them."""
    counted = mapping(record.data.get("classes"))
    named = mapping(record.settings.get("data")).get("class_names")
    names = list(counted) or (named if isinstance(named, list) else [])
    return [str(name) for name in names]


def _by_class(generated: Drawn, real: Drawn | None, names: Sequence[str]) -> str:
    classes = sorted(set(generated[1]))
    few = min(min(map(generated[1].count, classes)), MOST_OF_A_CLASS)
    few -= few % min(few, IN_A_ROW)  # whole rows, and as many of each class
    generated = _first(few, generated)
    real = None if real is None else _first(few, real)
    rows = "".join(
        _row(label, names[label] if 0 <= label < len(names) else str(label), generated, real)
        for label in classes[:MOST_CLASSES]
    )
    hidden = len(classes) - MOST_CLASSES
    end = soft(f"and {hidden:,} more classes in samples/final.png") if hidden > 0 else ""
    kind = "beside" if real else "alone"
    head = '<span aria-hidden="true">class</span><span aria-hidden="true">generated</span>'
    head += '<span aria-hidden="true">real</span>' if real else ""
    return f'<div class="classes {kind}"><div class="head">{head}</div>{rows}</div>{end}'


def _row(label: int, name: str, generated: Drawn, real: Drawn | None) -> str:
    strips = _strip(generated, label, f"generated images of class {name}")
    if real is not None:
        strips += _strip(real, label, f"real images of class {name}") or "<div></div>"
    return f'<div class="row"><span class="name">{plain(name)}</span>{strips}</div>'


def _first(few: int, drawn: Drawn) -> Drawn:
    """Return the first few images of each class."""
    images, labels = drawn
    kept = [i for i, label in enumerate(labels) if labels[:i].count(label) < few]
    return images[kept], [labels[i] for i in kept]


def _strip(drawn: Drawn, label: int, what: str) -> str:
    images, labels = drawn
    mine = [i for i, own in enumerate(labels) if own == label]
    return png(_png(images[mine]), what) if mine else ""


def _png(images: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grid(images, IN_A_ROW)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _whole(final: Path, real: Path | None) -> str:
    pictures = [(final, "generated images")]
    pictures += [(real, "real images")] if real is not None else []
    figures = "".join(
        f"<figure>{png(path, what)}<figcaption>{what.capitalize()}</figcaption></figure>"
        for path, what in pictures
    )
    return f'<div class="pair">{figures}</div>'


def _about_real(record: Record) -> str:
    if record.real is not None:
        return soft(
            "The real images are from the data set that the clients trained on, so this page shows "
            "them to everyone who is given it."
        )
    if mapping(record.settings.get("privacy")).get("clip") is not None:
        return soft("Real images are left out, since the run is one with differential privacy.")
    return soft("There are no real images beside them: the server does not hold the clients' data.")


def _timeline(record: Record) -> str:
    grids = spread(record.timeline, MOST_GRIDS)
    if not grids:
        return ""
    figures = "".join(
        f"<figure>{png(path, f'generated images after round {round}')}"
        f"<figcaption>round {round}</figcaption></figure>"
        for round, path in grids
    )
    body = scrolled("images of the same noise after several rounds", figures, "timeline")
    return part("The same noise, round by round", body)
