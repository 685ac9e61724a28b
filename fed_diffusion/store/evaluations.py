"""evaluations.jsonl holds every evaluation of a run, its own and later ones, with their
settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.store.files import MEND, append_line

EVALUATIONS = "evaluations.jsonl"


def append_evaluation(path: Path, entry: Mapping[str, Any]) -> int:
    """Add a line to the file and return its number, counted from 1 over all lines, damaged ones
    too.
    """
    number = len(path.read_bytes().splitlines()) + 1 if path.is_file() else 1
    append_line(path, json.dumps({"number": number, **entry}))
    return number


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the file in order; none where the file does not exist.

    Raises
    ------
    ConfigError
        The file is damaged.
    """
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    try:
        found = [json.loads(line) for line in lines]
        if not all(isinstance(line["number"], int) for line in found):
            raise ValueError("a line has no number")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged: {error}. {MEND}") from error
    return found
