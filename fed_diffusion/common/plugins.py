"""How a setting names a part of the program: one that is built in, or any object of any module.

Each kind of part has a dictionary of its built-ins, in the room that the kind belongs to, and a
contract, a `Protocol` beside it. There is nothing to register: a name with a colon is imported.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from fed_diffusion.config.schema import ConfigError


def resolve(setting: str, name: str, built_in: Mapping[str, Any]) -> Any:
    """The object that a setting names.

    Parameters
    ----------
    setting
        The key that is shown in errors, as in pruning.kind.
    name
        A key of `built_in`, or module:attribute (also module:Class.attribute).
    built_in
        What needs no import, by name.

    Raises
    ------
    ConfigError
        There is no such name; the module cannot be imported, or lacks the attribute.
    """
    if name in built_in:
        return built_in[name]
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        close = difflib.get_close_matches(name, built_in, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{setting} = {name!r} is unknown.{hint} Allowed: {', '.join(built_in)}, or "
            "module:attribute for one of your own."
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting} = {name!r} cannot be loaded: {error}. The module must lie where Python "
            "finds it: in the folder that the command is started from, or installed."
        ) from error
    return found
