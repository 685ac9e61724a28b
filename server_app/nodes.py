"""Which nodes there are, what they said of themselves, and which clients each of them hosts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

POLL_S = 0.05
"""Between looks for replies, at first; Flower's own loop waits up to 3 s."""
POLL_MOST_S = 1.0
POLL_SHARE = 0.05
"""Later looks wait for this part of the time that nothing came: each look is a request for every
reply that is out, and in a deployment costs the SuperLink some 10 ms of CPU."""
JOIN_S = 120.0
"""How long to wait for the first node, and for a node to answer the opening query."""
UNANSWERED = (3, 4, 5, 8)
"""Flower's errors for a message, a reply or a node that is not there, and a ClientApp that died."""
MOST_TEXT = 2000
"""Characters of what a node says that go into logs and records."""
LOOK_S = 1.0
"""Between looks for nodes, while there are too few."""

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Refused:
    """A node that cannot be used, and why; the clients it would have hosted, if it said which."""

    reason: str
    partition: int = 0
    of: int = 0


@dataclass(frozen=True)
class Host:
    """A node that has answered: the clients whose number is `partition` modulo `of` are its own.

    A node without a partition in its node config (`of` is 0) takes clients that no other hosts.
    """

    node: int
    partition: int
    of: int
    numbers: Numbers


class Nodes:
    """The nodes of a run. New ones are asked and join; those that are offline host nobody.

    Parameters
    ----------
    accept
        Given a node's answer; raises `ValueError` or `KeyError` where it cannot be used.
    joined
        Given each node that has joined.
    """

    def __init__(
        self,
        grid: Grid,
        config_json: str,
        accept: Callable[[Numbers], None],
        joined: Callable[[Host], None],
    ):
        self._grid = grid
        self._config_json = config_json
        self._accept = accept
        self._joined = joined
        self._hosts: dict[int, Host] = {}
        self._asked: dict[str, int] = {}
        self._online: set[int] = set()
        self._refused: dict[int, Refused] = {}

    def meet(self) -> None:
        """Wait for the first nodes, and until all that are there have answered.

        Raises
        ------
        RuntimeError
            None came, or none can run the ClientApp.
        """
        end = time.monotonic() + JOIN_S
        while not self.refresh() and time.monotonic() < end:
            time.sleep(0.2)
        if not self._online:
            raise RuntimeError(f"no node joined within {JOIN_S:g} s; start SuperNodes first")
        while self._asked and time.monotonic() < end:
            time.sleep(POLL_S)
            self.refresh()
        if not self._hosts:
            silent = [f"node {n}: no answer within {JOIN_S:g} s" for n in self._asked.values()]
            failures = [f"node {node}: {it.reason}" for node, it in self._refused.items()]
            raise RuntimeError("no node can run the ClientApp. " + "; ".join(failures + silent))

    def refresh(self) -> bool:
        """See who is online, ask those who are new, take the answers that are in; any online?"""
        self._online = set(self._grid.get_node_ids())
        # one that was mended has been away, and is asked again
        self._refused = {n: it for n, it in self._refused.items() if n in self._online}
        known = self._hosts.keys() | set(self._asked.values()) | self._refused.keys()
        for node in sorted(self._online - known):
            self._ask(node)
        for message_id in list(self._asked):
            for reply in pull(self._grid, message_id):
                self._take(self._asked.pop(message_id), reply)
        return bool(self._online)

    def wait_for(self, clients: list[int], count: int, seconds: float) -> set[int]:
        """Those of the clients that have a host now; waits while they are fewer than `count`."""
        end = time.monotonic() + seconds
        self.refresh()
        while len(found := {c for c in clients if self.host_of(c)}) < count:
            if time.monotonic() >= end:
                break
            time.sleep(LOOK_S)
            self.refresh()
        return found

    def host_of(self, client: int) -> Host | None:
        """The node that works for a client; None while it is not there."""
        here = [self._hosts[node] for node in sorted(self._online & self._hosts.keys())]
        own = [host for host in here if host.of and client % host.of == host.partition]
        if own:
            return own[0]
        partitioned = [h for h in self._hosts.values() if h.of]
        if any(client % host.of == host.partition for host in partitioned):
            return None  # its node is away; its data are there, not here
        free = [host for host in here if not host.of]
        return free[client % len(free)] if free else None

    def refusals(self, clients: Iterable[int]) -> Iterator[tuple[int, int, str]]:
        """(client, node, reason) of those clients whose node is there and cannot be used."""
        for client in clients:
            for node, it in self._refused.items():
                if it.of and client % it.of == it.partition and not self.host_of(client):
                    yield client, node, it.reason

    def __len__(self) -> int:
        return len(self._online & self._hosts.keys())

    def _ask(self, node: int) -> None:
        about = ConfigRecord({"round": 0, "client": 0, "config": self._config_json})
        query = Message(
            RecordDict({"about": about}),
            dst_node_id=node,
            message_type=MessageType.QUERY,
            ttl=JOIN_S,
        )
        self._asked |= dict.fromkeys((m for m in self._grid.push_messages([query]) if m), node)

    def _take(self, node: int, reply: Message | Exception) -> None:
        if isinstance(reply, Message) and reply.has_error() and reply.error.code in UNANSWERED:
            log(WARNING, "node %d did not answer: %s", node, reason_of(reply.error))
            return  # it is asked again when it is next seen
        partition = of = 0
        try:
            numbers = _answer(reply)
            partition, of = int(numbers["partition-id"]), int(numbers["num-partitions"])
            _check_answer(reply)
            self._accept(numbers)
            host = Host(node, partition, of, numbers)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            log(WARNING, "node %d cannot be used: %s", node, error)
            self._refused[node] = Refused(str(error), partition, of)
            return
        here = self._online & self._hosts.keys()
        twins = [n for n in here if of and self._hosts[n].of == of]
        if any(self._hosts[n].partition == partition for n in twins):
            log(WARNING, "node %d says it is partition %d, as another node does", node, partition)
        self._hosts[node] = host
        log(INFO, "node %d joined", node)
        self._joined(host)


