"""All that can be refused is refused here, before any compute is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fed_diffusion.aggregation.named import ROBUST, check_aggregator
from fed_diffusion.aggregation.private import spent
from fed_diffusion.build import Setup
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import ImageSet, augmentation, captions_of, content_hash, load_dataset, tell
from fed_diffusion.evaluation import check_evaluation
from fed_diffusion.evaluation.reference import reference_set
from fed_diffusion.generate import check_sampler
from fed_diffusion.masks.plan import able, check_own_family, check_pruning
from fed_diffusion.models.checkpointing import METHODS, can_checkpoint
from fed_diffusion.protocol import wire
from fed_diffusion.report.trackers import check_trackers
from fed_diffusion.server.defence import warn_of_undefended
from fed_diffusion.server.optimizers import check_optimizer
from fed_diffusion.server.policy_of import policy_of
from fed_diffusion.store import checkpoint
from fed_diffusion.store.origin import (
    check_same_data,
    standing,
)
from fed_diffusion.store.rundir import RunDir


def check(
    run: Config | Setup, dataset: ImageSet | None = None, needs_data: bool = True
) -> ImageSet | None:
    """Refuse everything that can be refused before compute, and return the data set.

    A server without data (needs_data=False) gets None.

    Parameters
    ----------
    run
        The configuration of the run, or the setup that was made of it.

    Raises
    ------
    ConfigError
        The message names the key, the value, what is allowed and how to fix it.
    """
    setup = Setup.of(run)
    config = setup.config
    check_training(setup)
    check_evaluation(setup)
    if config.round.aggregation in ROBUST:
        warn_of_undefended(setup)
    if dataset is None and needs_data:
        dataset = tell(load_dataset(config.data))
    if dataset is not None:
        if config.model.conditional and dataset.labels is None:
            raise ConfigError(
                f"model.conditional = True needs labels, and data.name = {config.data.name!r} has "
                "none (a folder needs a sub-folder per class); set model.conditional=false."
            )
        if config.model.text is not None:
            captions_of(dataset, config.data)
        setup.shares(dataset)
    if config.evaluation.samples and config.evaluation.reference not in ("data", "none"):
        reference_set(setup, dataset)  # a broken file in it is found now, not after training
    return dataset


def check_training(run: Config | Setup) -> None:
    """The part of `check` that looks at no files; raises `ConfigError`."""
    setup = Setup.of(run)
    config, pruning = setup.config, setup.config.pruning
    _ = setup.u, setup.sampling_times()
    check_sampler(setup)
    check_device(config.worker.device)
    spent(config.privacy, config.round.fraction, 1)  # needs the accountant, if anything
    setup.check_network()
    _check_checkpointing(setup)
    augmentation(config.data, setup.pixels)
    check_trackers(config.trackers)
    check_aggregator(config.round)
    check_optimizer(config.server)
    policy_of(config)
    layout, clients, seed = setup.layout, config.clients, config.seed
    check_pruning(pruning, clients, layout)
    check_own_family(setup.family, pruning, clients, seed, setup.shapes, layout)
    _check_secure_trainers(setup)


def _check_checkpointing(setup: Setup) -> None:
    """Refuse worker.checkpointing for a network whose blocks cannot be computed again."""
    if setup.config.worker.checkpointing and not can_checkpoint(setup.skeleton):
        raise ConfigError(
            f"worker.checkpointing: the network of model.name = {setup.config.model.name!r} has "
            f"no {' and no '.join(f'{method}()' for method in METHODS)}. Give it both, or set "
            "worker.checkpointing to false."
        )


def _check_secure_trainers(setup: Setup) -> None:
    """Refuse secure aggregation where fewer clients train than a sum must have."""
    config, known = setup.config, setup.known_ratios()
    if not config.secure.aggregation or not known:
        return
    trainers, needed = len(able(config.pruning, known)), max(config.secure.least, 2)
    asked = policy_of(config).target(trainers)
    if asked < needed:
        raise ConfigError(
            f"secure.aggregation: a round asks {asked} clients, since pruning.baseline = "
            f"{config.pruning.baseline!r} leaves {trainers} that train, and a sum needs {needed} "
            "(secure.least). Let more clients keep the whole network, or run this baseline "
            "with secure.aggregation = false."
        )


def check_device(device: str) -> None:
    """Refuse a device that this machine has not."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"worker.device = {device!r}, but torch sees no CUDA device; use auto or cpu."
        )


def check_resume(
    run: RunDir, accept_changes: bool = False, changes: Mapping[str, Any] | None = None
) -> tuple[Config, str | None]:
    """Refuse what `Experiment.resume` refuses, for a command whose other process resumes the run.

    Returns
    -------
    config, data
        The settings that the run goes on with, and the hash of its images.

    Raises
    ------
    ConfigError
        See `Experiment.resume`.
    """
    found = standing(run, VERSIONS, accept_changes, changes)
    dataset = check(found.config)
    data = data_hash(found.config, dataset)
    check_same_data(run, found.config.data, found.checkpoint, data)
    return found.config, data


def data_hash(config: Config, dataset: ImageSet | None) -> str | None:
    """Return the hash of a run's images, and of their captions where it trains on those."""
    if dataset is None:
        return None
    return content_hash(dataset, config.model.text is not None and config.data.caption is None)


VERSIONS = {"checkpoint": checkpoint.VERSION, "wire": wire.VERSION}
"""The formats and the arithmetic: a run goes on only with those that it began with."""
