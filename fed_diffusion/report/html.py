"""One self-contained page about a run: no scripts, no fonts, nothing fetched from anywhere.

Whatever comes from the run directory is text to be escaped, client names and reasons first of all:
a client chooses them.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fed_diffusion.masks.budget import LIMITS
from fed_diffusion.report import curves
from fed_diffusion.report.records import Record, read_record
from fed_diffusion.report.style import CSS

MOST_ROWS = 200
MOST_GRIDS = 12
NONE = "–"
FIGURES = {
    "fid": "FID",
    "fid_floor": "FID of real images against real images (the floor)",
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}
STATED = {
    "extractor": "extractor",
    "extractor_sha256": "SHA-256 of its weights",
    "reference": "reference",
    "samples": "generated images",
    "nfe": "network evaluations per image (NFE)",
}


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run directory, finished or not, and return its path.

    Raises
    ------
    ConfigError
        It is no run directory.
    """
    run_dir = Path(run_dir)
    page = render(read_record(run_dir))
    target = run_dir / "report.html"
    unfinished = target.with_name(f".report.html.{os.getpid()}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def render(record: Record) -> str:
    """The page as a string."""
    title = escape(f"{_title(record)} – {record.name}")
    body = "".join(
        (
            _headline(record),
            _final_grid(record),
            _loss(record),
            _gamma(record),
            _bytes_section(record),
            _timeline(record),
            _quality(record),
            _clients(record),
            _budgets(record),
            _rejected(record),
            _privacy(record),
            _settings(record),
        )
    )
    # the policy makes the browser hold the page to its promise of fetching nothing
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}"
        "</main>\n</body>\n</html>\n"
    )


def _title(record: Record) -> str:
    method = record.fact("method")
    return f"{record.fact('preset') or 'run'}{f', {method}' if method else ''}"


def _headline(record: Record) -> str:
    results, quality = record.results, _mapping(record.results.get("quality"))
    planned = record.settings.get("rounds")
    last = record.rounds[-1] if record.rounds else {}
    facts = [
        ("clients", _number(record.fact("clients")), ""),
        ("rounds", _number(len(record.rounds)), f"of {_number(planned)} planned"),
        ("FID", _number(quality.get("fid")), f"floor {_number(quality.get('fid_floor'))}"),
        ("training loss", _number(results.get("loss", last.get("loss"))), "per dimension"),
        ("parameters", _number(results.get("parameters")), ""),
        ("time", _duration(_mapping(results.get("seconds")).get("total")), ""),
    ]
    items = "".join(
        f"<div><dt>{label}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
        for label, value, note in facts
    )
    state = ""
    if not results:
        reached = f"round {_number(last.get('round'))} was" if record.rounds else "no round was"
        state = _warning(f"This run is not finished: {reached} its last; there is no results.json.")
    if record.unreadable:
        state += _warning(f"{record.unreadable} lines of metrics.jsonl could not be read.")
    return (
        f"<header><h1>{escape(_title(record))}</h1>"
        f'<p class="soft">{escape(record.name)}, seed {_text(record.fact("seed"))}</p>'
        f'{state}<dl class="facts">{items}</dl></header>\n'
    )


def _final_grid(record: Record) -> str:
    if record.final is None:
        return _section("Samples", '<p class="soft">No final grid was drawn.</p>')
    return _section("Samples", f"<figure>{_png(record.final, 'images drawn at the end')}</figure>")


def _loss(record: Record) -> str:
    if not record.rounds:
        return _section("Loss", '<p class="soft">No round has ended.</p>')
    last = record.rounds[-1]
    text = (
        f"After round {_number(last.get('round'))}: training {_number(last.get('loss'))}, held out "
        f"{_number(last.get('holdout_loss'))} per dimension, and "
        f"{_number(last.get('dsm_objective'))} nats of the objective (5)."
    )
    plot = _plot(curves.loss_figure(record.rounds), "loss per round")
    return _section("Loss", f"<p>{text}</p>{plot}")


