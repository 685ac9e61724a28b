"""The clients on the page: what each holds and can carry, its times, and which were refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fed_diffusion.masks.budget import LIMITS
from fed_diffusion.report import curves
from fed_diffusion.report.markup import (
    MOST_ROWS,
    NONE,
    byte_size,
    duration,
    folded,
    mapping,
    mappings,
    more,
    number,
    part,
    plain,
    plot,
    section,
    soft,
    table,
    warning,
)
from fed_diffusion.report.records import Record

HEAD = (
    *("client", "name", "trains on", "held out", "mask", "keep", "computes in", "rounds"),
    *("loss", "held-out loss", "time per round", "up", "down"),
)
SAID_ONCE = ("mask", "keep", "computes in", "rounds")
"""The columns that become a sentence where their value is the same for all clients."""
MOST_LABELS = 12
"""The number of classes that have a column each; of more, the most frequent ones are named."""
MOST_NAMED = 3


def clients_section(record: Record) -> str:
    """Return a line per client over all rounds, then labels, budgets, refusals and the classes."""
    seen = _seen(record)
    held = {str(entry.get("client")): entry for entry in mappings(record.data.get("clients"))}
    names = list(dict.fromkeys([*held, *seen]))
    rows = [_row(name, held.get(name, {}), seen.get(name, [])) for name in names[:MOST_ROWS]]
    same = _same(rows)
    shown = [i for i in range(len(HEAD)) if HEAD[i] not in same]
    cells = [[row[i] for i in shown] for row in rows]
    body = table([HEAD[i] for i in shown], cells, text=(1,)) + more(len(names))
    if body:
        body = f"<p>{_explained(record, same)}</p>{body}"
    body += part("Labels", _labels(record, held))
    body += part("Budgets", _budgets(record)) + part("Rejected updates", _rejected(record))
    body += part("Lying clients", _undefended(record))
    return section("Clients", body + part("Data", _data(record)))


def _seen(record: Record) -> dict[str, list[Mapping[str, Any]]]:
    """Return every client's lines over the rounds, by the client as text."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in record.rounds:
        for client in mappings(entry.get("clients")):
            found.setdefault(str(client.get("client")), []).append(client)
    return found


