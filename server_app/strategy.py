"""A Flower Strategy whose rounds are the Coordinator's: tasks out, updates in one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from client_app.messages import to_records, to_update
from fed_diffusion.experiment import Experiment
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import Task
from fed_diffusion.server.buffered import BufferedCoordinator
from server_app.nodes import (
    JOIN_S,
    Host,
    Nodes,
    Numbers,
    Patience,
    most_out,
    pull,
    reason_of,
    replies,
)

DEAD_ACTOR = "ray.exceptions.ActorDiedError"


class FedDiffusion(Strategy):
    """Coordinate-wise aggregation (8) with per-client masks, on Flower's grid.

    `run` is the whole training with its own round loop: replies are folded in as they arrive and
    dropped at once, a client that fails costs its own update, and nodes come and go. The abstract
    methods are the same steps, so Flower's own `start` works too.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.config = experiment.config
        self._config_json = json.dumps(self.config.to_dict())
        self._nodes: Nodes | None = None
        self._late: dict[str, float] = {}
        """Messages whose round was closed without their reply -> when they expire."""
        self._out: dict[str, tuple[int, int, float]] = {}
        """Buffered: messages that are out -> client, node, when they expire."""

    def run(self, grid: Grid) -> dict[str, Any]:
        """All rounds that are left, then the final hook; returns the results.

        Every node answers a query first, so that start-up eats no deadline.
        """
        self.summary()
        nodes = self._meet(grid)
        log(INFO, "%d clients on %d nodes", self.config.clients, len(nodes))
        coordinator = self.experiment.coordinator
        if isinstance(coordinator, BufferedCoordinator):
            coordinator.forget_flights()
            return self.experiment.train(lambda r: self._exchange_buffered(grid, r), self._report)
        return self.experiment.train(lambda round: self._exchange(grid, round), self._report)

    def _exchange_buffered(self, grid: Grid, round: int) -> None:
        """Tasks to whoever is free, until the buffer is full; what is out stays out."""
        assert self._nodes is not None
        clients, seconds = list(range(self.config.clients)), self.config.round.deadline_s
        patience = Patience()
        while not self.experiment.enough():
            available = self._nodes.wait_for(clients, 1, min(seconds, JOIN_S))
            for task in self.experiment.tasks(round, available):
                for message_id, host in self._send(grid, task):
                    expires = time.monotonic() + seconds
                    self._out[message_id] = (task.client, host.node, expires)
            if not self._out:
                break  # nobody is there: below the quorum
            for message_id, (client, node, expires) in list(self._out.items()):
                for reply in pull(grid, message_id):
                    patience = Patience()
                    del self._out[message_id]
                    self._receive(reply, client, node)
                if message_id in self._out and time.monotonic() > expires:
                    del self._out[message_id]
                    self._reject(client, f"no reply within {seconds:g} s", node)
                if self.experiment.enough():
                    break
            time.sleep(patience.pause())
        self._name_refused()

    def _send(self, grid: Grid, task: Task) -> list[tuple[str, Host]]:
        """The task's message on its way to the client's node; else the client is rejected."""
        assert self._nodes is not None
        host = self._nodes.host_of(task.client)
        sent = [m for m in grid.push_messages([self._message(task, host)]) if m] if host else []
        if not sent or host is None:
            self._reject(task.client, "its node cannot be reached", host.node if host else None)
            return []
        return [(message_id, host) for message_id in sent]

    def _exchange(self, grid: Grid, round: int) -> None:
        """One round's messages out and back, until all are in, enough are, or time is up."""
        assert self._nodes is not None
        coordinator, seconds = self.experiment.coordinator, self.config.round.deadline_s
        self._drop_late(grid)
        patience = min(seconds, JOIN_S)
        clients = range(self.config.clients)
        available = self._nodes.wait_for(list(clients), coordinator.quorum(), patience)
        deadline = time.monotonic() + seconds
        waiting: dict[str, tuple[int, int]] = {}
        tasks, most = self.experiment.tasks(round, available), most_out(grid)
        self._fill(grid, waiting, tasks, most)
        for message_id, reply in replies(grid, waiting, deadline):
            self._receive(reply, *waiting.pop(message_id))
            if self.experiment.enough():
                break
            self._fill(grid, waiting, tasks, most)
        self._late |= dict.fromkeys(waiting, deadline)
        early = self.experiment.enough()
        why = "there were enough updates without it" if early else f"no reply within {seconds:g} s"
        nodes = dict(waiting.values())
        for client in coordinator.waiting() + ([] if early else coordinator.unsent()):
            self._reject(client, why, nodes.get(client))
        self._name_refused()

    def _fill(
        self, grid: Grid, out: dict[str, tuple[int, int]], tasks: Iterator[Task], most: float
    ) -> None:
        """Send tasks until `most` messages are out; each is encoded when it is sent."""
        while len(out) < most and (task := next(tasks, None)):
            out |= {m: (task.client, host.node) for m, host in self._send(grid, task)}

    def _name_refused(self) -> None:
        """A client whose node cannot be used is in the round's record, with the reason."""
        assert self._nodes is not None
        for client, node, reason in self._nodes.refusals(range(self.config.clients)):
            self._reject(client, reason, node)

    def _drop_late(self, grid: Grid) -> None:
        """Replies to rounds that are closed are recognised and thrown away."""
        for message_id, expires in list(self._late.items()):
            found = list(pull(grid, message_id))
            if any(isinstance(reply, Message) and reply.has_content() for reply in found):
                self.experiment.coordinator.late()
            if found or time.monotonic() > expires:
                del self._late[message_id]

    def _receive(self, reply: Message | Exception, client: int, node: int | None = None) -> None:
        if isinstance(reply, Exception):
            self._reject(client, f"its reply cannot be read: {reply!r}", node)
            return
        if reply.has_error():
            reason = reason_of(reply.error)
            if reply.error.code == 0 and DEAD_ACTOR in reason:
                # Flower puts a dead actor back in its pool, where it eats message after message
                raise RuntimeError(f"a Ray worker process died (out of memory?): {reason}")
            self._reject(client, reason, node)
            return
        try:
            update = to_update(reply.content)
        except UpdateError as error:
            self._reject(client, str(error), node)
            return
        if update.client != client:
            reason = f"the reply is for client {update.client}"
            self._reject(client, reason, node, update.payload.nbytes)
            return
        if not self.experiment.receive(update, node):
            log(WARNING, "the update of client %d was rejected; see metrics.jsonl", client)

    def _reject(self, client: int, reason: str, node: int | None, nbytes: int = 0) -> None:
        log(WARNING, "client %d does not count in this round: %s", client, reason)
        self.experiment.reject(client, reason, node, nbytes)

    def _message(self, task: Task, host: Host) -> Message:
        return Message(
            to_records(task, self._config_json),
            dst_node_id=host.node,
            message_type=MessageType.TRAIN,
            ttl=self.config.round.deadline_s,
            group_id=str(task.round),
        )

    def _meet(self, grid: Grid) -> Nodes:
        self._nodes = Nodes(grid, self._config_json, self._accept, self._joined)
        self._nodes.meet()
        return self._nodes

    def _accept(self, numbers: Numbers) -> None:
        if numbers["own-data"] and numbers["num-partitions"] != self.config.clients:
            raise ValueError(
                "a node with data of its own is one client; its node config must say which: "
                f"partition-id=0 (or 1, 2, ...) num-partitions={self.config.clients}, as many as "
                f"clients = {self.config.clients}; it says num-partitions="
                f"{numbers['num-partitions']:g}"
            )
        if self.config.pruning.budget == "level":
            return
        if not numbers["num-partitions"]:
            raise ValueError(
                "with pruning.budget a node's ratio is its clients', so its node config must say "
                "which they are: partition-id=0 num-partitions=3"
            )
        self.experiment.check_keep(numbers["keep"])

    def _joined(self, host: Host) -> None:
        """What a node says it can carry holds for every client that it hosts."""
        whose = "of its own" if host.numbers["own-data"] else "of a shared set"
        log(INFO, "node %d has %d images %s", host.node, host.numbers.get("images", 0), whose)
        if self.config.pruning.budget == "level":
            return
        clients = range(self.config.clients)
        own = [client for client in clients if client % host.of == host.partition]
        self.experiment.announce(dict.fromkeys(own, host.numbers))

    def _report(self, line: dict[str, Any]) -> None:
        held_out = line["holdout_loss"]
        log(
            INFO,
            "round %d/%d  loss %.4f  held-out %s  Gamma %d  %.1f s",
            line["round"],
            self.config.rounds,
            line["loss"],
            "-" if held_out is None else f"{held_out:.4f}",
            line["gamma"],
            line["seconds"],
        )

    # --- Flower's Strategy interface: the same steps, for `start` -------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's tasks as messages; theta is the coordinator's, not `arrays`."""
        nodes = self._nodes or self._meet(grid)
        for task in self.experiment.tasks(server_round):
            host = nodes.host_of(task.client)
            if host is None:
                self._reject(task.client, "its node cannot be reached", None)
            else:
                yield self._message(task, host)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies in and close the round by equation (8)."""
        for reply in replies:
            try:
                client = to_update(reply.content).client
            except (UpdateError, ValueError) as error:
                log(WARNING, "a reply does not count: %s", error)
            else:
                self._receive(reply, client)
        for client in self.experiment.coordinator.waiting():
            self._reject(client, "no reply", None)
        summary = self.experiment.close_round()
        return None, MetricRecord({"loss": summary.loss, "gamma": summary.gamma})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: held-out losses come back with the updates."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        log(
            INFO,
            "FedDiffusion: preset %s, %d clients, %d rounds, %d parameters",
            self.config.preset,
            self.config.clients,
            self.config.rounds,
            self.experiment.coordinator.parameters,
        )
