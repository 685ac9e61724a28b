"""Flower's FedAvg and this project's strategy aggregating the same replies, in turn.

    python benchmarks/aggregation.py [--repeats 3] [--large]

Replies are Flower messages that come one at a time, as from the grid: whole networks as NumPy
arrays for FedAvg; for us the same values under full, channel, random and top-k masks at keep 0.75.
Seconds are of taking a reply apart, checking it, adding it and making the result, without making
the replies. The peak is of a process of its own for each case, above what it held before the first
reply; the model, which both need, is in it for both. --large takes a network of 100 M parameters.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from client_app.messages import to_records, to_update
from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.config import Config, load_config
from fed_diffusion.masks.families import derive, family_of
from fed_diffusion.masks.mask import kept_values
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.codecs import cast
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.wire import Payload
from fed_diffusion.server.coordinator import Coordinator

SIZES: dict[str, dict[str, Any]] = {
    "24 M": {},
    "100 M": {"model.widths": [128, 256, 512, 640], "model.blocks": 2},
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {"pruning.kind": "full"},
    "channels": {"pruning.kind": "channels", "pruning.keep": 0.75},
    "random": {"pruning.kind": "random", "pruning.keep": 0.75},
    "topk": {"pruning.kind": "topk", "pruning.keep": 0.75},
}


class Clock:
    """Adds up the time between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def without(self, replies: Iterator[Message]) -> Iterator[Message]:
        """The replies, with the clock standing still while each is made."""
        while True:
            self.stop()
            reply = next(replies, None)
            self.start()
            if reply is None:
                return
            yield reply

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._began


def config_of(size: str, mask: str, clients: int) -> Config:
    more = SIZES[size] | MASKS[mask] | {"clients": clients}
    return load_config("cifar10", more)


def reply_with(content: RecordDict) -> Message:
    question = Message(RecordDict(), dst_node_id=1, message_type="train")
    return Message(content, reply_to=question)


def fed_avg(config: Config, clock: Clock) -> None:
    theta = parameters_of(build_network(config))

    def replies() -> Iterator[Message]:
        for client in range(config.clients):
            values = {name: value + 1e-3 * client for name, value in theta.items()}
            yield reply_with(
                RecordDict(
                    {
                        "arrays": ArrayRecord(values),
                        "metrics": MetricRecord({"num-examples": 1, "loss": 1.0}),
                    }
                )
            )

    clock.start()
    FedAvg().aggregate_train(1, clock.without(replies()))
    clock.stop()


def ours(config: Config, clock: Clock) -> None:
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    theta, layout = coordinator.theta, coordinator.layout
    measured = {"loss": 1.0, "images": 1, "examples": 1, "seconds": 1.0}
    # every task goes out before the first reply comes in
    recipes = {
        task.client: Recipe.from_metrics(task.payload.numbers) for task in coordinator.tasks(1)
    }
    family = family_of(config.pruning, config.seed)
    same = derive(family, recipes[0], theta, layout) if family.shared else None

    def replies() -> Iterator[Message]:
        for client, recipe in recipes.items():
            masks = derive(family, recipe, theta, layout) if same is None else same
            start = kept_values(theta, masks)
            arrays = {
                name: cast(value + 1e-3 * client, "fp32", False, None).pack()
                for name, value in start.items()
            }
            payload = Payload(arrays, recipe.to_metrics() | measured)
            yield reply_with(to_records(Update(1, client, payload)))

    clock.start()
    for reply in clock.without(replies()):
        assert coordinator.receive(to_update(reply.content))
    coordinator.close_round()
    clock.stop()


def case(size: str, mask: str, clients: int) -> tuple[float, float]:
    """(seconds, peak bytes) of one aggregation; mask "FedAvg" is Flower's."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    torch.set_num_threads(1)  # as the server does (worker.threads)
    action: Callable[[Config, Clock], None] = fed_avg if mask == "FedAvg" else ours
    config, clock = config_of(size, "full" if mask == "FedAvg" else mask, clients), Clock()
    with peak_memory(torch.device("cpu")) as peak:
        action(config, clock)
        return clock.seconds, peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="100 M parameters instead")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    cases = [("100 M", 10)] if arguments.large else [("24 M", 10), ("24 M", 50)]
    print(f"{usable_cores()} cores, torch {torch.__version__}, medians of {arguments.repeats}\n")
    print("| network | clients | case | seconds | / FedAvg | peak MB | / FedAvg |")
    print("|---|---|---|---|---|---|---|")
    for size, clients in cases:
        measured: dict[str, list[tuple[float, float]]] = {m: [] for m in ("FedAvg", *MASKS)}
        for _ in range(arguments.repeats):  # in turn, each in a process of its own
            for mask, results in measured.items():
                with context.Pool(1) as pool:
                    results.append(pool.apply(case, (size, mask, clients)))
        base = [statistics.median(column) for column in zip(*measured["FedAvg"], strict=True)]
        for mask, results in measured.items():
            seconds, peak = (statistics.median(column) for column in zip(*results, strict=True))
            print(
                f"| {size} | {clients} | {mask} | {seconds:.2f} | {seconds / base[0]:.2f} | "
                f"{peak / 1e6:.0f} | {peak / base[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
