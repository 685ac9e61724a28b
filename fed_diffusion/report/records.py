"""What a run directory says about a run, read leniently: a run may have stopped anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fed_diffusion.config import ConfigError, build_config
from fed_diffusion.config.schema import as_numbers
from fed_diffusion.config.yaml import read_yaml
from fed_diffusion.store.evaluations import EVALUATIONS, read_evaluations
from fed_diffusion.store.files import read_object
from fed_diffusion.store.ledger import ClientRound, RoundSummary

_ROUND = re.compile(r"round-(\d+)\.png")


@dataclass(frozen=True)
class Record:
    """The contents of a run directory, as far as they exist.

    Attributes
    ----------
    settings
        config.yaml as nested mappings.
    rounds
        metrics.jsonl, one mapping per round in order; of a repeated round the last one.
    unreadable
        Lines of metrics.jsonl that are damaged, as the last one of a killed run.
    budgets
        budgets.json: what each client's node said it can carry; empty where none was asked.
    results
        results.json; empty for a run that has not finished.
    final, timeline
        The grids in samples/, the latter as (round, file) in order.
    real
        samples/real.png, where the server has the data.
    data
        data.json, or what results.json says of the data; empty where the server has none.
    images_hash
        The hash of the images that it trains on, where it is known.
    evaluations
        evaluations.jsonl: the run's own evaluation and later ones.
    status
        status.json: how the run ended; empty while it goes on, and after a kill.
    damaged
        Names of other files that are there and cannot be read.
    """

    name: str
    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    unreadable: int
    budgets: dict[str, Any]
    results: dict[str, Any]
    final: Path | None
    timeline: list[tuple[int, Path]]
    real: Path | None = None
    data: dict[str, Any] = field(default_factory=dict)
    images_hash: str | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def fact(self, key: str) -> Any:
        """Return a value of the results, else of the settings, else None."""
        return self.results.get(key, self.settings.get(key))


def read_record(run_dir: Path) -> Record:
    """Read a run directory.

    Raises
    ------
    ConfigError
    The folder does not exist, or has no config.yaml, or one that cannot be read.
    """
    source = run_dir / "config.yaml"
    if not source.is_file():
        raise ConfigError(
            f"{run_dir} is not a run directory: it has no config.yaml. Give the directory that "
            "fed-diffusion run printed as its last line."
        )
    settings = read_yaml(source, "configuration")
    try:
        settings = build_config(settings).to_dict()
    except ConfigError:  # of another version: shown as it stands
        settings = as_numbers(settings)
    rounds, unreadable = _read_rounds(run_dir / "metrics.jsonl")
    samples = run_dir / "samples"
    found = ((_ROUND.fullmatch(path.name), path) for path in samples.glob("round-*.png"))
    final, real = samples / "final.png", samples / "real.png"
    damaged: list[str] = []
    results = _read_mapping(run_dir / "results.json", damaged)
    data = _read_mapping(run_dir / "data.json", damaged) or results.get("data")
    images_hash = _read_mapping(run_dir / "run.json", damaged).get("data")
    return Record(
        name=run_dir.resolve().name,
        settings=settings,
        rounds=rounds,
        unreadable=unreadable,
        budgets=_read_mapping(run_dir / "budgets.json", damaged),
        results=results,
        final=final if final.is_file() else None,
        timeline=sorted((int(match[1]), path) for match, path in found if match),
        real=real if real.is_file() else None,
        data=data if isinstance(data, dict) else {},
        images_hash=images_hash if isinstance(images_hash, str) else None,
        evaluations=_read_evaluations(run_dir / EVALUATIONS, damaged),
        status=_read_mapping(run_dir / "status.json", damaged),
        damaged=damaged,
    )


def _read_evaluations(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    try:
        return read_evaluations(path)
    except (ConfigError, OSError, RecursionError):
        damaged.append(path.name)
        return []


def _read_rounds(path: Path) -> tuple[list[dict[str, Any]], int]:
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    rounds: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in filter(str.strip, lines):
        try:
            entry = _checked(json.loads(line))
        except (ValueError, RecursionError):
            unreadable += 1
        else:
            rounds[entry["round"]] = entry
    return [rounds[number] for number in sorted(rounds)], unreadable


def _kinds(record: type) -> dict[str, type | tuple[type, ...]]:
    """Return what JSON holds for each field of a record; a field that may be anything is left
    out.
    """
    kinds: dict[str, type | tuple[type, ...]] = {}
    for name, hint in get_type_hints(record).items():
        members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        bare = {get_origin(member) or member for member in members}
        if bare & {int, float}:
            kinds[name] = (int, float)
        elif bare & {list, dict}:
            kinds[name] = list if list in bare else dict
    return kinds


_ROUND_KINDS = _kinds(RoundSummary)
_DRAWN_KINDS = {"w2": _kinds(ClientRound)["w2"]}
"""A client's value that goes into a figure; its other values are shown as they are."""


def _checked(entry: Any) -> dict[str, Any]:
    """Return a line of metrics.jsonl if each of its values is of the right kind.

    Raises
    ------
    ValueError
    A value is of another kind, or the round is missing.
    """
    if not isinstance(entry, dict) or type(entry.get("round")) is not int:
        raise ValueError("the line has no round")
    _check_kinds(entry, _ROUND_KINDS)
    for client in entry.get("clients") or []:
        if not isinstance(client, dict):
            raise ValueError("a client is not a mapping")
        _check_kinds(client, _DRAWN_KINDS)
    for trainers, coordinates in (entry.get("coverage") or {}).items():
        if not trainers.isdecimal() or type(coordinates) is not int:
            raise ValueError("coverage does not hold counts")
    return entry


def _check_kinds(entry: dict[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    for key, kind in kinds.items():
        value = entry.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{key} is {value!r}")


def _read_mapping(path: Path, damaged: list[str]) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except ConfigError:
        damaged.append(path.name)
        return {}
