"""A round's messages out and back on Flower's grid, whatever the round policy."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from logging import WARNING

from flwr.app import Error, Message, MessageType
from flwr.common import log
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from client_app.messages import longest_index, to_records
from fed_diffusion.common.text import clean
from fed_diffusion.experiment import Experiment, exchanges
from fed_diffusion.protocol.errors import Fault
from fed_diffusion.protocol.messages import Task
from server_app.deadline import Deadline
from server_app.nodes import JOIN_S, Host, Nodes, Patience, most_out
from server_app.replies import Unusable, pull, read_update, reason_of

DEAD_ACTOR = "ray.exceptions.ActorDiedError"
LIVES_S = 5.0
"""The seconds between looks for nodes while a round waits for replies."""


@dataclass(frozen=True)
class Sent:
    """A message that is out: whose task it carries, to which node, and how long it is waited for.

    Attributes
    ----------
    began
        When the wait began: with the round, or, where tasks outlive rounds, with the message.
    most
        The most bytes that the message's reply may have.
    """

    client: int
    host: Host
    began: float
    seconds: float
    most: int

    @property
    def expires(self) -> float:
        return self.began + self.seconds

    @property
    def node(self) -> int:
        return self.host.node


class Turns:
    """The order in which tasks are sent.

    Where clients remember something, a node has one message at a time: of two memories that it
    changes at the same time, Flower may keep the last one only.
    """

    def __init__(self, nodes: Nodes, remember: bool):
        self._nodes, self._remember = nodes, remember
        self._held: list[Task] = []
        """Tasks that wait until their node is free."""

    def take(self, tasks: Iterator[Task], out: Iterable[Sent]) -> Task | None:
        """Return the next task whose node can take it now, if there is one."""
        busy = {sent.node for sent in out} if self._remember else set()
        for place, held in enumerate(self._held):
            if not self._works(held, busy):
                return self._held.pop(place)
        while len(self._held) <= len(self._nodes) and (task := next(tasks, None)):
            if not self._works(task, busy):
                return task
            self._held.append(task)
        return None

    def end(self) -> None:
        """Send none of the tasks that wait."""
        self._held.clear()

    def _works(self, task: Task, busy: Collection[int]) -> bool:
        host = self._nodes.host_of(task.client)
        return host is not None and host.node in busy


class Exchange:
    """This engine's loop sends tasks, and folds replies in as they arrive.

    A client that fails costs its own update, and nodes come and go. Where tasks outlive rounds,
    what is out stays out when a round has enough, and clients that have become free are asked at
    each look. Else a round asks once, and what has not come by its end is late.
    """

    def __init__(self, experiment: Experiment, grid: Grid, nodes: Nodes):
        self._experiment = experiment
        self._grid = grid
        self._nodes = nodes
        self._clients = list(range(experiment.config.clients))
        self._deadline = Deadline(experiment.config.round.deadline_s)
        self._began, self._seconds = time.monotonic(), self._deadline.seconds([])
        self._config_json = json.dumps(experiment.config.to_dict())
        self._overlapping = experiment.coordinator.policy.overlapping
        self._simulated = isinstance(grid, InMemoryGrid)
        self._turns = Turns(nodes, experiment.config.secure.aggregation)
        coordinator = experiment.coordinator
        self._index = longest_index([*coordinator.theta, *coordinator.moments])
        self._looked = time.monotonic()
        self._most = math.inf
        """The most messages that may be out at once."""
        self._out: dict[str, Sent] = {}
        self._late: dict[str, Sent] = {}
        """Messages that are no longer waited for."""

    def __call__(self, round: int) -> None:
        """Do one round, until there are enough updates, or no more can come, or time is up."""
        self._drop_late()
        # a window would starve high client numbers where low ones become free again and again
        self._most = math.inf if self._overlapping else most_out(self._grid)
        if self._overlapping:
            self._exchange(lambda: self._experiment.tasks(round, self._asked()))
        else:
            for tasks in exchanges(self._experiment, round, self._asked()):
                self._began = time.monotonic()
                self._exchange(partial(_same, tasks))
                self._give_up()
        for client, node, reason in self._nodes.refusals(self._clients):
            self._reject(client, reason, node, "node")
        self._experiment.note_refused(self._nodes.refused())

    def _exchange(self, ask: Callable[[], Iterator[Task]]) -> None:
        """Carry messages out and back; `ask` gives what is to be sent, at each look anew."""
        patience = Patience()
        while not self._experiment.enough():
            tasks = ask()
            self._fill(tasks)
            if not self._out:
                break
            came = self._look(tasks)
            if not self._left():
                break  # after a look at least: what came while tasks were made counts
            if came:
                patience = Patience()
            else:
                time.sleep(min(patience.pause(), self._left()))

    def _available(self) -> set[int]:
        """Return clients whose node is there; a round that asks once waits for its quorum of
        them.
        """
        count = 1 if self._overlapping else self._experiment.coordinator.quorum()
        seconds = self._deadline.seconds(self._clients)
        return self._nodes.wait_for(self._clients, count, min(seconds, JOIN_S))

    def _asked(self) -> set[int]:
        """Return clients whose node is there; from now on the time for their updates runs."""
        available = self._available()
        self._seconds = self._deadline.seconds(available)
        self._began = time.monotonic()
        return available

    def _left(self) -> float:
        """Return the seconds until the round's deadline.

        Where tasks outlive rounds, each message has a deadline of its own.
        """
        if self._overlapping:
            return math.inf
        return max(0.0, self._began + self._seconds - time.monotonic())

    # --- out ------------------------------------------------------------------------------------

    def _fill(self, tasks: Iterator[Task]) -> None:
        """Send tasks while there is room for messages; each is encoded when it is sent."""
        while len(self._out) < self._most and (task := self._turns.take(tasks, self._out.values())):
            self._send(task)

    def _send(self, task: Task) -> None:
        """Return the task's message on its way to the client's node; else reject the client."""
        host = self._nodes.host_of(task.client)
        message_ids = self._grid.push_messages([self._message(task, host)]) if host else []
        sent = [message_id for message_id in message_ids if message_id]
        if not sent or host is None:
            node = host.node if host else None
            self._reject(task.client, "its node cannot be reached", node, "network")
            return
        most = self._experiment.coordinator.flights.out[task.client].most + self._index
        one = Sent(task.client, host, self._began, self._seconds, most)
        self._out |= dict.fromkeys(sent, one)

    def _message(self, task: Task, host: Host) -> Message:
        return Message(
            to_records(task, self._config_json),
            dst_node_id=host.node,
            message_type=MessageType.TRAIN,
            ttl=self._seconds,
            group_id=str(task.round),
        )

    # --- back -----------------------------------------------------------------------------------

    def _look(self, tasks: Iterator[Task]) -> bool:
        """Look once for each reply that is out, until there are enough; return whether any came."""
        came = False
        if time.monotonic() - self._looked > LIVES_S:
            self._nodes.refresh()
            self._looked = time.monotonic()
        for message_id, sent in list(self._out.items()):  # one update in memory, not all of them
            for reply in pull(self._grid, message_id, sent.most, sent.expires):
                came = True
                self._out.pop(message_id, None)
                self._receive(reply, sent)
            if self._experiment.enough():
                break
            if message_id not in self._out:
                self._fill(tasks)
            elif time.monotonic() > sent.expires:
                self._deadline.missed(sent.client)
                self._drop(message_id, _no_reply(sent.seconds))
            elif self._nodes.has_restarted(sent.host):
                self._drop(message_id, "its node was started again while it worked")
        return came

    def _drop(self, message_id: str, why: str) -> None:
        """Wait no longer for a reply."""
        sent = self._late[message_id] = self._out.pop(message_id)
        self._reject(sent.client, why, sent.node, "network")

    def _receive(self, reply: Message | Exception, sent: Sent) -> None:
        if self._simulated and isinstance(reply, Message) and reply.has_error():
            check_actor(reply.error)
        update, client, node = read_update(reply, sent.client, self._index), sent.client, sent.node
        if isinstance(update, Unusable):
            if update.missed:
                self._deadline.missed(client)
            self._reject(client, update.reason, node, update.fault, update.nbytes)
            return
        open = self._experiment.coordinator.open
        if open is not None and open.counting:  # other parts of a protocol take no training
            self._deadline.came(client, time.monotonic() - sent.began)
        if not self._experiment.receive(update, node):
            log(WARNING, "the update of client %d was rejected; see metrics.jsonl", client)

    def _reject(
        self, client: int, reason: str, node: int | None, fault: Fault, nbytes: int = 0
    ) -> None:
        log(WARNING, "client %d does not count in this round: %s", client, clean(reason))
        self._experiment.reject(client, reason, node, nbytes, fault)

    # --- what does not come ---------------------------------------------------------------------

    def _give_up(self) -> None:
        """Name the clients whose update the round ends without."""
        coordinator, early = self._experiment.coordinator, self._experiment.enough()
        why = "there were enough updates without it" if early else _no_reply(self._seconds)
        nodes = {sent.client: sent.node for sent in self._out.values()}
        for client in () if early else nodes:
            self._deadline.missed(client)
        self._late |= self._out
        self._out.clear()
        self._turns.end()
        for client in coordinator.waiting() + ([] if early else coordinator.unsent()):
            self._reject(client, why, nodes.get(client), "nobody" if early else "network")

    def _drop_late(self) -> None:
        """Recognise replies that are no longer waited for, and throw them away."""
        for message_id, sent in list(self._late.items()):
            found = list(pull(self._grid, message_id, sent.most, 0.0))
            if any(isinstance(reply, Message) and reply.has_content() for reply in found):
                self._experiment.coordinator.ledger.late()
            if found or time.monotonic() > sent.expires:
                del self._late[message_id]


def check_actor(error: Error) -> None:
    """End the run if a Ray actor has died.

    Flower puts a dead actor back in its pool, where it eats message after message.
    """
    reason = reason_of(error)
    if error.code == 0 and DEAD_ACTOR in reason:
        raise RuntimeError(f"a Ray worker process died (out of memory?): {reason}")


def _no_reply(seconds: float) -> str:
    return f"no reply within {seconds:.4g} s"


def _same(tasks: Iterator[Task]) -> Iterator[Task]:
    """Return the messages of an exchange that asks once: what is left of them."""
    return tasks
