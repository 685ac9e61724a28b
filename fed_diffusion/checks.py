"""All that can be refused is refused here, before any compute is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fed_diffusion.aggregation.named import ROBUST, check_aggregator
from fed_diffusion.aggregation.private import spent
from fed_diffusion.build import (
    channel_layout,
    check_structure,
    parameters_of,
    skeleton,
    time_grid,
)
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import (
    ImageSet,
    augmentation,
    content_hash,
    image_shape,
    load_dataset,
    partition,
    tell,
)
from fed_diffusion.evaluation import check_evaluation
from fed_diffusion.evaluation.reference import reference_set
from fed_diffusion.generate import check_sampler, sampler_partition
from fed_diffusion.masks.plan import check_own_family, check_pruning
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
    config: Config, dataset: ImageSet | None = None, needs_data: bool = True
) -> ImageSet | None:
    """Refuse everything that can be refused before compute, and return the data set.

    A server without data (needs_data=False) gets None.

    Raises
    ------
    ConfigError
        The message names the key, the value, what is allowed and how to fix it.
    """
    check_training(config)
    check_evaluation(config)
    if config.round.aggregation in ROBUST:
        warn_of_undefended(config, parameters_of(skeleton(config)), channel_layout(config))
    if dataset is None and needs_data:
        dataset = tell(load_dataset(config.data))
    if dataset is not None:
        if config.model.conditional and dataset.labels is None:
            raise ConfigError(
                f"model.conditional = True needs labels, and data.name = {config.data.name!r} has "
                "none (a folder needs a sub-folder per class); set model.conditional=false."
            )
        partition(dataset, config)
    if config.evaluation.samples and config.evaluation.reference not in ("data", "none"):
        reference_set(config, dataset)  # a broken file in it is found now, not after training
    return dataset


def check_training(config: Config) -> None:
    """Make the checks of `check` that look at no files; raise `ConfigError`."""
    time_grid(config)
    sampler_partition(config)
    check_sampler(config)
    check_device(config)
    spent(config, 1)  # needs the accountant, if anything
    check_structure(config)
    augmentation(config.data, image_shape(config.data))
    check_trackers(config)
    check_aggregator(config.round)
    check_optimizer(config.server)
    policy_of(config)
    layout = channel_layout(config)
    check_pruning(config, layout)
    check_own_family(config, parameters_of(skeleton(config)), layout)


def check_device(config: Config) -> None:
    """Refuse a device that this machine does not have."""
    device = config.worker.device
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
    data = None if dataset is None else content_hash(dataset)
    check_same_data(run, found.config, found.checkpoint, data)
    return found.config, data


VERSIONS = {"checkpoint": checkpoint.VERSION, "wire": wire.VERSION}
"""The formats and the arithmetic: a run goes on only with those that it began with."""
