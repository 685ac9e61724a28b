"""How updates are averaged: what round.aggregation may name, built in or the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.aggregation.robust import RobustMean
from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config.federation import RoundConfig
from fed_diffusion.masks.mask import Masks, Scattered
from fed_diffusion.protocol.messages import EXAMPLES_LIMIT

KEY = "round.aggregation"
ROBUST = ("trimmed_mean", "median")
"""The aggregators that withstand lying clients wherever three workers or more trained."""


class Aggregator(Protocol):
    """An aggregator is one round's average under masks. The server makes a new one for every round.

    Attributes
    ----------
    coverage
        Counts who trained what. The server reads Gamma_r and the round's record from it, so `add`
        gives it the masks of every update that is added.
    """

    coverage: Coverage

    def add(
        self, values: Mapping[str, Tensor], masks: Masks | None = None, weight: float = 1.0
    ) -> None:
        """Add one worker's update.

        Parameters
        ----------
        values
            Every tensor's kept values, float32 on the CPU, of the shapes that the masks say
            (`Mask.kept`). They have been checked for names and shapes. In buffered rounds, and with
            wire.differences, they are values too: theta_r plus the difference.
        masks
            The masks by tensor name; a tensor that is not named is kept whole (`mask_of`).
        weight
            A whole number: 1, or the worker's images with round.weighting = examples.

        Raises
        ------
        UpdateError
            The update must not count. Nothing of it has been added then, and the round goes on.
        """

    def result(self) -> dict[str, Tensor]:
        """Return theta_{r+1}: float32 tensors of theta's names and shapes, finite.

        A coordinate that nobody trained keeps theta_r. The result must not depend on the order in
        which updates were added, so that a run has the same bits in any order of arrival.
        """


class AggregatorFactory(Protocol):
    """What round.aggregation names: a class of aggregators, or a function that makes one.

    Parameters
    ----------
    theta
        theta_r by name, float32 on the CPU; it must not be changed.
    workers
        The most updates that will be added.
    settings
        The section `round` of the configuration.
    """

    def __call__(
        self, theta: Mapping[str, Tensor], workers: int, settings: RoundConfig, /
    ) -> Aggregator: ...


def heaviest_of(settings: RoundConfig) -> int:
    """Return the largest weight that an update can have."""
    return EXAMPLES_LIMIT if settings.weighting == "examples" else 1


def _mean(theta: Mapping[str, Tensor], workers: int, settings: RoundConfig) -> Aggregator:
    return MaskedMean(theta, workers, heaviest_of(settings))


def _trimmed_mean(theta: Mapping[str, Tensor], workers: int, settings: RoundConfig) -> Aggregator:
    return RobustMean(theta, settings.trim, workers)


def _median(theta: Mapping[str, Tensor], workers: int, settings: RoundConfig) -> Aggregator:
    return RobustMean(theta, 0.5, workers)


AGGREGATORS: dict[str, AggregatorFactory] = {
    "mean": _mean,
    "trimmed_mean": _trimmed_mean,
    "median": _median,
}


def aggregator_of(theta: Mapping[str, Tensor], workers: int, settings: RoundConfig) -> Aggregator:
    """Return an empty average of the configured kind at theta_r, with room for so many updates.

    Raises
    ------
    ConfigError
        There is no such aggregator.
    """
    made: AggregatorFactory = resolve(KEY, settings.aggregation, AGGREGATORS)
    return made(theta, workers, settings)


def check_aggregator(settings: RoundConfig) -> None:
    """Let a user's aggregator average two updates of a tiny network, or refuse the aggregator.

    Raises
    ------
    ConfigError
        The aggregator cannot be found, or it breaks the contract; the message says how.
    """
    name = settings.aggregation
    if name in AGGREGATORS:
        return
    with blamed(KEY, name):
        _try(settings)


def _try(settings: RoundConfig) -> None:
    theta = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    masks = {"a": Scattered(torch.tensor([[True, False, False], [True, True, False]]))}
    weight = 3 if settings.weighting == "examples" else 1
    aggregator = aggregator_of({n: value.clone() for n, value in theta.items()}, 2, settings)
    aggregator.add({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.zeros(2)}, masks, weight)
    aggregator.add({"a": torch.full((2, 3), 0.5), "b": torch.ones(2)}, {}, 1)
    counts = aggregator.coverage.counts()
    expected = {"a": [[2, 1, 1], [2, 2, 1]], "b": [2, 2]}
    if {name: count.tolist() for name, count in counts.items()} != expected:
        raise ValueError("its coverage does not count every added update exactly once")
    _check_result(aggregator.result(), theta)
    nobody = aggregator_of({n: value.clone() for n, value in theta.items()}, 2, settings).result()
    _check_result(nobody, theta)
    if not all(torch.equal(nobody[name], value) for name, value in theta.items()):
        raise ValueError("without any update its result is not the theta that it was made with")


def _check_result(result: dict[str, Tensor], theta: Mapping[str, Tensor]) -> None:
    got = {name: (value.dtype, tuple(value.shape)) for name, value in result.items()}
    wanted = {name: (value.dtype, tuple(value.shape)) for name, value in theta.items()}
    if got != wanted:
        raise ValueError(f"its result holds {got}, not {wanted} as theta does")
    if not all(bool(torch.isfinite(value).all()) for value in result.values()):
        raise ValueError("its result is not finite")
