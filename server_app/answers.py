"""What a node says of itself in its answer to the opening query, read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord

from fed_diffusion.common.text import clean
from server_app.replies import reason_of

Numbers = Mapping[str, float]

NUMBERS = (
    "partition-id",
    "num-partitions",
    "own-data",
    "images",
    "keep",
    "budget.limit",
    "budget.memory_mb",
    "budget.memory_cap_mb",
    "budget.seconds",
    "budget.seconds_cap",
)
"""All numbers that are read of an answer; some of them end in the record of the run."""


@dataclass(frozen=True)
class Answer:
    """A node's answer: which clients it hosts, its numbers, and why it cannot be used, if so.

    Attributes
    ----------
    partition, of
        It hosts the clients whose number is `partition` modulo `of`; of 0: those that nobody else
        hosts.
    """

    partition: int
    of: int
    numbers: Numbers
    refused: str | None = None


def read_answer(reply: Message | Exception) -> Answer:
    """Return a node's answer.

    Raises
    ------
    ValueError
        The reply is not an answer; the message says what is wrong.
    """
    if isinstance(reply, Exception):
        raise ValueError(clean(f"its answer cannot be read: {reply!r}"))
    if reply.has_error():
        raise ValueError(reason_of(reply.error))
    found, about = (reply.content.get(name) for name in ("metrics", "about"))
    if not isinstance(found, MetricRecord):
        raise ValueError("its answer has no metrics")
    numbers = {key: found[key] for key in NUMBERS if key in found}
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(clean(f"its {key} = {value!r} is not a finite number", 200))
    missing = [key for key in NUMBERS[:3] if key not in numbers]
    if missing:
        raise ValueError(f"its answer does not say its {missing[0]}")
    plain: Numbers = {key: value for key, value in numbers.items() if not isinstance(value, list)}
    partition, of = (int(plain[key]) for key in ("partition-id", "num-partitions"))
    if of < 0 or not 0 <= partition < max(of, 1):
        raise ValueError(
            f"its node config says partition-id={partition} num-partitions={of}; allowed are "
            "partition-id from 0 to num-partitions - 1"
        )
    refused = about.get("refused") if isinstance(about, ConfigRecord) else None
    return Answer(partition, of, plain, None if refused is None else clean(refused))
