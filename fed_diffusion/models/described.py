"""How the parts of a pipeline of diffusers describe themselves: their configurations, read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.config.yaml import read_text

INSTALL = "pip install 'fed-diffusion[diffusers]'"


def found(kind: Any, source: str, folder: str | None = None) -> dict[str, Any] | None:
    """The configuration of a part of a pipeline; None where there is no such file."""
    try:
        return dict(kind.load_config(source, subfolder=folder))
    except OSError:
        return None


def whole(kind: str, made: Any) -> dict[str, Any]:
    """The configuration of a part with its defaults, as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(kept(made.config)))
    return {"_class_name": kind} | {k: v for k, v in plain.items() if k != "_class_name"}


def kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the version and the place that it was read from."""
    return {k: v for k, v in given.items() if k == "_class_name" or not k.startswith("_")}


def from_json(path: str, key: str) -> dict[str, Any]:
    """The object in a JSON file that the setting `key` names."""
    try:
        found = json.loads(read_text(Path(path), key))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{key} = {path!r} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{key} = {path!r} must be an object of names and values.")
    return found


def refuse_unknown(given: Mapping[str, Any], kind: Any, key: str) -> None:
    """Names that diffusers would pass over in silence."""
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    if unknown := sorted(set(kept(given)) - known - {"_class_name"}):
        raise ConfigError(
            f"{key}: {unknown[0]!r} is no setting of a {kind.__name__}. Allowed: "
            f"{', '.join(sorted(known))}."
        )


def first_line(error: Exception) -> str:
    """The first line of what a library says, without its full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")
