"""Standard output that cannot print a character, or cannot be written to at all."""

from __future__ import annotations

import codecs
import io
import os
import sys

_ERRORS = "fed-diffusion-readable"


def make_printable() -> None:
    """Let standard output print any text, whatever its encoding.

    The bytes of a file name that is no text come out as they are; a character that the encoding
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


def why_unprinted() -> str | None:
    """Why standard output cannot be written to, and None where it can.

    What was not printed is thrown away then: Python would try again at its end, and complain.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return f"standard output cannot be written: {error.strerror or error}."
    return None
