"""Helpers for a standard output that cannot print a character, or cannot be written to at all."""

from __future__ import annotations

import codecs
import io
import os
import sys

INTERRUPTED = 130
"""The exit code of a command that was interrupted."""
_ERRORS = "fed-diffusion-readable"


def make_printable() -> None:
    """Let standard output print any text, whatever its encoding.

    The bytes of a file name that is not text come out as they are; a character that the encoding
    does not have comes out as a Python escape.
    """
    codecs.register_error(_ERRORS, _readable)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_ERRORS)


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


class OutputError(OSError):
    """Standard output cannot be written to: its disk is full, or nobody reads it any more."""


def say(text: object) -> None:
    """Print what a command has made.

    Raises
    ------
    OutputError
        Standard output cannot be written to.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # what is left of it is thrown away: Python would try again at its end, and complain
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise OutputError(f"standard output cannot be written: {error.strerror}.") from error
