"""Payloads as Flower records, and back. Values travel as raw bytes under our own stype."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fed_diffusion.federation.aggregate import UpdateError
from fed_diffusion.federation.records import Task, Update
from fed_diffusion.federation.wire import Packed, Payload

STYPE = "fed-diffusion.raw"


def to_records(part: Task | Update, config_json: str | None = None) -> RecordDict:
    """A task or an update as a message's content; `config_json` goes along towards a client."""
    arrays = ArrayRecord(
        {
            name: Array(dtype=packed.dtype, shape=packed.shape, stype=STYPE, data=packed.data)
            for name, packed in part.payload.arrays.items()
        }
    )
    about: dict[str, int | str] = {"round": part.round, "client": part.client}
    if config_json is not None:
        about["config"] = config_json
    return RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord(dict(part.payload.numbers)),
            "about": ConfigRecord(dict(about)),
        }
    )


def to_task(content: RecordDict) -> Task:
    """The task in a message's content."""
    return Task(*_parts(content))


def to_update(content: RecordDict) -> Update:
    """The update in a reply's content; `UpdateError` where it is not one."""
    return Update(*_parts(content))


def _parts(content: RecordDict) -> tuple[int, int, Payload]:
    # content[...], not content.array_records: that view makes a reference cycle, and the arrays
    # would then wait for the garbage collector
    try:
        arrays, numbers, about = content["arrays"], content["metrics"], content["about"]
        assert isinstance(arrays, ArrayRecord)
        assert isinstance(numbers, MetricRecord)
        assert isinstance(about, ConfigRecord)
        packed = {}
        for name in list(arrays):
            array = arrays.pop(name)
            if array.stype != STYPE:
                raise UpdateError(f"{name} has stype {array.stype!r}, not {STYPE!r}")
            packed[name] = Packed(array.dtype, tuple(array.shape), array.data)
        fields = {key: _number(key, value) for key, value in numbers.items()}
        round, client = about["round"], about["client"]
        assert isinstance(round, int)
        assert isinstance(client, int)
    except (KeyError, AssertionError) as error:
        raise UpdateError(f"not a message of this app: {error!r}") from error
    return round, client, Payload(packed, fields)


def _number(key: str, value: int | float | list[int] | list[float]) -> int | float | list[int]:
    """Lists are of whole numbers in everything this app sends."""
    if isinstance(value, list):
        if not all(type(entry) is int for entry in value):
            raise UpdateError(f"{key} is not a list of whole numbers")
        return [int(entry) for entry in value]
    return value
