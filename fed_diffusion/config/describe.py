"""Every setting in words: what values it takes, its default and what it means."""

from __future__ import annotations

import ast
import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from fed_diffusion.config.schema import Config, Section

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One setting, as it is listed.

    Attributes
    ----------
    key
        The dotted name of the setting.
    values
        The values that the setting takes, in words.
    default
        The default as YAML, on one line.
    meaning
        The setting's docstring in the code; empty where the name says everything.
    """

    key: str
    values: str
    default: str
    meaning: str


def all_settings() -> list[Setting]:
    """Return every setting, section by section."""
    return list(_of(Config, "", Config()))


def _of(model: type[BaseModel], prefix: str, values: BaseModel) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        kind, value = field.annotation, getattr(values, name)
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _of(kind, f"{prefix}{name}.", value)
            continue
        plain = values.model_dump(mode="json")[name]
        default = plain if isinstance(plain, str) else json.dumps(plain)
        meaning = _meanings(model).get(name, "")
        yield Setting(prefix + name, _in_words(kind, field.metadata), default, meaning)


def _in_words(kind: Any, metadata: Any = ()) -> str:
    bounds = [
        f"{word} {getattr(one, name):g}"
        for one in metadata
        for name, word in BOUNDS.items()
        if getattr(one, name, None) is not None and abs(getattr(one, name)) < 2**62
    ]
    if named := _built_in(metadata):
        return f"{' | '.join(named)} | module:attribute"
    return ", ".join([_kind_in_words(kind), *bounds])


def _kind_in_words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _in_words(parts[0], parts[1:])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        some = [_kind_in_words(part) for part in parts if part is not type(None)]
        return " or ".join([*some, *(["null"] if type(None) in parts else [])])
    if origin is tuple:
        return f"list of: {_kind_in_words(parts[0])}"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _built_in(metadata: Any) -> tuple[str, ...]:
    """Return the words of `config.names.part`, which its validator carries."""
    for one in metadata:
        if found := getattr(getattr(one, "func", None), "built_in", None):
            return tuple(found)
    return ()


@cache
def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return name -> the text under it in the class's source."""
    path = inspect.getsourcefile(model)
    assert path is not None
    tree = ast.parse(Path(path).read_text("utf-8"))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == model.__name__
    )
    found = {}
    for node, after in pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[node.target.id] = " ".join(after.value.value.split())
    return found
