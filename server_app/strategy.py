"""A run on Flower's grid: its nodes join, its rounds go out and back, and its end is written."""

from __future__ import annotations

import json
from logging import INFO, WARNING
from typing import Any, NoReturn

from flwr.common import log
from flwr.serverapp import Grid

from fed_diffusion.experiment import Experiment
from server_app.answers import Numbers
from server_app.exchange import Exchange
from server_app.nodes import Host, Nodes
from server_app.replies import bound


class FedDiffusion:
    """Coordinate-wise aggregation (8) with per-client masks, on Flower's grid.

    `run` is the whole training. This is not one of Flower's `Strategy` classes: the experiment
    holds theta, the number of rounds and the checkpoints, and its loop folds each reply in as it
    arrives, where Flower's `start` keeps all of a round's replies and hands theta in and out.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.config = experiment.config

    def run(self, grid: Grid) -> dict[str, Any]:
        """Train all rounds that are left, then run the final hook; return the results.

        Every node answers a query first, so that no deadline counts the time of start-up.
        """
        with self.experiment.guarded():
            self.summary()
            nodes = self._meet(grid)
            log(INFO, "%d clients on %d nodes", self.config.clients, len(nodes))
            self.experiment.coordinator.flights.forget()
            return self.experiment.train(Exchange(self.experiment, grid, nodes), self._report)

    def start(self, *arguments: object, **keywords: object) -> NoReturn:
        """Refuse the call that Flower makes to its strategies.

        Raises
        ------
        NotImplementedError
            This is always raised; the message says what to call instead.
        """
        raise NotImplementedError(
            "FedDiffusion has no start(): theta, the number of rounds and the checkpoints are the "
            "experiment's. Call FedDiffusion(Experiment(config, run_dir)).run(grid)."
        )

    def _meet(self, grid: Grid) -> Nodes:
        bound(grid)
        settings = json.dumps(self.config.to_dict())
        nodes = Nodes(grid, settings, self.config.clients, self._accept, self._joined)
        nodes.meet()
        return nodes

    def _accept(self, numbers: Numbers) -> None:
        if numbers["own-data"] and numbers["num-partitions"] != self.config.clients:
            raise ValueError(
                "a node with data of its own is one client; its node config must say which: "
                f"partition-id=0 (or 1, 2, ...) num-partitions={self.config.clients}, as many as "
                f"clients = {self.config.clients}; it says num-partitions="
                f"{numbers['num-partitions']:g}"
            )
        if self.config.round.weighting == "examples" and not numbers.get("images", 0) >= 1:
            raise ValueError("round.weighting=examples: its answer does not say how many images")
        if self.config.pruning.budget == "level":
            return
        if not numbers["num-partitions"]:
            raise ValueError(
                "with pruning.budget a node's clients have the node's ratio, so its node config "
                "must say which clients they are: partition-id=0 num-partitions=3"
            )
        if "keep" not in numbers:
            raise ValueError("its answer does not say its keep")
        self.experiment.coordinator.participation.check(numbers["keep"])

    def _joined(self, host: Host) -> None:
        """Announce what a node can carry, for every client that it hosts."""
        whose = "of its own" if host.numbers["own-data"] else "of a shared set"
        count = f"{host.numbers['images']:.0f} images" if "images" in host.numbers else "images"
        log(INFO, "node %d has %s %s", host.node, count, whose)
        own = [client for client in range(self.config.clients) if host.owns(client)]
        self._weigh(host, own)
        if self.config.pruning.budget == "level":
            return
        self.experiment.announce(dict.fromkeys(own, host.numbers))

    def _weigh(self, host: Host, clients: list[int]) -> None:
        """Note a node's number of images: with round.weighting examples no client counts more."""
        if self.config.round.weighting != "examples":
            return
        images = self.experiment.coordinator.participation.images
        images |= dict.fromkeys(clients, int(host.numbers["images"]))
        most, total = max(images.values()), sum(images.values())
        if len(images) > 2 and 2 * most > total and host.numbers["own-data"]:
            log(
                WARNING,
                "client %d says that it has %d of the %d images of all who have joined: with "
                "round.weighting=examples it counts only as much as all others of a round together",
                *(max(images, key=lambda client: images[client]), most, total),
            )

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

    def summary(self) -> None:
        log(
            INFO,
            "FedDiffusion: preset %s, %d clients, %d rounds, %d parameters",
            self.config.preset,
            self.config.clients,
            self.config.rounds,
            self.experiment.coordinator.parameters,
        )
