"""A Flower Strategy whose rounds are the Coordinator's: tasks out, updates in one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import INFO, WARNING

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from client_app.messages import to_records, to_update
from fed_diffusion.experiment import Experiment
from fed_diffusion.federation.aggregate import UpdateError
from fed_diffusion.federation.coordinator import RoundSummary, Task

POLL_S = 0.05
"""Between looks for replies; Flower's own loop waits up to 3 s."""
DEAD_ACTOR = "ray.exceptions.ActorDiedError"
JOIN_S = 120.0
"""How long to wait for the first node, and for nodes to answer the opening query."""


class FedDiffusion(Strategy):
    """Coordinate-wise aggregation (8) with per-client masks, on Flower's grid.

    `run` is the whole training with its own round loop: replies are folded in as they arrive and
    dropped at once, and a client that fails costs its own update. The abstract methods are the
    same steps, so Flower's own `start` works too.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.config = experiment.config
        self._config_json = json.dumps(self.config.to_dict())
        self._nodes: list[int] = []

    def run(self, grid: Grid) -> None:
        """All rounds; every node answers a query first, so that start-up eats no deadline."""
        self.summary()
        self._nodes = self._meet(grid)
        log(INFO, "%d clients on %d nodes", self.config.clients, len(self._nodes))
        for round in range(1, self.config.rounds + 1):
            self._report(self._round(grid, round))

    def _round(self, grid: Grid, round: int) -> RoundSummary:
        deadline = time.monotonic() + self.config.round.deadline_s
        waiting: dict[str, int] = {}
        for task in self.experiment.tasks(round):
            sent = [m for m in grid.push_messages([self._message(task)]) if m]
            waiting |= dict.fromkeys(sent, task.client)
        for message_id, reply in _replies(grid, waiting, deadline):
            self._receive(reply, waiting.pop(message_id))
        for client in self.experiment.coordinator.waiting():
            self._reject(client, f"no reply within {self.config.round.deadline_s:g} s")
        return self.experiment.close_round()

    def _receive(self, reply: Message | Exception, client: int) -> None:
        if isinstance(reply, Exception):
            self._reject(client, f"its reply cannot be read: {reply!r}")
            return
        if reply.has_error():
            reason = _reason(reply.error)
            if reply.error.code == 0 and DEAD_ACTOR in reason:
                # Flower puts a dead actor back in its pool, where it eats message after message
                raise RuntimeError(f"a Ray worker process died (out of memory?): {reason}")
            self._reject(client, reason)
            return
        try:
            update = to_update(reply.content)
        except UpdateError as error:
            self._reject(client, str(error))
            return
        if update.client != client:
            self._reject(client, f"the reply is for client {update.client}")
            return
        if not self.experiment.receive(update):
            log(WARNING, "the update of client %d was rejected; see metrics.jsonl", client)

    def _reject(self, client: int, reason: str) -> None:
        log(WARNING, "client %d does not count in this round: %s", client, reason)
        self.experiment.reject(client, reason)

    def _message(self, task: Task) -> Message:
        return Message(
            to_records(task, self._config_json),
            dst_node_id=self._nodes[task.client % len(self._nodes)],
            message_type=MessageType.TRAIN,
            ttl=self.config.round.deadline_s,
            group_id=str(task.round),
        )

    def _meet(self, grid: Grid) -> list[int]:
        """The nodes that answer a query, in the order of their partition ids.

        Where nodes say what they can carry, it holds for every client that a node hosts.
        """
        node_ids = _wait_for(lambda: sorted(grid.get_node_ids()), JOIN_S)
        if not node_ids:
            raise RuntimeError(f"no node joined within {JOIN_S:g} s; start SuperNodes first")
        about = ConfigRecord({"round": 0, "client": 0, "config": self._config_json})
        queries = [
            Message(
                RecordDict({"about": about}),
                dst_node_id=node,
                message_type=MessageType.QUERY,
                ttl=JOIN_S,
            )
            for node in node_ids
        ]
        sent: dict[str, int] = {}
        for query, node in zip(queries, node_ids, strict=True):
            sent |= dict.fromkeys((m for m in grid.push_messages([query]) if m), node)
        met: list[tuple[int, int]] = []
        budgets: dict[int, Mapping[str, float]] = {}
        failures: list[str] = []
        for message_id, reply in _replies(grid, sent, time.monotonic() + JOIN_S):
            node = sent.pop(message_id)
            try:
                numbers = _answer(reply)
                if self.config.pruning.budget != "level":
                    self.experiment.check_keep(numbers["keep"])
                    budgets[node] = numbers
                met.append((int(numbers["partition-id"]), node))
            except (ValueError, KeyError, TypeError) as error:
                failures.append(f"node {node}: {error}")
        failures += [f"node {node}: no answer within {JOIN_S:g} s" for node in sent.values()]
        for failure in failures:
            log(WARNING, "%s", failure)
        if not met:
            raise RuntimeError("no node can run the ClientApp. " + "; ".join(failures))
        nodes = [node for _, node in sorted(met)]
        if budgets:
            hosts = {client: nodes[client % len(nodes)] for client in range(self.config.clients)}
            self.experiment.announce({client: budgets[node] for client, node in hosts.items()})
        return nodes

    def _report(self, summary: RoundSummary) -> None:
        log(
            INFO,
            "round %d/%d  loss %.4f  held-out %s  Gamma %d  %.1f s",
            summary.round,
            self.config.rounds,
            summary.loss,
            "-" if summary.holdout_loss is None else f"{summary.holdout_loss:.4f}",
            summary.gamma,
            summary.seconds,
        )

    # --- Flower's Strategy interface: the same steps, for `start` -------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's tasks as messages; theta is the coordinator's, not `arrays`."""
        self._nodes = self._nodes or self._meet(grid)
        return (self._message(task) for task in self.experiment.tasks(server_round))

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
            self._reject(client, "no reply")
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


def _answer(reply: Message | Exception) -> dict[str, float]:
    """The numbers of a node's answer to the opening query; raises where it is none."""
    if isinstance(reply, Exception):
        raise ValueError(f"its answer cannot be read: {reply!r}")
    if reply.has_error():
        raise ValueError(_reason(reply.error))
    numbers = reply.content["metrics"]
    if not isinstance(numbers, MetricRecord):
        raise TypeError("its answer has no metrics")
    return {key: value for key, value in numbers.items() if not isinstance(value, list)}


def _replies(
    grid: Grid, waiting: dict[str, int], deadline: float
) -> Iterator[tuple[str, Message | Exception]]:
    """Replies as they come, until `waiting` is empty (the caller removes) or time is up."""
    while waiting and time.monotonic() < deadline:
        arrived = False
        for message_id in list(waiting):  # one at a time: one update in memory, not all of them
            try:
                replies: list[Message | Exception] = list(grid.pull_messages([message_id]))
            except (ValueError, TypeError, KeyError) as error:  # a reply that does not inflate
                replies = [error]
            for reply in replies:
                arrived = True
                yield message_id, reply
        if not arrived:
            time.sleep(POLL_S)


def _wait_for(probe: Callable[[], list[int]], seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    while not (found := probe()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _reason(error: Error) -> str:
    return f"{error.reason or 'no reason given'} (Flower error {error.code})"
