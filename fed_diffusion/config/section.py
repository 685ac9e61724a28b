"""What every section of the configuration shares: how values are read by the type of a setting."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

LARGEST = 2**63
"""Whole numbers are below this limit: they travel, and reach torch, as 64 bits with a sign."""


HUB = "hf:"
"""Before the name or the path of a data set of the package datasets, in data.name."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, what is allowed and how to fix it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _by_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        return by_type(cls.model_fields[str(info.field_name)].annotation, value)


def by_type(annotation: Any, value: Any) -> Any:
    """Return a value as a setting of this type takes it: text becomes a number for a number.

    Raises
    ------
    ValueError
        The setting is a number, and the value is true or false, or beyond 64 bits.
    """
    kinds = _kinds(annotation)
    if not kinds & {int, float, bool}:
        return value
    read = value if str in kinds else as_numbers(value)
    for one in read if isinstance(read, list) else [read]:
        if isinstance(one, bool) and bool not in kinds:
            raise PydanticCustomError("truth_value", "true and false are not numbers")
        if isinstance(one, int) and int in kinds and abs(one) >= LARGEST:
            raise PydanticCustomError("too_large", "whole numbers are below 2^63")
    return read


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types that values under an annotation have, at any depth."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    parts = [part for part in get_args(annotation) if part is not Ellipsis]
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def is_free_text(annotation: Any) -> bool:
    """Return whether a setting takes any text, as a path or a name does, not only certain words."""
    return annotation is str or (
        get_origin(annotation) is not Literal and any(map(is_free_text, get_args(annotation)))
    )


def is_list(annotation: Any) -> bool:
    """Return whether a setting takes several values."""
    return get_origin(annotation) is tuple or any(map(is_list, get_args(annotation)))


def is_mapping(annotation: Any) -> bool:
    """Return whether a setting takes values by name."""
    return get_origin(annotation) is dict or any(map(is_mapping, get_args(annotation)))


def complaint(item: Mapping[str, Any]) -> str:
    """Return what one of pydantic's errors says of a value, in the words of YAML."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in ("tuple_type", "list_type"):
        return "give a list, as in [1, 2]"
    if kind == "too_short":
        return f"give a list of at least {context['min_length']}"
    if kind in ("dict_type", "model_type"):
        return "give a section of keys and values"
    return str(item["msg"])


def as_numbers(value: Any) -> Any:
    """Return decimal text as its number, in lists too; 1 is a whole number and 1.0 is not.

    Other text is left as it is.
    """
    if isinstance(value, list | tuple):
        return [as_numbers(one) for one in value]
    if isinstance(value, dict):
        return {key: as_numbers(one) for key, one in value.items()}
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def as_values(value: Any) -> Any:
    """Return text as its number or truth value, where no setting says what is meant."""
    if isinstance(value, list | tuple):
        return [as_values(one) for one in value]
    if isinstance(value, dict):
        return {key: as_values(one) for key, one in value.items()}
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return as_numbers(value)
