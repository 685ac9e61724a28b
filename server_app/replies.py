"""Replies from the network: they are fetched within limits and read; errors have a culprit."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import DecodeError

from client_app.messages import to_update
from fed_diffusion.common.text import clean
from fed_diffusion.protocol.errors import Fault, ForgottenError, UpdateError
from fed_diffusion.protocol.messages import Update

EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""Flower's errors for a message or a reply that is not there any more."""
UNANSWERED = (*EXPIRED, ErrorCode.NODE_UNAVAILABLE)
"""Flower's errors for a message, a reply or a node that is not there."""
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DecodeError,
    LookupError,
    RecursionError,
    TypeError,
    UnexpectedObjectContentError,
    ValueError,
)
"""The exceptions that Flower raises where a reply's bytes are not a message."""
FEW_OBJECTS = 16
"""The objects of a reply beside its values: the message, its records, and spare room."""


class TooLarge(Exception):
    """A reply has more objects or bytes than it may have; so many bytes of it were fetched."""

    def __init__(self, what: str, nbytes: int = 0):
        super().__init__(what)
        self.nbytes = nbytes


class Unfinished(Exception):
    """A reply was begun, and not all of it has come in time."""


class Bounded:
    """Flower's client of the SuperLink, which fetches no more of a reply than it may have.

    Flower announces the objects of a reply, but not their sizes. Too many objects are refused
    before one is fetched. Other objects are fetched one by one, and none after the limit. What this
    process holds is then the limit and the objects that are on their way, one or two, which the
    proxy bounds.

    Flower waits for an object that is not there yet, and this thread with it. After the time that
    a reply has, nothing is waited for.
    """

    def __init__(self, client: Any):
        self._client = client
        self._lock = threading.Lock()
        self._most, self._until = 0, math.inf
        self._fetched = _Count()
        self._replies: list[Metadata] = []

    def allow(self, most: int, until: float) -> None:
        """Allow so many bytes, and so much time, for the next reply."""
        # a new count: an object of the last reply may still be on its way
        self._most, self._until, self._fetched = most, until, _Count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullMessages(self, request: Any) -> Any:
        """Do what Flower's method does, but refuse a reply of too many objects."""
        response = self._client.PullMessages(request)
        self._replies = [message.metadata for message in response.messages_list]
        allowed = FEW_OBJECTS + 2 * math.ceil(self._most / FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)
        for tree in response.message_object_trees:
            if (count := _size(tree)) > allowed:
                raise TooLarge(f"its reply has {count} objects, and at most {allowed} are due")
        return response

    def PullObject(self, request: Any) -> Any:
        """Do what Flower's method does, up to the limit."""
        most, fetched = self._most, self._fetched
        _check(fetched, most)
        response = self._client.PullObject(request)
        with self._lock:
            fetched.nbytes += len(response.object_content)
        _check(fetched, most)
        if not response.object_available and time.monotonic() > self._until:
            raise Unfinished("its reply was begun and not ended in time")
        return response

    def forget(self) -> None:
        """Have the SuperLink drop the reply that was asked for last, which it keeps for us."""
        for it in self._replies:
            node = Node(node_id=SUPERLINK_NODE_ID)
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=node, run_id=it.run_id, message_object_id=it.message_id
                )
            )


@dataclass
class _Count:
    """The bytes of one reply that were fetched."""

    nbytes: int = 0


def _check(fetched: _Count, most: int) -> None:
    if fetched.nbytes > most:
        what = f"its reply has more than the {most} bytes that it may have"
        raise TooLarge(what, fetched.nbytes)


def _size(tree: ObjectTree) -> int:
    """Return how many objects there are, whatever their depth."""
    count, rest = 0, [tree]
    while rest:
        count += 1
        rest += rest.pop().children
    return count


def bound(grid: Grid) -> None:
    """Let `pull` limit what is fetched from now on; a grid in this process holds all there is."""
    if isinstance(grid, HttpGrid) and not isinstance(grid._client, Bounded):
        # Flower's grid has no limit of its own, and no other place for one
        grid._client = Bounded(grid._runtime_client)  # type: ignore[assignment]


def pull(grid: Grid, message_id: str, most: int, until: float) -> Iterator[Message | Exception]:
    """Return the reply to a message if it is there; an unreadable one is returned as its exception.

    Parameters
    ----------
    most
        The most bytes that the reply may have, where it is to be fetched.
    until
        When the whole reply must be there, by the monotonic clock, if it has been begun.
    """
    client = getattr(grid, "_client", None)
    if isinstance(client, Bounded):
        client.allow(most, until)
    try:
        yield from grid.pull_messages([message_id])
    except (*UNREADABLE, TooLarge, Unfinished) as error:
        if isinstance(client, Bounded):
            client.forget()
        yield error
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.INTERNAL_SERVER_ERROR:
            raise  # the run is over, or the SuperLink is away
        yield error  # it cannot read this reply out, as where its database is locked


@dataclass(frozen=True)
class Unusable:
    """What came in place of an update, and whose fault that is; `missed` if it came too late."""

    reason: str
    fault: Fault
    nbytes: int = 0
    missed: bool = False


def read_update(reply: Message | Exception, client: int, index: int) -> Update | Unusable:
    """Return a client's update of a reply, or why there is none.

    Parameters
    ----------
    index
        The most bytes that the update's index may have.
    """
    if isinstance(reply, Unfinished):
        return Unusable(str(reply), "network", missed=True)
    if isinstance(reply, TooLarge):
        return Unusable(str(reply), "node", reply.nbytes)
    if isinstance(reply, Exception):
        return Unusable(f"its reply cannot be read: {reply!r}", "node")
    if reply.has_error():
        error = reply.error
        return Unusable(reason_of(error), fault_of(error), missed=error.code in EXPIRED)
    try:
        update = to_update(reply.content, index)
    except UpdateError as error:
        return Unusable(str(error), "node")
    if update.client != client:
        reason = f"the reply is for client {update.client}"
        return Unusable(reason, "node", update.payload.nbytes)
    return update


def reason_of(error: Error) -> str:
    """Return what Flower or a node says of an error."""
    return clean(f"{error.reason or 'no reason given'} (Flower error {error.code})")


def fault_of(error: Error) -> Fault:
    """Return whose fault an error is that came in place of a reply.

    A ClientApp that raises, dies or does not load is the node's; a message that is lost is the
    network's, and a node that is gone with it, or what a node remembered.
    """
    lost = error.code in UNANSWERED or ForgottenError.__name__ in (error.reason or "")
    return "network" if lost else "node"
