"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

_PAIR = re.compile(r"[A-Za-z_][\w.]*=")


def add_set(
    parser: argparse.ArgumentParser,
    help: str = "settings to change, as in pruning.level=S rounds=20",
) -> None:
    """Add `--set KEY=VALUE`, which takes several pairs at once and may stand several times."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run`."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only check everything, time a few steps, and print what the work would take",
    )


def spread(argv: Sequence[str]) -> list[str]:
    """Return the words with `--set a=1 b=2` written as `--set a=1 --set b=2`.

    A word after a pair that is not a pair itself, such as the name of a preset, stays where it is;
    argparse's own `nargs` would take that word as a setting.
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
