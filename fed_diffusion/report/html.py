"""One self-contained page about a run: no scripts, no fonts, nothing fetched from anywhere.

Whatever comes from the run directory is text to be escaped, client names and reasons first of all:
a client chooses them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from fed_diffusion.masks.budget import LIMITS
from fed_diffusion.report import curves
from fed_diffusion.report.markup import (
    MOST_ROWS,
    byte_size,
    duration,
    flat,
    mapping,
    mappings,
    more,
    number,
    pair,
    percent,
    plain,
    plot,
    png,
    section,
    spread,
    table,
    warning,
)
from fed_diffusion.report.records import Record, read_record
from fed_diffusion.report.style import CSS
from fed_diffusion.report.theory import theory_section

MOST_GRIDS = 12
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
            theory_section(record),
            _bytes_section(record),
            _timeline(record),
            _quality(record),
            _clients(record),
            _data(record),
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
    results, quality = record.results, mapping(record.results.get("quality"))
    planned = record.settings.get("rounds")
    last = record.rounds[-1] if record.rounds else {}
    facts = [
        ("clients", number(record.fact("clients")), ""),
        ("rounds", number(len(record.rounds)), f"of {number(planned)} planned"),
        ("FID", number(quality.get("fid")), f"floor {number(quality.get('fid_floor'))}"),
        ("training loss", number(results.get("loss", last.get("loss"))), "per dimension"),
        ("parameters", number(results.get("parameters")), ""),
        ("time", duration(mapping(results.get("seconds")).get("total")), ""),
    ]
    items = "".join(
        f"<div><dt>{label}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
        for label, value, note in facts
    )
    state = ""
    if not results and "results.json" not in record.damaged:
        reached = f"round {number(last.get('round'))} was" if record.rounds else "no round was"
        state = warning(f"This run is not finished: {reached} its last; there is no results.json.")
    if record.unreadable:
        state += warning(f"{record.unreadable} lines of metrics.jsonl could not be read.")
    for name in record.damaged:
        state += warning(f"{name} is damaged and could not be read.")
    return (
        f"<header><h1>{escape(_title(record))}</h1>"
        f'<p class="soft">{escape(record.name)}, seed {plain(record.fact("seed"))}</p>'
        f'{state}<dl class="facts">{items}</dl></header>\n'
    )


def _final_grid(record: Record) -> str:
    if record.final is None:
        return section("Samples", '<p class="soft">No final grid was drawn.</p>')
    return section("Samples", f"<figure>{png(record.final, 'images drawn at the end')}</figure>")


def _loss(record: Record) -> str:
    if not record.rounds:
        return section("Loss", '<p class="soft">No round has ended.</p>')
    last = record.rounds[-1]
    text = (
        f"After round {number(last.get('round'))}: training {number(last.get('loss'))}, held out "
        f"{number(last.get('holdout_loss'))} per dimension, and "
        f"{number(last.get('dsm_objective'))} nats of the objective (5)."
    )
    drawn = plot(curves.loss_figure(record.rounds), "loss per round")
    return section("Loss", f"<p>{text}</p>{drawn}")


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
    text += _undefended(record)
    drawn = plot(curves.gamma_figure(record.rounds, record.fact("clients")), "Gamma per round")
    return section("Γ and coverage", f"<p>{text}</p>{drawn}")


def _undefended(record: Record) -> str:
    """For how many coordinates one liar decides, where liars are to be withstood."""
    known = [entry["undefended"] for entry in record.rounds if entry.get("undefended") is not None]
    if not known:
        return ""
    aggregation = mapping(record.settings.get("round")).get("aggregation", "the robust mean")
    if not max(known):
        return f" Whatever was trained had three trainers or more, as {aggregation} needs."
    return (
        f" In the worst round {number(max(known))} coordinates had one or two trainers: there "
        f"{aggregation} can leave nobody out, and one lying client decides."
    )


def _bytes_section(record: Record) -> str:
    if not record.rounds:
        return ""
    up, down, dense = (
        sum(entry.get(key) or 0 for entry in record.rounds)
        for key in ("bytes_up", "bytes_down", "dense_bytes")
    )
    text = f"{byte_size(up)} up and {byte_size(down)} down over the {len(record.rounds)} rounds"
    if dense:
        text += f", {percent((up + down) / (2 * dense))} of sending the whole network in fp32"
        text += " both ways"
    drawn = plot(curves.bytes_figure(record.rounds), "bytes per round")
    return section("Bytes per round", f"<p>{text}.</p>{drawn}")


def _timeline(record: Record) -> str:
    grids = spread(record.timeline, MOST_GRIDS)
    if not grids:
        return ""
    figures = "".join(
        f"<figure>{png(path, f'after round {round}')}<figcaption>round {round}</figcaption>"
        "</figure>"
        for round, path in grids
    )
    return section("The same noise, round by round", f'<div class="timeline">{figures}</div>')


def _quality(record: Record) -> str:
    quality = mapping(record.results.get("quality"))
    if not quality:
        return section("Quality", '<p class="soft">No quality figures.</p>')
    intervals = mapping(quality.get("intervals"))
    rows = [
        (label, pair(quality.get(key), " ± "), pair(intervals.get(key), " to "))
        for key, label in FIGURES.items()
    ]
    rows += [(label, number(quality.get(key)), "") for key, label in STATED.items()]
    rows.append(("seed", plain(quality.get("seed", record.fact("seed"))), ""))
    why = quality.get("why")
    note = warning(f"No figures: {escape(str(why))}.") if why else ""
    note += "<p>Figures compare only with others of the same extractor, reference and number of "
    note += "images. All images are uint8, 0 to 255.</p>"
    figures = table(("figure", "value", "95 % interval"), rows, text=(1,))
    how = f'<p class="soft">Intervals: {plain(intervals["how"])}</p>' if "how" in intervals else ""
    return section("Quality", note + figures + how) + _memorisation(quality.get("memorisation"))


def _memorisation(found: Any) -> str:
    """Whether generated images are nearer to training images than held-out ones, and to whose."""
    if not isinstance(found, Mapping):
        return ""
    if found.get("why"):
        return section("Copies", f'<p class="soft">Not looked for: {plain(found["why"])}.</p>')
    copied = found.get("copied") or []
    text = (
        f"{number(found.get('closer'))} of the generated images are nearer to a training image "
        f"than {number(found.get('tau'))} grey levels (root mean square); of held-out images it "
        f"would be {number(found.get('expected'))} (p = {number(found.get('p_value'))}). Median "
        f"distance: {number(found.get('median_ratio'))} times that of held-out images."
    )
    note = warning(f"Images of clients {pair(copied, ', ')} are copied.") if copied else ""
    clients = mappings(found.get("clients"))
    keys = ("client", "images", "share", "held_out_share", "closer")
    rows = [[number(client.get(key)) for key in keys] for client in clients[:MOST_ROWS]]
    head = ("client", "images", "nearest to generated", "to held out", "copied")
    return section("Copies", f"{note}<p>{text}</p>{table(head, rows)}{more(len(clients))}")


def _clients(record: Record) -> str:
    if not record.rounds:
        return ""
    last = record.rounds[-1]
    clients = mappings(last.get("clients"))
    if not clients:
        return ""
    head = ["client", "kind", "keep", "loss", "held out", "w²", "images", "time", "up", "down"]
    rows = [
        (
            plain(client.get("client")),
            plain(client.get("kind")),
            number(client.get("keep")),
            number(client.get("loss")),
            number(client.get("holdout_loss")),
            number(client.get("w2")),
            number(client.get("images")),
            duration(client.get("seconds")),
            byte_size(client.get("bytes_up")),
            byte_size(client.get("bytes_down")),
        )
        for client in clients[:MOST_ROWS]
    ]
    body = table(head, rows) + more(len(clients))
    return section(f"Clients in round {number(last.get('round'))}", body)


def _data(record: Record) -> str:
    """The classes by name, and what was not read; of a run whose server has the data."""
    found = mapping(record.results.get("data"))
    if not found:
        return ""
    notes = found.get("notes")
    said = notes if isinstance(notes, list) else []
    body = "".join(warning(escape(str(note))) for note in said)
    body += f"<p>{number(found.get('images'))} images in all, held-out ones included.</p>"
    classes = list(mapping(found.get("classes")).items())
    if classes:
        rows = [
            (str(label), plain(name), number(count))
            for label, (name, count) in enumerate(classes[:MOST_ROWS])
        ]
        body += table(("label", "class", "images"), rows, text=(1,))
        if len(classes) > MOST_ROWS:
            body += f'<p class="soft">and {len(classes) - MOST_ROWS:,} more in results.json</p>'
    return section("Data", body)


def _budgets(record: Record) -> str:
    if not record.budgets:
        return ""
    rows = []
    for client, entry in list(record.budgets.items())[:MOST_ROWS]:
        budget = mapping(entry)
        limit = dict(enumerate(LIMITS)).get(budget.get("budget.limit", -1))
        rows.append(
            (
                plain(client),
                number(budget.get("keep")),
                limit or "said by its node",
                number(budget.get("budget.memory_mb")),
                number(budget.get("budget.memory_cap_mb")),
                duration(budget.get("budget.seconds")),
                duration(budget.get("budget.seconds_cap")),
            )
        )
    head = ("client", "keep", "limited by", "peak, MB", "allowed, MB", "local steps", "allowed")
    text = "<p>What each client's machine can carry; peaks and times are predictions.</p>"
    return section("Budgets", text + table(head, rows) + more(len(record.budgets)))


def _rejected(record: Record) -> str:
    found = [
        (number(entry.get("round")), plain(item.get("client")), plain(item.get("reason")))
        for entry in record.rounds
        for item in mappings(entry.get("rejected"))
    ]
    if not found:
        return section("Rejected updates", '<p class="soft">None.</p>') if record.rounds else ""
    drawn = plot(curves.rejected_figure(record.rounds), "rejected updates per round")
    figures = table(("round", "client", "reason"), found[:MOST_ROWS], text=(2,))
    return section("Rejected updates", f"{drawn}{figures}{more(len(found))}")


def _privacy(record: Record) -> str:
    found = mapping(record.results.get("privacy"))
    if not found:
        return ""
    repeated = found.get("repeated")
    again = (
        f" ({number(repeated)} of them opened again, after a stop or below quorum)"
        if repeated
        else ""
    )
    text = (
        f"({number(found.get('epsilon'))}, {number(found.get('delta'))})-differential privacy of "
        f"clients after {number(found.get('rounds'))} rounds{again}: differences clipped to "
        f"{number(found.get('clip'))}, noise of {number(found.get('sigma'))} on their sum, each "
        f"client drawn with probability {number(found.get('sampling_rate'))}. It covers "
        f"{plain(found.get('covers'))}. The noise is the operating system's: this run cannot be "
        "repeated to the bit."
    )
    return section("Privacy", f"<p>{text}</p>")


def _settings(record: Record) -> str:
    rows = [
        (f"<code>{escape(str(key))}</code>", plain(value)) for key, value in flat(record.settings)
    ]
    figures = table(("key", "value"), rows, text=(1,))
    return section("Settings", f"<details><summary>All settings</summary>{figures}</details>")
