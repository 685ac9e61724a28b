"""Texts that others wrote, made safe to show: `clean` for one text, `shown` for a whole page.

What a node, a server or another program says ends on terminals, in logs, in metrics.jsonl and on
pages. There an escape sequence sets a terminal's title or hides lines, a line break forges a line
of the log, a mark of direction turns words around, and five megabytes fill the record.
"""

from __future__ import annotations

import re
import unicodedata

MOST = 2000
"""The number of characters that are left of a text."""
_GAP = " ... "
_SEQUENCES = re.compile(
    r"""(?:\x1b\]|\x9d) [^\x07\x1b\x9c]* (?:\x07|\x1b\\|\x9c)?         # OSC: titles, links
      | (?:\x1b[PX^_]|[\x90\x98\x9e\x9f]) [^\x1b\x9c]* (?:\x1b\\|\x9c)?  # DCS, SOS, PM, APC
      | (?:\x1b\[|\x9b) [0-?]* [ -/]* [@-~]?                        # CSI: colours, the cursor
      | \x1b [ -/]* [0-~]?                                          # other escapes""",
    re.VERBOSE,
)
_BREAKS = re.compile(r"[\r\n\v\f\x85\u2028\u2029]+\s*")
_UNUSUAL = re.compile(r"[^\t\n -~]")
_UNSHOWN = {"Cc", "Cf", "Cs", "Co", "Cn"}
"""Unicode's categories of controls, marks of direction, halves of characters and unknown ones."""


def clean(text: object, most: int = MOST) -> str:
    """Return a text as one line of at most `most` characters that a terminal shows as they are.

    Escape sequences are left out with all that belongs to them. Line breaks become " | ", tabs
    become blanks, and other characters that cannot be shown become question marks. Of a longer text
    the beginning and the end are left, since a traceback says most at its end. Cleaning a text
    twice changes nothing.
    """
    raw = str(text)
    if len(raw) > 2 * most:  # no work is done on five megabytes
        raw = raw[:most] + _GAP + raw[-most:]
    raw = _BREAKS.sub(" | ", _SEQUENCES.sub("", raw).strip()).replace("\t", " ")
    left = shown(raw)
    if len(left) <= most:
        return left
    head = (most - len(_GAP)) // 4
    return left[:head] + _GAP + left[head + len(_GAP) - most :]


def shown(text: str) -> str:
    """Return a text, lines and tabs as they are, with question marks for what cannot be shown.

    That is what a name in a folder or a setting may hold: controls, marks of direction, and the
    halves of characters that stand for bytes which are not UTF-8 and which no file can be given.
    """
    return _UNUSUAL.sub(
        lambda found: "?" if unicodedata.category(found[0]) in _UNSHOWN else found[0], text
    )
