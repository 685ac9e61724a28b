"""Payloads as Flower records, and back.

All values of a message travel as one array of raw bytes under our own stype, with an index beside
them. Flower carries every array as separate objects, with several requests for each: a network of a
hundred tensors would spend its round on requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fed_diffusion.masks.recipe import PREFIX, Numbers
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.wire import Packed, Payload

STYPE = "fed-diffusion.raw"
VALUES = "values"
MOST_KEY = 100
"""The number of letters of a key that are shown in messages."""
ENTRY = 200
"""The number of characters of an entry of an index beside its name, at most."""
ALIGNMENT = 8
"""The number of bytes of whose multiples tensors start, as they are read where they lie."""


def to_records(part: Task | Update, config_json: str | None = None) -> RecordDict:
    """Return a task or an update as a message's content; `config_json` goes along to a client."""
    arrays = part.payload.arrays
    index = [[name, it.dtype, list(it.shape), len(it.data)] for name, it in arrays.items()]
    values = b"".join(
        piece for it in arrays.values() for piece in (it.data, _padding(len(it.data)))
    )
    about: dict[str, int | str] = {"round": part.round, "client": part.client}
    about["index"] = json.dumps(index)
    if config_json is not None:
        about["config"] = config_json
    array = Array(dtype="uint8", shape=(len(values),), stype=STYPE, data=values)
    metrics: dict[str, int | float | list[int]] = {}
    names: dict[str, str] = {}  # Flower's metrics hold no text
    for key, value in part.payload.numbers.items():
        if isinstance(value, str):
            names[key] = value
        else:
            metrics[key] = value
    return RecordDict(
        {
            "arrays": ArrayRecord({VALUES: array}),
            "metrics": MetricRecord(dict(metrics)),
            "names": ConfigRecord(dict(names)),
            "about": ConfigRecord(dict(about)),
        }
    )


def _padding(length: int) -> bytes:
    return bytes(-length % ALIGNMENT)


def to_task(content: RecordDict) -> Task:
    """Return the task in a message's content."""
    return Task(*_parts(content))


def to_update(content: RecordDict, longest: float = math.inf) -> Update:
    """Return the update in a reply's content; raise `UpdateError` where there is none.

    Parameters
    ----------
    longest
        The most characters of the update's index; see `longest_index`.
    """
    return Update(*_parts(content, longest))


def longest_index(names: Iterable[str]) -> int:
    """Return the most characters of an index of tensors with these names, and of a few others."""
    return sum(len(json.dumps(name)) + ENTRY for name in names) + 8 * ENTRY


def _parts(content: RecordDict, longest: float = math.inf) -> tuple[int, int, Payload]:
    # content[...], not content.array_records: that view makes a reference cycle, and the arrays
    # would then wait for the garbage collector
    try:
        arrays, numbers = content["arrays"], content["metrics"]
        names, about = content["names"], content["about"]
        assert isinstance(arrays, ArrayRecord)
        assert isinstance(numbers, MetricRecord)
        assert isinstance(names, ConfigRecord)
        assert isinstance(about, ConfigRecord)
        array, index = arrays.pop(VALUES), about["index"]
        assert isinstance(index, str)
        if array.stype != STYPE:
            raise UpdateError(f"its values have stype {array.stype!r}, not {STYPE!r}")
        if len(index) > longest:  # before it is parsed: a million entries take seconds
            raise UpdateError(f"its index has {len(index)} characters, above {longest:g}")
        packed = dict(_unpacked(array.data, index))
        fields: Numbers = {key: _number(key, value) for key, value in numbers.items()}
        fields |= {key: _name(key, value, numbers) for key, value in names.items()}
        round, client = about["round"], about["client"]
        assert isinstance(round, int)
        assert isinstance(client, int)
    except (KeyError, AssertionError) as error:
        raise UpdateError(f"not a message of this app: {error!r}") from error
    return round, client, Payload(packed, fields)


def _unpacked(values: bytes, index: str) -> Iterator[tuple[str, Packed]]:
    """Return the arrays that an index names; the index is untrusted, and must fit to the byte."""
    try:
        entries = [_entry(*entry) for entry in json.loads(index)]
    except (TypeError, ValueError, RecursionError) as error:
        raise UpdateError(f"its index of arrays cannot be read: {error!r}") from error
    if len({name for name, *_ in entries}) != len(entries):
        raise UpdateError("its index names an array twice")
    # summed up before anything is cut: a length that is not there would cut short in silence
    total = sum(length + len(_padding(length)) for *_, length in entries)
    if total != len(values):
        raise UpdateError(f"its index is of {total} bytes, and {len(values)} are sent")
    whole, start = memoryview(values), 0
    for name, dtype, shape, length in entries:
        yield name, Packed(dtype, shape, whole[start : start + length])
        start += length + len(_padding(length))


def _entry(
    name: str, dtype: str, shape: list[int], length: int
) -> tuple[str, str, tuple[int, ...], int]:
    if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)):
        raise TypeError("an entry is not of the form [name, type, shape, bytes]")
    if not all(type(count) is int and count >= 0 for count in (*shape, length)):
        raise ValueError(f"a count of {name!r} is not a whole number from 0")
    return name, dtype, tuple(shape), length


def _name(key: str, value: object, numbers: Container[str]) -> str:
    """Return a name of a recipe, which stands beside the numbers."""
    if not isinstance(value, str) or not key.startswith(PREFIX) or key in numbers:
        raise UpdateError(f"{key[:MOST_KEY]} is not a name of a recipe")
    return value


def _number(key: str, value: int | float | list[int] | list[float]) -> int | float | list[int]:
    """Return a number, or a list of whole numbers, the only lists that this app sends."""
    if isinstance(value, list):
        if not all(type(entry) is int for entry in value):
            raise UpdateError(f"{key} is not a list of whole numbers")
        return [int(entry) for entry in value]
    return value
