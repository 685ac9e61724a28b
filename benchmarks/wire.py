"""Bytes per round and the time of packing them, against sending the whole network in fp32.

    python benchmarks/wire.py [--preset cifar10] [--repeats 3]

Ten clients. Every kind of mask with everyone at keep 0.75 and at 0.25, and at the paper's level S,
in each type on the wire; int8 goes down as values and up as differences. Bytes are the ledger's, a
round's, as parts of dense fp32. Seconds are of one thread for the last (a weak) client and both
directions: casting theta (a tenth of it, since it is done once for all), packing and unpacking the
task, packing and unpacking the update. The time to derive the mask stands apart. The last columns:
the time that the bytes saved would have taken that client at 1 Gbit/s, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config, load_config
from fed_diffusion.masks.families import derive
from fed_diffusion.masks.plan import plan_round
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.wire import (
    Payload,
    Wire,
    cast_theta,
    decode_task,
    decode_update,
    encode_task,
    encode_update,
)

BYTES_PER_SECOND = 1e9 / 8
KINDS = ("full", "random", "topk", "balanced", "channels")
AMOUNTS = {"0.75": {"keep": 0.75}, "0.25": {"keep": 0.25}, "S": {"level": "S"}}
DTYPES = ("fp32", "bf16", "fp16", "int8")


class Exchange:
    """A round's messages under one configuration, with a stopwatch on every part."""

    def __init__(self, config: Config, theta: dict[str, torch.Tensor]):
        setup, self.theta = Setup.of(config), theta
        self.layout, self.family = setup.layout, setup.family
        self.wire = Wire(config.wire, config.pruning, config.local, self.family, config.seed)
        keeps = setup.known_ratios()
        self.recipes = plan_round(self.family, config.pruning.kind, 1, keeps, theta, self.layout)
        self.shapes = {n: torch.empty(v.shape, device="meta") for n, v in theta.items()}
        self.casts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._timed("cast", lambda: self.casts.update(cast_theta(theta, self.wire, 1)))

    def client(self, recipe: Recipe) -> tuple[int, int]:
        """Bytes down and up of one client; the seconds of its parts are noted."""
        wire, theta, layout = self.wire, self.theta, self.layout
        masks = self._timed("mask", lambda: derive(self.family, recipe, theta, layout))
        task = self._timed("encode task", lambda: encode_task(self.casts, recipe, masks))
        _, _, start = self._timed(
            "decode task", lambda: decode_task(task, self.shapes, layout, wire)
        )
        end = {name: value * 1.01 for name, value in start.items()}
        arrays = self._timed(
            "encode update", lambda: encode_update(end, start, masks, wire, 1, recipe.client)
        )
        self._timed("decode update", lambda: decode_update(arrays, theta, masks, wire))
        return task.nbytes, Payload(arrays, recipe.to_metrics()).nbytes

    def wire_seconds(self, recipe: Recipe) -> float:
        """Of a client's exchange; a mask that the client derives is not the wire's time."""
        taken = sum(self.seconds[part] for part in self.seconds if part not in ("cast", "mask"))
        taken -= 0 if recipe.needs_bits else self.seconds["mask"]
        return taken + self.seconds["cast"] / self.config.clients

    def _timed(self, part: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = action()
        self.seconds[part] = time.perf_counter() - began
        return result


def measure(config: Config, theta: dict[str, torch.Tensor], repeats: int) -> str:
    exchange = Exchange(config, theta)
    sizes = [exchange.client(recipe) for recipe in exchange.recipes.values()]
    weak = exchange.recipes[config.clients - 1]
    seconds, masking = [], []
    for _ in range(repeats):
        exchange.client(weak)
        seconds.append(exchange.wire_seconds(weak))
        masking.append(exchange.seconds["mask"])
    dense = 4 * sum(value.numel() for value in theta.values())
    down, up = (sum(size[i] for size in sizes) / (dense * config.clients) for i in (0, 1))
    saved = (2 * dense - sum(sizes[-1])) / BYTES_PER_SECOND
    took = statistics.median(seconds)
    verdict = f"{took / saved:.2f}" if saved > 0.01 else "-"
    return (
        f"{down:.4f} | {up:.4f} | {took:.3f} | {statistics.median(masking):.3f} | {saved:.3f} | "
        f"{verdict}"
    )


def settings(kind: str, amount: str, dtype: str) -> dict[str, Any]:
    pruning = {} if kind == "full" else AMOUNTS[amount]
    chosen: dict[str, Any] = {"pruning.kind": kind, "pruning.level": "F"}
    chosen |= {f"pruning.{key}": value for key, value in pruning.items()}
    chosen |= {"wire.down": dtype, "wire.up": dtype, "wire.differences": dtype == "int8"}
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    theta = parameters_of(build_network(load_config(arguments.preset)))
    print(
        f"{arguments.preset}: {sum(v.numel() for v in theta.values()):,} parameters, 10 clients, "
        f"{usable_cores()} cores, one thread, torch {torch.__version__}, seed 0; medians of "
        f"{arguments.repeats}\n"
    )
    print(
        "| masks | keep | type | down | up | wire s | mask s | saved s at 1 Gbit/s | wire / saved |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for amount in ("1",) if kind == "full" else AMOUNTS:
            for dtype in DTYPES:
                config = load_config(arguments.preset, settings(kind, amount, dtype))
                line = measure(config, theta, arguments.repeats)
                print(f"| {kind} | {amount} | {dtype} | {line} |", flush=True)


if __name__ == "__main__":
    main()