def _gamma(record: Record) -> str:
    if not record.rounds:
        return ""
    known = [entry["gamma"] for entry in record.rounds if entry.get("gamma") is not None]
    least = record.results.get("gamma_star", min(known, default=None))
    text = f"Γ* = {_number(least)}: the fewest trainers that any coordinate had in any round."
    if least == 0:
        text += " That is outside Theorem 4.11: with Γ* = 0 its bound is infinite."
    covered = [float(e["trained"]) for e in record.rounds if e.get("trained") is not None]
    if covered:
        text += f" In the round of least coverage {_percent(min(covered))} of the coordinates"
        text += " had a trainer" + ("; the others kept their values." if min(covered) < 1 else ".")
    if _mapping(record.settings.get("round")).get("fraction", 1) != 1:
        text += " Only a part of the clients is drawn each round, which the theorem does not cover."
    factor = [float(v) for e in record.rounds if (v := e.get("w2_n_over_gamma")) is not None]
    if factor:
        text += f" w² N / Γ, as it stands in the bound, was at most {_number(max(factor))}."
    plot = _plot(curves.gamma_figure(record.rounds, record.fact("clients")), "Gamma per round")
    return _section("Γ and coverage", f"<p>{text}</p>{plot}")


def _bytes_section(record: Record) -> str:
    if not record.rounds:
        return ""
    up, down, dense = (
        sum(entry.get(key) or 0 for entry in record.rounds)
        for key in ("bytes_up", "bytes_down", "dense_bytes")
    )
    text = f"{_bytes(up)} up and {_bytes(down)} down over the {len(record.rounds)} rounds"
    if dense:
        text += f", {_percent((up + down) / (2 * dense))} of sending the whole network in fp32"
        text += " both ways"
    plot = _plot(curves.bytes_figure(record.rounds), "bytes per round")
    return _section("Bytes per round", f"<p>{text}.</p>{plot}")


def _timeline(record: Record) -> str:
    grids = _spread(record.timeline, MOST_GRIDS)
    if not grids:
        return ""
    figures = "".join(
        f"<figure>{_png(path, f'after round {number}')}<figcaption>round {number}</figcaption>"
        "</figure>"
        for number, path in grids
    )
    return _section("The same noise, round by round", f'<div class="timeline">{figures}</div>')


def _quality(record: Record) -> str:
    quality = _mapping(record.results.get("quality"))
    if not quality:
        return _section("Quality", '<p class="soft">No quality figures.</p>')
    intervals = _mapping(quality.get("intervals"))
    rows = [
        (label, _pair(quality.get(key), " ± "), _pair(intervals.get(key), " to "))
        for key, label in FIGURES.items()
    ]
    rows += [(label, _number(quality.get(key)), "") for key, label in STATED.items()]
    rows.append(("seed", _text(quality.get("seed", record.fact("seed"))), ""))
    why = quality.get("why")
    note = _warning(f"No figures: {escape(str(why))}.") if why else ""
    note += "<p>Figures compare only with others of the same extractor, reference and number of "
    note += "images. All images are uint8, 0 to 255.</p>"
    table = _table(("figure", "value", "95 % interval"), rows, text=(1,))
    how = f'<p class="soft">Intervals: {_text(intervals["how"])}</p>' if "how" in intervals else ""
    return _section("Quality", note + table + how) + _memorisation(quality.get("memorisation"))


def _memorisation(found: Any) -> str:
    """Whether generated images are nearer to training images than held-out ones, and to whose."""
    if not isinstance(found, Mapping):
        return ""
    if found.get("why"):
        return _section("Copies", f'<p class="soft">Not looked for: {_text(found["why"])}.</p>')
    copied = found.get("copied") or []
    text = (
        f"{_number(found.get('closer'))} of the generated images are nearer to a training image "
        f"than {_number(found.get('tau'))} grey levels (root mean square); of held-out images it "
        f"would be {_number(found.get('expected'))} (p = {_number(found.get('p_value'))}). Median "
        f"distance: {_number(found.get('median_ratio'))} times that of held-out images."
    )
    note = _warning(f"Images of clients {_pair(copied, ', ')} are copied.") if copied else ""
    clients = _mappings(found.get("clients"))
    keys = ("client", "images", "share", "held_out_share", "closer")
    rows = [[_number(client.get(key)) for key in keys] for client in clients[:MOST_ROWS]]
    head = ("client", "images", "nearest to generated", "to held out", "copied")
    return _section("Copies", f"{note}<p>{text}</p>{_table(head, rows)}{_more(len(clients))}")


