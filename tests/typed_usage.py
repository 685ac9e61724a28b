"""The public API as a user writes it: mypy reads this file, and a test calls what is cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import fed_diffusion as fd
from examples.own_aggregator import Cautious
from examples.own_dataset import shapes
from examples.own_judge import Spectrum
from examples.own_network import Plain
from examples.own_policy import Turns
from examples.own_sampler import heun
from examples.own_server_optimizer import Lion
from examples.own_split import by_brightness
from examples.own_tracker import Diary
from fed_diffusion.diffusion.partitions import geometric
from fed_diffusion.report.trackers import Csv

solver: fd.Solver = heun
times: fd.TimeGrid = geometric
load_images: fd.Loader = shapes
make_network: fd.NetworkFactory = Plain
split: fd.Split = by_brightness
make_judge: fd.JudgeFactory = Spectrum
make_aggregator: fd.AggregatorFactory = Cautious
make_optimizer: fd.ServerOptimizerFactory = Lion


def policy(config: fd.Config) -> fd.RoundPolicy:
    """It keeps to the contract."""
    return Turns(config)


def trackers(config: fd.Config) -> list[fd.Tracker]:
    """Both keep to the contract."""
    return [Csv(config), Diary(config)]


def train(out: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A run, and its images."""
    config: fd.Config = fd.load_config("digits-quick", {"rounds": 2})
    results: dict[str, Any] = fd.run(config, out, engine="local", progress=lines.append)
    return results


def go_on(out: Path) -> dict[str, Any]:
    """A run that was stopped."""
    return fd.resume(out, engine="flower", accept_changes=True)


def images(out: Path) -> Tensor:
    """uint8 [16, C, H, W]"""
    model: fd.Sampler = fd.load(out, ema=False)
    return model.sample(16, seed=1)


def by_hand(config: fd.Config, out: Path) -> fd.Experiment | str:
    """An experiment without an engine, or why there is none."""
    try:
        return fd.Experiment(config, out)
    except fd.ConfigError as error:
        return str(error)
