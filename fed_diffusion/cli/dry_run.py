"""--dry-run and config show: these print what a run would be, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import psutil
import yaml
from rich.table import Table

from fed_diffusion.cli.progress import in_words
from fed_diffusion.common.terminal import plain_console
from fed_diffusion.config import Config, ConfigError

if TYPE_CHECKING:
    from fed_diffusion.data import ImageSet
    from fed_diffusion.engines.forecast import Forecast, Size
    from fed_diffusion.sweep.grid import Run

MOST_CLIENTS = 20
"""How many clients are listed one by one."""


def print_run(config: Config, engine: str, done: int = 0) -> int:
    """All that `run` checks, then what it would be and take; nothing is written."""
    from fed_diffusion.build import with_class_names
    from fed_diffusion.checks import check
    from fed_diffusion.engines.forecast import forecast, size_of

    dataset = check(config)
    assert dataset is not None
    config = with_class_names(config, dataset)
    size, expected = size_of(config, dataset), forecast(config, dataset, engine=engine, done=done)
    console = plain_console()
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"preset"})
    settings.get("data", {}).pop("class_names", None)
    console.print(f"# {config.preset}; the other settings have their defaults", soft_wrap=True)
    console.print(yaml.safe_dump(settings, sort_keys=False).rstrip(), soft_wrap=True)
    console.print()
    lines = [*size_lines(config, size), *time_lines(config, expected, done)]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.print(f"{name:<{width}}  {text}", soft_wrap=True)
    if len(size.clients) <= MOST_CLIENTS:
        console.print(_clients_table(size))
    return 0


def print_evaluation(config: Config) -> int:
    """Print what `evaluate` would take."""
    from fed_diffusion.data import load_dataset
    from fed_diffusion.engines.forecast_evaluation import evaluation_seconds
    from fed_diffusion.evaluation.checks import OWN_DATA, check_evaluation

    check_evaluation(config)
    own = config.evaluation.reference in OWN_DATA
    seconds = evaluation_seconds(config, load_dataset(config.data) if own else None)
    console = plain_console()
    for name, text in _parts(seconds):
        console.print(f"{name}: {text}")
    return 0


def print_sweep(runs: Sequence[Run], datasets: Mapping[str, ImageSet]) -> int:
    """Print what each run of a sweep would take, and their sum; a seed changes no estimate."""
    from fed_diffusion.engines.forecast import forecast
    from fed_diffusion.sweep.grid import key_of

    table = Table()
    for name, side in (("run", "left"), ("parameters trained by", "left"), ("time", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    known: dict[str, Forecast] = {}
    total = 0.0
    for run in runs:
        key = run.config.model_copy(update={"seed": 0}).to_yaml()
        if key not in known:
            known[key] = forecast(run.config, datasets[key_of(run.config.data)])
        total += known[key].total
        table.add_row(run.name, _keeps(known[key]), in_words(known[key].total))
    console = plain_console()
    console.print(table)
    console.print(f"{len(runs)} runs, one after another: about {in_words(total)}")
    return 0


def facts(config: Config) -> list[tuple[str, str]]:
    """Return what a configuration comes to, as (name, text), without timing a step."""
    from fed_diffusion.checks import check
    from fed_diffusion.data import load_dataset
    from fed_diffusion.data.datasets import DOWNLOADED
    from fed_diffusion.engines.forecast import size_of

    try:
        dataset = load_dataset(config.data)
    except ConfigError as error:
        if config.data.name not in DOWNLOADED:
            raise
        why = str(error).split("\n")[0]
        return [("images", f"not on this machine, so nothing is known of the clients: {why}")]
    check(config, dataset)
    size = size_of(config, dataset)
    lines = size_lines(config, size)
    if len(size.clients) <= MOST_CLIENTS:
        for client in size.clients:
            text = f"{client.train} images, {client.holdout} held out"
            lines.append((f"client {client.number}", f"{text}{_labels(client.labels, ': ')}"))
    return lines


def size_lines(config: Config, size: Size) -> list[tuple[str, str]]:
    """Return the lines about parameters, multiply-adds, memory, images and steps."""
    network = f"{size.parameters:,} parameters"
    macs = "" if size.macs is None else f", {size.macs:.3g} multiply-adds for an image"
    lines = [("network", network + macs)]
    if size.frozen:
        lines = [
            ("adapter", f"{network}, which are trained and travel"),
            ("base", f"{size.frozen:,} parameters, which are frozen and never travel"),
            ("network", f"base and adapter{macs}"),
        ]
    if size.memory is not None:
        text = f"{size.memory / 1e6:.0f} MB for the whole network and a batch of "
        text += f"{config.local.batch}, above the idle process (this one has "
        text += f"{psutil.Process().memory_info().rss / 1e6:.0f} MB)"
        lines.append(("memory per worker", text))
    images = [client.train for client in size.clients]
    held = sum(client.holdout for client in size.clients)
    lines.append(
        (
            "images",
            f"{sum(images):,} on {len(images)} clients, {min(images):,} to {max(images):,} each"
            + (f"; {held:,} more are held out" if held else ""),
        )
    )
    steps = [client.steps for client in size.clients]
    each = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    lines.append(("training", f"{config.rounds} rounds of {each} steps a client"))
    return lines


def time_lines(config: Config, expected: Forecast, done: int) -> list[tuple[str, str]]:
    """Return the lines about the bytes of a round and the seconds of each part of the run."""
    down, up = expected.bytes_down / 1e6, expected.bytes_up / 1e6
    left = f"the {config.rounds - done} rounds that are left" if done else "all"
    return [
        ("bytes a round", f"{down:,.2f} MB to the clients, {up:,.2f} MB back"),
        ("keep ratios", _keeps(expected)),
        ("a training step", f"{1000 * expected.step:.0f} ms, timed here just now"),
        *_parts(expected.seconds),
        (
            "time",
            f"about {in_words(expected.total)} for {left}, {expected.processes} clients at once",
        ),
    ]


def _parts(seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(f"time for {name}", f"about {in_words(took)}") for name, took in seconds.items()]


def _keeps(expected: Forecast) -> str:
    shares = [f"{keep:g} on {clients}" for keep, clients in expected.keeps.items()]
    more = f" and {len(shares) - 8} more" if len(shares) > 8 else ""
    return f"{', '.join(shares[:8])}{more} clients"


def _clients_table(size: Size) -> Table:
    table = Table()
    for name in ("client", "images", "held out", "steps"):
        table.add_column(name, justify="right")
    table.add_column("images of each label")
    for client in size.clients:
        numbers = (client.number, client.train, client.holdout, client.steps)
        table.add_row(*(f"{number:,}" for number in numbers), _labels(client.labels))
    return table


def _labels(labels: Mapping[str, int], before: str = "") -> str:
    shown = [f"{name} {count}" for name, count in labels.items() if count]
    if not shown:
        return ""
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return f"{before}{', '.join(shown[:12])}{more}"