class Patience:
    """How long to wait until the next look, when nothing came since this was made."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def pause(self) -> float:
        """Seconds."""
        waited = time.monotonic() - self._since
        return min(max(POLL_S, POLL_SHARE * waited), POLL_MOST_S)


def pull(grid: Grid, message_id: str) -> Iterator[Message | Exception]:
    """The reply to a message if it is there; one that does not inflate comes as its exception."""
    try:
        yield from grid.pull_messages([message_id])
    except (ValueError, TypeError, KeyError) as error:
        yield error


def most_out(grid: Grid) -> float:
    """How many messages of a round may be out at once: in a simulation two for each core of Ray's.

    There they lie in this process until a Ray worker is free, so that a round of hundreds of
    clients would hold the network hundreds of times. SuperNodes fetch theirs at once.
    """
    if not isinstance(grid, InMemoryGrid):
        return math.inf
    import ray

    return 2 * max(1.0, ray.cluster_resources().get("CPU", 1.0))


def reason_of(error: Error) -> str:
    reason = error.reason or "no reason given"  # of a traceback the end tells most
    return f"{reason[-MOST_TEXT:]} (Flower error {error.code})"


def _answer(reply: Message | Exception) -> dict[str, float]:
    """The numbers of a node's answer to the opening query; raises where it is none."""
    if isinstance(reply, Exception):
        raise ValueError(f"its answer cannot be read: {reply!r}")
    if reply.has_error():
        raise ValueError(reason_of(reply.error))
    numbers = reply.content["metrics"]
    if not isinstance(numbers, MetricRecord):
        raise TypeError("its answer has no metrics")
    return {key: value for key, value in numbers.items() if not isinstance(value, list)}


def _check_answer(reply: Message | Exception) -> None:
    """Raise what a node says is wrong with itself, such as data that do not fit the run."""
    assert isinstance(reply, Message)
    about = reply.content.get("about")
    if isinstance(about, ConfigRecord) and "refused" in about:
        raise ValueError(str(about["refused"])[:MOST_TEXT])
