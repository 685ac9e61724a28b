"""One self-contained page about a run: no scripts, no fonts, nothing fetched from anywhere.

The page has the order in which a person looks at a run: the images, how good they are, how training
went, who took part, what is promised and given away, and what the run cost; the theory comes last.
All text from the run directory is escaped, above all client names and reasons, since a client
chooses them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from fed_diffusion.report import curves
from fed_diffusion.report.clients import clients_section
from fed_diffusion.report.markup import (
    byte_size,
    duration,
    flat,
    folded,
    mapping,
    number,
    page,
    percent,
    plain,
    plot,
    section,
    soft,
    table,
    warning,
)
from fed_diffusion.report.quality import privacy_section, quality_section
from fed_diffusion.report.records import Record, read_record
from fed_diffusion.report.samples import samples_section
from fed_diffusion.report.theory import theory_section

logger = logging.getLogger(__name__)


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run directory, finished or not, and return its path.

    Raises
    ------
    ConfigError
    The folder is not a run directory.
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
    """Return the page as a string."""
    body = "".join(
        _lenient(record, title, part)
        for title, part in (
            ("", _headline),
            ("Samples", samples_section),
            ("Quality", quality_section),
            ("Loss", _loss),
            ("Adapter", _adapter_gap),
            ("Clients", clients_section),
            ("Privacy and copies", privacy_section),
            ("Bytes", _bytes_section),
            ("Settings", _settings),
            ("Theory", theory_section),
        )
    )
    return page(f"{trained_on(record)} – {record.name}", body)


def _lenient(record: Record, title: str, part: Callable[[Record], str]) -> str:
    """Return a part of the page or, where the record is damaged, a sentence about the damage.

    A run directory can hold anything: files that a crash cut off, that somebody edited, or that
    another version wrote. One bad value costs its part of the page, and never the page or the run.
    """
    try:
        return part(record)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        logger.warning("the report of %s leaves out %s: %s", record.name, title or "its head", why)
        said = f"This part of the record is damaged and cannot be shown: {escape(why)}."
        if not title:
            return f"<header><h1>{escape(record.name)}</h1>{warning(said)}</header>\n"
        return section(title, warning(said))


def trained_on(record: Record) -> str:
    """Return what the run was trained on, as a title: a data set's name, or that of a folder."""
    data = mapping(record.settings.get("data"))
    name, folder = str(data.get("name") or "unknown images"), data.get("dir")
    if name == "image_folder" and folder:
        return Path(str(folder)).name or str(folder)
    return name.rpartition(":")[2] or name


def _subtitle(record: Record) -> str:
    """Return how the model was trained, in one line."""
    images, classes = record.data.get("images"), len(mapping(record.data.get("classes")))
    parts = [
        f"{number(images)} images" if images is not None else None,
        f"{classes:,} classes" if classes > 1 else None,
        plain(method) if (method := record.fact("method")) else None,
        f"preset {plain(record.fact('preset'))}",
        f"seed {plain(record.fact('seed'))}",
        f"run {escape(record.name)}",
    ]
    return " · ".join(filter(None, parts))


def _headline(record: Record) -> str:
    results, quality = record.results, mapping(record.results.get("quality"))
    last = record.rounds[-1] if record.rounds else {}
    floor = quality.get("fid_floor")
    epsilon = mapping(results.get("privacy")).get("epsilon")
    facts = [
        ("clients", record.fact("clients"), ""),
        ("rounds", len(record.rounds), f"of {number(record.settings.get('rounds'))} planned"),
        ("FID", quality.get("fid"), f"floor {number(floor)}" if floor is not None else ""),
        ("training loss", results.get("loss", last.get("loss")), "per dimension"),
        ("parameters", results.get("parameters"), ""),
        ("privacy, ε", epsilon, "of a client"),
    ]
    shown = [(label, number(value), note) for label, value, note in facts if value is not None]
    if (seconds := mapping(results.get("seconds")).get("total")) is not None:
        shown.append(("time", duration(seconds), ""))
    items = "".join(
        f"<div><dt>{label}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
        for label, value, note in shown
    )
    return (
        f"<header><h1>{escape(trained_on(record))}</h1>"
        f'<p class="soft">{_subtitle(record)}</p>'
        f'{_state(record)}<dl class="facts">{items}</dl></header>\n'
    )


def _state(record: Record) -> str:
    """Return what a reader must know first: that the run is not finished, or its record damaged."""
    state = ""
    if not record.results and "results.json" not in record.damaged:
        last = record.rounds[-1].get("round") if record.rounds else None
        reached = "no round was" if last is None else f"round {number(last)} was"
        state = f"This run is not finished: {reached} its last when this page was written."
        if reason := record.status.get("reason"):
            state += f" It {plain(record.status.get('state'))}: {plain(reason)}"
        state = warning(state)
    if record.unreadable:
        state += warning(f"{record.unreadable} lines of metrics.jsonl could not be read.")
    for name in record.damaged:
        state += warning(f"{name} is damaged and could not be read.")
    return state


def _loss(record: Record) -> str:
    if not record.rounds:
        return section("Loss", soft("No round has ended."))
    last = record.rounds[-1]
    held_out = last.get("holdout_loss")
    text = (
        f"After round {number(last.get('round'))}: training {number(last.get('loss'))}"
        + (f", held out {number(held_out)}" if held_out is not None else "")
        + f" per dimension, and {number(last.get('dsm_objective'))} nats of the objective (5)."
    )
    drawn = plot(curves.loss_figure(record.rounds), "loss per round, of all and of each client")
    return section("Loss", f"<p>{text}</p>{drawn}")


def _adapter_gap(record: Record) -> str:
    """Return what averaging the factors of an adapter apart has lost; nothing for other runs."""
    measured = [entry for entry in record.rounds if entry.get("adapter_gap")]
    if not measured:
        return ""
    last = measured[-1]
    text = (
        f"In round {number(last.get('round'))} the product of the clients' mean factors was "
        f"{number(last['adapter_gap'].get('absolute'))} from the mean of their products, which is "
        f"{percent(last['adapter_gap'].get('relative') or 0)} of its norm. The average of the "
        "factors loses so much; with lora.train = B it loses nothing."
    )
    drawn = plot(curves.gap_figure(measured), "gap of the adapter per round")
    return section("Adapter", f"<p>{text}</p>{drawn}")


def _bytes_section(record: Record) -> str:
    if not record.rounds:
        return ""
    up, down, dense = (
        sum(entry.get(key) or 0 for entry in record.rounds)
        for key in ("bytes_up", "bytes_down", "dense_bytes")
    )
    rounds = len(record.rounds)
    text = f"{byte_size(up)} up and {byte_size(down)} down over {_counted(rounds, 'round')}"
    if rounds > 1:
        text += f" ({byte_size(up / rounds)} and {byte_size(down / rounds)} a round)"
    if dense:
        text += f", {percent((up + down) / (2 * dense))} of sending the whole network in fp32"
        text += " both ways"
    drawn = plot(curves.bytes_figure(record.rounds), "bytes per round")
    return section("Bytes", f"<p>{text}.</p>{drawn}")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _settings(record: Record) -> str:
    return section("Settings", folded("All settings", settings_table(record.settings)))


def settings_table(settings: Mapping[str, Any]) -> str:
    rows = [(f"<code>{escape(str(key))}</code>", plain(value)) for key, value in flat(settings)]
    return table(("key", "value"), rows, text=(1,))
