"""Settings as they are typed: `KEY=VALUE`, read as far as each setting's type says how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fed_diffusion.config.schema import Config, ConfigError, is_free_text
from fed_diffusion.config.section import is_list, is_mapping
from fed_diffusion.config.yaml import parse_yaml

NULLS = ("", "~", "null", "Null", "NULL")


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`["pruning.level=S", "rounds=20"]` as a flat mapping; see `read_value` for the values."""
    flat: dict[str, Any] = {}
    for pair in pairs:
        key, sep, text = pair.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"set: {pair!r} is not of the form key=value, as in rounds=20.")
        refuse_overlaps([*flat, key.strip()], "set")
        flat[key.strip()] = read_value(key.strip(), text)
    return flat


def read_value(key: str, text: str) -> Any:
    """A typed value, as far as it can be read without a check.

    A setting that takes any text (a path, a name) takes it as typed, and null where it may be
    none; one that takes several texts takes them as a list in brackets, or in braces where each
    has a name. For the others [1, 0.5], {steps: 3} and "S" are YAML, and everything else is text,
    which the setting's type reads: numbers are decimal.

    Raises
    ------
    ConfigError
        A list or a mapping cannot be read.
    """
    field = field_of(key)
    if field is not None and is_free_text(field.annotation):
        ends = f"{text[:1]}{text[-1:]}"
        if (ends == "[]" and is_list(field.annotation)) or (
            ends == "{}" and is_mapping(field.annotation)
        ):
            return parse_yaml(text, f"set: the value in {f'{key}={text}'!r}")
        may_be_none = type(None) in get_args(field.annotation)
        return None if may_be_none and text in ("", "null") else text
    text = text.strip()
    if text in NULLS:
        return None
    if f"{text[0]}{text[-1]}" in ("[]", "{}", '""', "''"):
        return parse_yaml(text, f"set: the value in {f'{key}={text}'!r}")
    return text


def refuse_overlaps(keys: Iterable[str], where: str) -> None:
    """Refuse a key that stands twice, and one that stands beside its whole section.

    Raises
    ------
    ConfigError
        Names the two; `where` says where they stand.
    """
    known: list[str] = []
    for key in keys:
        for other in known:
            if key == other:
                raise ConfigError(f"{where}: {key} is given twice; give it once.")
            if key.startswith(f"{other}.") or other.startswith(f"{key}."):
                raise ConfigError(
                    f"{where}: {other} and {key} are given, and one holds the other; give either "
                    "the section or its keys."
                )
        known.append(key)


def field_of(key: str) -> FieldInfo | None:
    """The setting with this dotted name; None where there is none."""
    model: Any = Config
    field = None
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return None
        field = model.model_fields.get(part)
        model = field.annotation if field else None
    return field
