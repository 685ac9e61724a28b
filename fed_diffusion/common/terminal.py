"""What a user is told: text as it is, whatever stands in it.

rich makes styles of [words in brackets] and pictures of :words: between colons, and paths and
addresses hold both. Here nothing in a text has a meaning; only a label before it has a style.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def plain_console(*, stderr: bool = False) -> Console:
    """A console that shows strings, also in tables and titles, as they are."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


console = plain_console(stderr=True)


def tell(text: str, label: str = "") -> None:
    """Print a text to the standard error, after a label in red where there is one."""
    console.print(Text.assemble((f"{label} " if label else "", "bold red"), text), soft_wrap=True)
