"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

_PAIR = re.compile(r"[A-Za-z_][\w.]*=")


def add_set(parser: argparse.ArgumentParser, help: str = "as in pruning.level=S rounds=20") -> None:
    """Add `--set KEY=VALUE`, which takes several pairs at once and may stand several times."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"settings, {help}"
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run`."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only check, time a few steps, and say what it would take",
    )


def spread(argv: Sequence[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`.

    A word behind a pair that is no pair itself, as the name of a preset, is left where it is:
    argparse's own nargs would take it.
    """
    words: list[str] = []
    more = False  # whether a pair may follow here
    for word in argv:
        if more and _PAIR.match(word):
            words += ["--set", word]
        elif words and words[-1] == "--set":
            words.append(word)
            more = True
        else:
            words.append(word)
            more = word.startswith("--set=")
    return words
