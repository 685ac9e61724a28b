"""What a diagnostic round costs: workers' seconds with the theory's questions and without, in turn.

    python benchmarks/diagnostics_cost.py [PRESET] [--repeats 3] [--set KEY=VALUE ...]

One round of all clients, one after another in this process, in seconds of the processor: other work
on the machine does not count. By default the first and the last round
of a run are diagnostic ones, so that their extra cost is spread over all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import Config, load_config, parse_pairs
from fed_diffusion.data import load_dataset
from fed_diffusion.server.coordinator import Coordinator


def seconds(config: Config, worker: Worker, round: int = 1) -> tuple[float, int]:
    """Of one round with aggregation, and the bytes that came up."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    began = time.process_time()
    for task in coordinator.tasks(round):
        coordinator.receive(worker.run(task))
    summary = coordinator.close_round()
    return time.process_time() - began, summary.bytes_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", nargs="?", default="digits")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    pairs = parse_pairs(arguments.set)
    measured = load_config(arguments.preset, pairs)
    plain = load_config(arguments.preset, pairs | {"theory.every": 0})
    worker = Worker(measured, load_dataset(measured.data))
    seconds(plain, worker)  # warm
    times: dict[bool, list[float]] = {True: [], False: []}
    sizes = {}
    for _ in range(arguments.repeats):
        for config in (plain, measured):
            took, sizes[config is measured] = seconds(config, worker)
            times[config is measured].append(took)
    with_it, without = (statistics.median(times[which]) for which in (True, False))
    due = len(measured.diagnostic_rounds())
    print("| | CPU seconds, median | bytes up |\n|---|---|---|")
    print(f"| a plain round | {without:.2f} | {sizes[False]:,} |")
    print(
        f"| a diagnostic round | {with_it:.2f} ({with_it / without:.3f} times) | {sizes[True]:,} |"
    )
    whole = (due * with_it + (measured.rounds - due) * without) / (measured.rounds * without)
    print(f"\n{due} of {measured.rounds} rounds are diagnostic: {whole:.4f} times the training.")


if __name__ == "__main__":
    main()
