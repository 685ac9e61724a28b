"""Federated training of diffusion models across machines of unequal resources.

The names in `__all__` are the public API. Each is imported when it is first asked for: torch, which
most of them need, takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fed_diffusion.common.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from fed_diffusion.aggregation.coverage import Coverage
    from fed_diffusion.aggregation.named import Aggregator, AggregatorFactory
    from fed_diffusion.config import Config, ConfigError, load_config
    from fed_diffusion.data import ImageSet, Loader, Split
    from fed_diffusion.diffusion.partitions import TimeGrid
    from fed_diffusion.diffusion.samplers import Solver
    from fed_diffusion.engines.either import resume, run
    from fed_diffusion.evaluation.judge import Judge, JudgeFactory
    from fed_diffusion.experiment import Experiment
    from fed_diffusion.generate import Sampler
    from fed_diffusion.masks.families import Family, FamilyFactory
    from fed_diffusion.masks.mask import Block, Mask, Masks, Scattered, Whole
    from fed_diffusion.masks.recipe import Recipe
    from fed_diffusion.models.own import NetworkFactory
    from fed_diffusion.report.trackers import Tracker
    from fed_diffusion.server.optimizers import ServerOptimizer, ServerOptimizerFactory
    from fed_diffusion.server.policies import RoundPolicy

_PLACES = {
    "Aggregator": "aggregation.named",
    "AggregatorFactory": "aggregation.named",
    "Block": "masks.mask",
    "Config": "config",
    "ConfigError": "config",
    "Coverage": "aggregation.coverage",
    "Experiment": "experiment",
    "Family": "masks.families",
    "FamilyFactory": "masks.families",
    "ImageSet": "data",
    "Judge": "evaluation.judge",
    "JudgeFactory": "evaluation.judge",
    "Loader": "data",
    "Mask": "masks.mask",
    "Masks": "masks.mask",
    "NetworkFactory": "models.own",
    "Recipe": "masks.recipe",
    "RoundPolicy": "server.policies",
    "Sampler": "generate",
    "Scattered": "masks.mask",
    "ServerOptimizer": "server.optimizers",
    "ServerOptimizerFactory": "server.optimizers",
    "Solver": "diffusion.samplers",
    "Split": "data",
    "TimeGrid": "diffusion.partitions",
    "Tracker": "report.trackers",
    "Whole": "masks.mask",
    "load_config": "config",
    "resume": "engines.either",
    "run": "engines.either",
}
"""Public name -> its module; the same names stand above, for type checkers."""

__all__ = [
    "Aggregator",
    "AggregatorFactory",
    "Block",
    "Config",
    "ConfigError",
    "Coverage",
    "Experiment",
    "Family",
    "FamilyFactory",
    "ImageSet",
    "Judge",
    "JudgeFactory",
    "Loader",
    "Mask",
    "Masks",
    "NetworkFactory",
    "Recipe",
    "RoundPolicy",
    "Sampler",
    "Scattered",
    "ServerOptimizer",
    "ServerOptimizerFactory",
    "Solver",
    "Split",
    "TimeGrid",
    "Tracker",
    "Whole",
    "__version__",
    "load",
    "load_config",
    "resume",
    "run",
]


def load(run: str | Path, *, ema: bool = True) -> Sampler:
    """Return the trained model of a run directory, ready to sample.

    Parameters
    ----------
    run
        The run directory.
    ema
        Whether to take the moving average of the parameters, which samples better than the last.

    Examples
    --------
    >>> import fed_diffusion as fd
    >>> images = fd.load("runs/first").sample(16)  # uint8 [16, C, H, W]  # doctest: +SKIP
    """
    from fed_diffusion.generate import Sampler

    return Sampler.from_run(run, ema=ema)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
