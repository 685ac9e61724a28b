"""Names of parts of the program in settings: a word that is built in, or module:attribute."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from pydantic import AfterValidator, BaseModel
from pydantic_core import PydanticCustomError

from fed_diffusion.config.section import ConfigError

_PATH = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_OWN = re.compile(f"{_PATH}:{_PATH}")
UNKNOWN = "unknown_name"
"""The type of the error that `part` raises."""


def is_own(name: str) -> bool:
    """Return whether a name is of the form module:attribute, as in
    my_package.my_module:Class.method.
    """
    return _OWN.fullmatch(name) is not None


def refuse_unknown(setting: str, name: str, built_in: Collection[str]) -> None:
    """Refuse a name that is neither built in nor of the form module:attribute.

    Raises
    ------
    ConfigError
        The message names the setting, the nearest built-in name, and all built-in names.
    """
    if name not in built_in and not is_own(name):
        raise ConfigError(f"{setting} = {name!r} is unknown. {allowed(name, built_in)}.")


def allowed(name: str, built_in: Collection[str]) -> str:
    """Return what to say of an unknown name: the nearest name, and what is allowed."""
    close = difflib.get_close_matches(name, built_in, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(built_in)}, or module:attribute for one of your own"


def part(*built_in: str) -> AfterValidator:
    """Return the type of a setting that names a part: one of these words, or module:attribute.

    `common.plugins.resolve` finds the part later, still before any compute.
    """

    def check(name: str) -> str:
        if name not in built_in and not is_own(name):
            raise PydanticCustomError(UNKNOWN, "{says}", {"says": allowed(name, built_in)})
        return name

    check.built_in = built_in  # type: ignore[attr-defined]
    return AfterValidator(check)


def parts(*built_in: str) -> AfterValidator:
    """Return the type of a setting that names one part or a list of them; see `part`.

    A list of one is that one.
    """

    def check(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        listed = (names,) if isinstance(names, str) else names
        if not listed:
            raise PydanticCustomError("too_few", "the list is empty; name at least one")
        for name in listed:
            if name not in built_in and not is_own(name):
                context = {"says": allowed(name, built_in), "name": name}
                raise PydanticCustomError(UNKNOWN, "{says}", context)
            if listed.count(name) > 1:
                raise PydanticCustomError(
                    "twice", "{name} is given twice; give it once", {"name": repr(name)}
                )
        return listed[0] if len(listed) == 1 else listed

    return AfterValidator(check)


def names_own_parts(config: BaseModel) -> bool:
    """Return whether any setting names a part by module:attribute, whose module must be found."""

    def within(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(within, value.values()))
        if isinstance(value, list):
            return any(map(within, value))
        return isinstance(value, str) and is_own(value)

    return within(config.model_dump(mode="json"))
