"""How a setting names a part of the program: one that is built in, or any object of any module.

Each kind of part has a dictionary of its built-ins, in the room that the kind belongs to, and a
contract, a `Protocol` beside it. There is nothing to register: a name with a colon is imported.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fed_diffusion.config.names import refuse_unknown
from fed_diffusion.config.schema import ConfigError

PACKAGE = Path(__file__).parents[1]


def resolve(setting: str, name: str, built_in: Mapping[str, Any]) -> Any:
    """Return the object that a setting names.

    Parameters
    ----------
    setting
        The key that is shown in errors, as in pruning.kind.
    name
        A key of `built_in`, or module:attribute (also module:Class.attribute).
    built_in
        The built-in objects by name, which need no import.

    Raises
    ------
    ConfigError
        There is no such name; the module cannot be imported, or lacks the attribute.
    """
    if name in built_in:
        return built_in[name]
    refuse_unknown(setting, name, built_in)
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module of the user's may raise anything while it is imported
        raise ConfigError(
            f"{setting} = {name!r} cannot be loaded ({type(error).__name__}: {error}). The module "
            "must lie where Python finds it: in the folder that the command is started from, in "
            "one that is on PYTHONPATH, or installed."
        ) from error
    return found


@contextmanager
def blamed(setting: str, name: str) -> Iterator[None]:
    """Report any exception in the block as a fault of the part that a setting names.

    Raises
    ------
    ConfigError
        The message has the setting, the name and what was raised.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # anything may go wrong in a part of the user's
        raise ConfigError(
            f"{setting} = {name!r} failed with {type(error).__name__}: {error}{_where(error)}."
        ) from error


def _where(error: Exception) -> str:
    """Return the last line outside this package that an exception came through, as text."""
    frames = traceback.extract_tb(error.__traceback__)
    found = [f for f in frames if PACKAGE not in Path(f.filename).parents and f.line]
    return f" ({found[-1].filename}, line {found[-1].lineno})" if found else ""
