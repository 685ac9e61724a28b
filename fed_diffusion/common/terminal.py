"""What a user is told: text is shown as it is, whatever characters it has.

rich makes styles of [words in brackets] and pictures of :words: between colons, and paths and
addresses hold both. Here nothing in a text has a meaning; only a label before it has a style.
"""

from __future__ import annotations

import os
import sys
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from fed_diffusion.common.text import shown


class _StandardError:
    """The current standard error, to which a run's words go and on which nothing depends.

    A run does not end because they cannot be written: their reader has gone, or the disk of its
    log is full. What is said from then on is thrown away; status.json says how a run ended.
    """

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        if sys.stderr is None:  # closed before Python began
            return
        try:
            getattr(sys.stderr, method)(*arguments)
        except OSError:
            # Python would try again at its end, and turn the exit code into 120
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class _Plain(Console):
    """A console on which names with escape sequences in them cannot do anything."""

    def render_str(self, text: str, *arguments: Any, **more: Any) -> Text:
        return super().render_str(shown(text), *arguments, **more)


def plain_console(file: IO[str] | None = None) -> Console:
    """Return a console that shows strings, also in tables and titles, as they are.

    Parameters
    ----------
    file
        The file to write to; by default standard output.
    """
    return _Plain(file=file, markup=False, emoji=False, highlight=False)


console = plain_console(cast("IO[str]", _StandardError()))


def tell(text: str, label: str = "") -> None:
    """Print a text to the standard error, after a label in red where there is one."""
    said = Text.assemble((f"{label} " if label else "", "bold red"), shown(text))
    console.print(said, soft_wrap=True)
