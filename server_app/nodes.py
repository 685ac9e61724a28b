"""Which nodes there are, what they said of themselves, and which clients each of them hosts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from fed_diffusion.common.text import clean
from server_app.admitted import Admitted
from server_app.answers import Answer, Numbers, read_answer
from server_app.replies import UNANSWERED, pull, reason_of

POLL_S = 0.05
"""The seconds between looks for replies, at first; Flower's own loop waits up to 3 s."""
POLL_MOST_S = 1.0
POLL_SHARE = 0.05
"""The share of the time without replies that a later look waits.

Each look is a request for every reply that is out, and in a deployment costs the SuperLink some 10
ms of CPU.
"""
JOIN_S = 120.0
"""The seconds to wait for the first node, and for a node's answer to the opening query."""
AGAIN_S = 30.0
"""The seconds until a node that cannot be used, or did not answer, is asked again."""
LOOK_S = 1.0
"""The seconds between looks for nodes, while there are too few."""
MOST_ANSWER = 1 << 16
"""The most bytes of an answer to the opening query."""


@dataclass(frozen=True)
class Refused:
    """A node that cannot be used, the reason, and the clients it would have hosted, if known."""

    reason: str
    partition: int = 0
    of: int = 0


@dataclass(frozen=True)
class Host:
    """A node that has answered; it hosts the clients whose number is `partition` modulo `of`.

    A node without a partition in its node config (`of` is 0) takes clients that no other node
    hosts.

    Attributes
    ----------
    active
        Since when it is active, as Flower says: another time is another process, which may have
        another node config and knows nothing of what was sent to the one before.
    """

    node: int
    partition: int
    of: int
    numbers: Numbers
    active: str

    def owns(self, client: int) -> bool:
        """Return whether a client is surely this node's."""
        return self.of > 0 and client % self.of == self.partition


@dataclass(frozen=True)
class Query:
    """An opening query that is out: to which node, to which of its processes, and until when."""

    node: int
    active: str
    expires: float

    def is_for(self, info: NodeInfo | None) -> bool:
        """Return whether the process that was asked is the one that is there now."""
        return info is not None and info.last_activated_at == self.active


