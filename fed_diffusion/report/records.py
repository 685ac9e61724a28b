"""What a run directory says about a run, read leniently: a run may have stopped anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_diffusion.config import ConfigError, build_config
from fed_diffusion.files import read_yaml
from fed_diffusion.schema import as_numbers

_ROUND = re.compile(r"round-(\d+)\.png")


@dataclass(frozen=True)
class Record:
    """The contents of a run directory, as far as they are there.

    Attributes
    ----------
    settings
        config.yaml as nested mappings.
    rounds
        metrics.jsonl, one mapping per round in order; of a repeated round the last one.
    unreadable
        Lines of metrics.jsonl that are no JSON, as the last one of a killed run.
    budgets
        budgets.json: what each client's node said it can carry; empty where none was asked.
    results
        results.json; empty for a run that has not finished.
    final, timeline
        The grids in samples/, the latter as (round, file) in order.
    """

    name: str
    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    unreadable: int
    budgets: dict[str, Any]
    results: dict[str, Any]
    final: Path | None
    timeline: list[tuple[int, Path]]

    def fact(self, key: str) -> Any:
        """A value of the results, else of the settings, else None."""
        return self.results.get(key, self.settings.get(key))


def read_record(run_dir: Path) -> Record:
    """Read a run directory.

    Raises
    ------
    ConfigError
        It is not one: it does not exist, or has no config.yaml, or one that cannot be read.
    """
    source = run_dir / "config.yaml"
    if not source.is_file():
        raise ConfigError(
            f"{run_dir} is not a run directory: it has no config.yaml. Give the directory that "
            "a run named in its last line."
        )
    settings = read_yaml(source, "configuration")
    try:
        settings = build_config(settings).to_dict()
    except ConfigError:  # of another version: shown as it stands
        settings = as_numbers(settings)
    rounds, unreadable = _read_rounds(run_dir / "metrics.jsonl")
    samples = run_dir / "samples"
    found = ((_ROUND.fullmatch(path.name), path) for path in samples.glob("round-*.png"))
    final = samples / "final.png"
    return Record(
        name=run_dir.resolve().name,
        settings=settings,
        rounds=rounds,
        unreadable=unreadable,
        budgets=_read_mapping(run_dir / "budgets.json"),
        results=_read_mapping(run_dir / "results.json"),
        final=final if final.is_file() else None,
        timeline=sorted((int(match[1]), path) for match, path in found if match),
    )


def _read_rounds(path: Path) -> tuple[list[dict[str, Any]], int]:
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    rounds: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
            rounds[int(entry["round"])] = entry
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    return [rounds[number] for number in sorted(rounds)], unreadable


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