def _same(rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return the columns in which all clients, at least two, have the same value."""
    columns = dict(zip(HEAD, zip(*rows, strict=True), strict=False)) if len(rows) > 1 else {}
    return {
        name: columns[name][0]
        for name in SAID_ONCE
        if name in columns and set(columns[name]) != {NONE} and len(set(columns[name])) == 1
    }


def _explained(record: Record, same: Mapping[str, str]) -> str:
    text = "A loss is a client's last one, a time its mean per round, and traffic the sum over all"
    text += " rounds; keep is the part of the network's parameters that it trains."
    if same:
        listed = ", ".join(f"{name} {value}" for name, value in same.items())
        text += f" The same for every client: {listed}."
    late = max((e.get("staleness") or 0 for e in record.rounds), default=0)
    if late:
        text += f" The model changed at most {number(late)} times while a client trained."
    return text


def _row(name: str, holds: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    last = lines[-1] if lines else {}
    times = _numbers(lines, "seconds")
    return [
        plain(name),
        plain(holds.get("name")),
        number(holds.get("images")),
        number(holds.get("held_out")),
        _span(plain(line.get("kind")) for line in lines),
        _span(number(line.get("keep")) for line in lines),
        plain(None if last.get("precision") == "unknown" else last.get("precision")),
        number(len(lines)),
        number(last.get("loss")),
        number(last.get("holdout_loss")),
        duration(sum(times) / len(times)) if times else NONE,
        byte_size(sum(_numbers(lines, "bytes_up"))) if lines else NONE,
        byte_size(sum(_numbers(lines, "bytes_down"))) if lines else NONE,
    ]


def _numbers(lines: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [value for line in lines if curves.is_number(value := line.get(key))]


def _span(values: Iterable[str]) -> str:
    """Return a value, or the several values that it had over the rounds."""
    return ", ".join(list(dict.fromkeys(values))[:MOST_NAMED]) or NONE


def _labels(record: Record, held: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how many images of each class every client holds, held-out ones included."""
    names = [plain(name) for name in mapping(record.data.get("classes"))]
    counts = {
        client: found
        for client, entry in list(held.items())[:MOST_ROWS]
        if isinstance(found := entry.get("labels"), list)
        and len(found) == len(names)
        and all(curves.is_number(count) and count >= 0 for count in found)
    }
    if not counts or len(names) < 2:
        return ""
    if len(names) > MOST_LABELS:
        rows = [(plain(client), _most(found, names)) for client, found in counts.items()]
        return table(("client", "most of its images are"), rows, text=(1,))
    most = max(1, max(max(found) for found in counts.values()))
    shaded = [
        [
            plain(client),
            *(f'<span class="shade" style="--of:{n / most:.2f}">{n:,}</span>' for n in found),
        ]
        for client, found in counts.items()
    ]
    return table(("client", *names), shaded)


def _most(found: Sequence[float], names: Sequence[str]) -> str:
    total = sum(found) or 1
    order = sorted(range(len(found)), key=lambda label: -found[label])[:MOST_NAMED]
    return ", ".join(f"{names[i]} ({round(100 * found[i] / total)} %)" for i in order if found[i])


def _data(record: Record) -> str:
    """Return the classes by name, and what was not read, for a run whose server has the data."""
    found = record.data
    if not found:
        return ""
    notes = found.get("notes")
    said = notes if isinstance(notes, list) else []
    body = "".join(warning(plain(note)) for note in said)
    body += f"<p>{number(found.get('images'))} images in all, held-out ones included.</p>"
    classes = list(mapping(found.get("classes")).items())
    rows = [
        (str(label), plain(name), number(count))
        for label, (name, count) in enumerate(classes[:MOST_ROWS])
    ]
    counted = table(("label", "class", "images"), rows, text=(1,))
    if len(classes) > MOST_ROWS:
        counted += soft(f"and {len(classes) - MOST_ROWS:,} more in results.json")
    return body + folded("Images of each class", counted)


def _budgets(record: Record) -> str:
    if not record.budgets:
        return ""
    rows = []
    for client, entry in list(record.budgets.items())[:MOST_ROWS]:
        budget = mapping(entry)
        limit = budget.get("budget.limit")
        limit = limit if isinstance(limit, int) else -1
        rows.append(
            (
                plain(client),
                number(budget.get("keep")),
                dict(enumerate(LIMITS)).get(limit, "said by its node"),
                number(budget.get("budget.memory_mb")),
                number(budget.get("budget.memory_cap_mb")),
                duration(budget.get("budget.seconds")),
                duration(budget.get("budget.seconds_cap")),
            )
        )
    head = ("client", "keep", "limited by", "peak, MB", "allowed, MB", "local steps", "allowed")
    text = "<p>What each client's machine can carry; peaks and times are predictions.</p>"
    return text + table(head, rows) + more(len(record.budgets))


def _undefended(record: Record) -> str:
    """Return for how many coordinates one liar decides, where liars are to be withstood."""
    known = [entry["undefended"] for entry in record.rounds if entry.get("undefended") is not None]
    if not known:
        return ""
    aggregation = plain(mapping(record.settings.get("round")).get("aggregation"))
    if not max(known):
        return f"<p>Whatever was trained had three trainers or more, as {aggregation} needs.</p>"
    return (
        f"<p>In the worst round {number(max(known))} coordinates had one or two trainers: there "
        f"{aggregation} can leave nobody out, and one lying client decides.</p>"
    )


def _rejected(record: Record) -> str:
    found = [
        (number(entry.get("round")), plain(item.get("client")), plain(item.get("reason")))
        for entry in record.rounds
        for item in mappings(entry.get("rejected"))
    ]
    if not found:
        return soft("None.") if record.rounds else ""
    drawn = plot(curves.rejected_figure(record.rounds), "rejected updates per round")
    figures = table(("round", "client", "reason"), found[:MOST_ROWS], text=(2,))
    return f"{drawn}{figures}{more(len(found))}"