class Nodes:
    """The nodes of a run: new ones are asked and join, and those that are offline host no client.
    A node is asked once each time that it becomes active, and one that cannot be used repeatedly.

    Parameters
    ----------
    clients
        The number of clients of the run.
    accept
        A function of a node's numbers; it raises `ValueError` if the node cannot be used.
    joined
        A function that is called with each node that has joined.
    """

    def __init__(
        self,
        grid: Grid,
        config_json: str,
        clients: int,
        accept: Callable[[Numbers], None],
        joined: Callable[[Host], None],
    ):
        self._grid = grid
        self._config_json = config_json
        self._clients = range(clients)
        self._accept = accept
        self._joined = joined
        Admitted.of_environment()  # refused now rather than when a node joins
        self._online: dict[int, NodeInfo] = {}
        self._hosts: dict[int, Host] = {}
        self._queries: dict[str, Query] = {}
        self._refused: dict[int, Refused] = {}
        self._again: dict[int, float] = {}
        """Node -> when it may be asked again."""

    def meet(self) -> None:
        """Wait for the first nodes, and until all that are there have answered.

        Raises
        ------
        RuntimeError
            No node came, or none can run the ClientApp.
        """
        end = time.monotonic() + JOIN_S
        while not self.refresh() and time.monotonic() < end:
            time.sleep(0.2)
        if not self._online:
            raise RuntimeError(f"no node joined within {JOIN_S:g} s; start SuperNodes first")
        while self._queries and time.monotonic() < end:
            time.sleep(POLL_S)
            self.refresh()
        if not self._hosts:
            silent = [
                f"node {q.node}: no answer within {JOIN_S:g} s" for q in self._queries.values()
            ]
            failures = [f"node {node}: {it.reason}" for node, it in self._refused.items()]
            raise RuntimeError("no node can run the ClientApp. " + "; ".join(failures + silent))

    def refresh(self) -> bool:
        """See who is online, ask new nodes, take the answers that are in; return whether any is
        online.
        """
        before, now = self._online, time.monotonic()
        self._online = {info.node_id: info for info in self._grid.get_nodes()}
        for node, info in self._online.items():
            if node not in before or before[node].last_activated_at != info.last_activated_at:
                self._again.pop(node, None)  # another process, perhaps with another node config
        self._refused = {n: it for n, it in self._refused.items() if n in self._online}
        for node in sorted(self._online):
            if not (self._is_here(node) or self._is_asked(node) or now < self._again.get(node, 0)):
                self._ask(node)
        for message_id, query in list(self._queries.items()):
            for reply in pull(self._grid, message_id, MOST_ANSWER, query.expires):
                self._queries.pop(message_id, None)
                self._again[query.node] = now + AGAIN_S
                self._take(query, reply)
            if message_id in self._queries and now > query.expires:
                del self._queries[message_id]
                self._refused[query.node] = Refused(f"no answer within {JOIN_S:g} s")
        return bool(self._online)

    def wait_for(self, clients: list[int], count: int, seconds: float) -> set[int]:
        """Return those clients that have a host now; wait while they are fewer than `count`."""
        end = time.monotonic() + seconds
        self.refresh()
        while len(found := {c for c in clients if self.host_of(c)}) < count:
            if time.monotonic() >= end:
                break
            time.sleep(LOOK_S)
            self.refresh()
        return found

    def host_of(self, client: int) -> Host | None:
        """Return the node that works for a client; None while the node is not there."""
        here = [self._hosts[node] for node in sorted(self._hosts) if self._is_here(node)]
        own = [host for host in here if host.owns(client)]
        if own:
            return own[0]
        if any(host.owns(client) for host in self._hosts.values()):
            return None  # its node is away; its data are there, not here
        free = [host for host in here if not host.of]
        return free[client % len(free)] if free else None

    def refusals(self, clients: Iterable[int]) -> Iterator[tuple[int, int, str]]:
        """Return (client, node, reason) of those clients whose node is there but cannot be used."""
        for client in clients:
            for node, it in self._refused.items():
                if it.of and client % it.of == it.partition and not self.host_of(client):
                    yield client, node, it.reason

    def refused(self) -> list[dict[str, str]]:
        """Return every node that is there but cannot be used, and why, for the record."""
        return [{"node": str(node), "reason": it.reason} for node, it in self._refused.items()]

    def has_restarted(self, host: Host) -> bool:
        """Return whether the process that was sent a message has been replaced by another.

        Flower says so itself of a node that is away, but not of one that has come back.
        """
        info = self._online.get(host.node)
        return info is not None and info.last_activated_at != host.active

    def __len__(self) -> int:
        return sum(map(self._is_here, self._hosts))

    def _is_here(self, node: int) -> bool:
        """Return whether a node is online and has answered since it came."""
        info, host = self._online.get(node), self._hosts.get(node)
        return info is not None and host is not None and host.active == info.last_activated_at

    def _is_asked(self, node: int) -> bool:
        """Return whether the process that is there now has a query to answer."""
        info = self._online[node]
        return any(q.node == node and q.is_for(info) for q in self._queries.values())

    def _ask(self, node: int) -> None:
        about = ConfigRecord({"round": 0, "client": 0, "config": self._config_json})
        message = Message(
            RecordDict({"about": about}),
            dst_node_id=node,
            message_type=MessageType.QUERY,
            ttl=JOIN_S,
        )
        query = Query(node, self._online[node].last_activated_at, time.monotonic() + JOIN_S)
        self._queries = {m: q for m, q in self._queries.items() if q.node != node}
        self._queries |= dict.fromkeys((m for m in self._grid.push_messages([message]) if m), query)

    def _take(self, query: Query, reply: Message | Exception) -> None:
        node = query.node
        again = (*UNANSWERED, ErrorCode.CLIENT_APP_CRASHED)
        if isinstance(reply, Message) and reply.has_error() and reply.error.code in again:
            log(WARNING, "node %d did not answer: %s", node, reason_of(reply.error))
            return
        if not query.is_for(self._online.get(node)):
            return  # only of a node that is there the key is known; it is asked when it is back
        answer: Answer | None = None
        try:
            answer = read_answer(reply)
            self._check(node, answer)
        except ValueError as error:
            reason = clean(error)
            log(WARNING, "node %d cannot be used: %s", node, reason)
            place = (answer.partition, answer.of) if answer else ()
            self._refused[node] = Refused(reason, *place)
            return
        self._refused.pop(node, None)
        host = Host(node, answer.partition, answer.of, answer.numbers, query.active)
        # one that was away has come back as another node, as with a new key
        self._hosts = {
            n: it for n, it in self._hosts.items() if self._is_here(n) or not self._both(it, host)
        }
        self._hosts[node] = host
        log(INFO, "node %d joined%s", node, _named(self._online.get(node)))
        self._joined(host)

    def _check(self, node: int, answer: Answer) -> None:
        """Refuse a node that is not fit, is not who it says, or claims another node's clients."""
        admitted = Admitted.of_environment()  # anew each time: the operator may have mended it
        if admitted is not None:
            admitted.check(self._online[node].public_key, answer.partition, answer.of)
        for other, host in self._hosts.items():
            if other == node or not self._is_here(other):
                continue
            mine = Host(node, answer.partition, answer.of, {}, "")
            if shared := self._both(host, mine):
                raise ValueError(
                    f"it says that it hosts client {shared[0]} (partition-id={answer.partition} "
                    f"num-partitions={answer.of} in its node config), whom node {other}"
                    f"{_named(self._online.get(other))} hosts: each node has a partition-id of "
                    "its own"
                )
        if answer.refused is not None:
            raise ValueError(answer.refused)
        self._accept(answer.numbers)

    def _both(self, one: Host, other: Host) -> list[int]:
        """Return the clients that two nodes host, each by its own account."""
        return [client for client in self._clients if one.owns(client) and other.owns(client)]


def _named(info: NodeInfo | None) -> str:
    """Return the name that the operator gave a node, for a log."""
    return f" ({clean(info.name, 100)})" if info is not None and info.name else ""


class Patience:
    """How long to wait until the next look, when nothing has come since this object was made."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def pause(self) -> float:
        """Return the seconds until the next look."""
        waited = time.monotonic() - self._since
        return min(max(POLL_S, POLL_SHARE * waited), POLL_MOST_S)


def most_out(grid: Grid) -> float:
    """Return how many messages of a round may be out at once: in a simulation two for each Ray
    core.

    In a simulation messages lie in this process until a Ray worker is free, so that a round of
    hundreds of clients would hold the network hundreds of times. SuperNodes fetch theirs at once.
    """
    if not isinstance(grid, InMemoryGrid):
        return math.inf
    import ray

    return 2 * max(1.0, ray.cluster_resources().get("CPU", 1.0))