def _clients(record: Record) -> str:
    if not record.rounds:
        return ""
    last = record.rounds[-1]
    clients = _mappings(last.get("clients"))
    if not clients:
        return ""
    head = ["client", "kind", "keep", "loss", "held out", "w²", "images", "time", "up", "down"]
    rows = [
        (
            _text(client.get("client")),
            _text(client.get("kind")),
            _number(client.get("keep")),
            _number(client.get("loss")),
            _number(client.get("holdout_loss")),
            _number(client.get("w2")),
            _number(client.get("images")),
            _duration(client.get("seconds")),
            _bytes(client.get("bytes_up")),
            _bytes(client.get("bytes_down")),
        )
        for client in clients[:MOST_ROWS]
    ]
    body = _table(head, rows) + _more(len(clients))
    return _section(f"Clients in round {_number(last.get('round'))}", body)


def _budgets(record: Record) -> str:
    if not record.budgets:
        return ""
    rows = []
    for client, entry in list(record.budgets.items())[:MOST_ROWS]:
        budget = _mapping(entry)
        limit = dict(enumerate(LIMITS)).get(budget.get("budget.limit", -1))
        rows.append(
            (
                _text(client),
                _number(budget.get("keep")),
                limit or "said by its node",
                _number(budget.get("budget.memory_mb")),
                _number(budget.get("budget.memory_cap_mb")),
                _duration(budget.get("budget.seconds")),
                _duration(budget.get("budget.seconds_cap")),
            )
        )
    head = ("client", "keep", "limited by", "peak, MB", "allowed, MB", "local steps", "allowed")
    text = "<p>What each client's machine can carry; peaks and times are predictions.</p>"
    return _section("Budgets", text + _table(head, rows) + _more(len(record.budgets)))


def _rejected(record: Record) -> str:
    found = [
        (_number(entry.get("round")), _text(item.get("client")), _text(item.get("reason")))
        for entry in record.rounds
        for item in _mappings(entry.get("rejected"))
    ]
    if not found:
        return _section("Rejected updates", '<p class="soft">None.</p>') if record.rounds else ""
    plot = _plot(curves.rejected_figure(record.rounds), "rejected updates per round")
    table = _table(("round", "client", "reason"), found[:MOST_ROWS], text=(2,))
    return _section("Rejected updates", f"{plot}{table}{_more(len(found))}")


def _privacy(record: Record) -> str:
    found = _mapping(record.results.get("privacy"))
    if not found:
        return ""
    text = (
        f"({_number(found.get('epsilon'))}, {_number(found.get('delta'))})-differential privacy of "
        f"clients after {_number(found.get('rounds'))} rounds: differences clipped to "
        f"{_number(found.get('clip'))}, noise of {_number(found.get('sigma'))} on their sum, each "
        f"client drawn with probability {_number(found.get('sampling_rate'))}. It covers "
        f"{_text(found.get('covers'))}. The noise is the operating system's: this run cannot be "
        "repeated to the bit."
    )
    return _section("Privacy", f"<p>{text}</p>")


def _settings(record: Record) -> str:
    rows = [
        (f"<code>{escape(str(key))}</code>", _text(value)) for key, value in _flat(record.settings)
    ]
    table = _table(("key", "value"), rows, text=(1,))
    return _section("Settings", f"<details><summary>All settings</summary>{table}</details>")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"


def _warning(text: str) -> str:
    return f'<p class="warn">{text}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Rows of ready HTML; the columns in `text` are set as running text."""
    kind = [' class="text"' if i in text else "" for i in range(len(head))]
    cells = "".join(f"<th{k}>{name}</th>" for k, name in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    whole = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def _more(total: int) -> str:
    hidden = total - MOST_ROWS
    return f'<p class="soft">and {hidden:,} more in metrics.jsonl</p>' if hidden > 0 else ""


def _plot(figure: Figure, label: str) -> str:
    return f'<figure class="wide">{curves.to_svg(figure, label)}</figure>'


def _png(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [_mapping(item) for item in value] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return NONE if value is None else escape(str(value))


def _number(value: Any) -> str:
    """An integer with separators, a float to four digits; a dash for null and NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else NONE


def _pair(value: Any, between: str) -> str:
    """A number, or several of them."""
    numbers = value if isinstance(value, list) else [value]
    return between.join(map(_number, numbers)) or NONE


def _percent(share: float) -> str:
    return f"{math.floor(share * 1000) / 10:g} %"  # rounded down: 100 % is said of all only


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _bytes(count: Any) -> str:
    if not isinstance(count, int | float) or not math.isfinite(count):
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
