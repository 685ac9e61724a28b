"""What runs after the last round, and the small grids that are drawn during training."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fed_diffusion.analysis.results import results_of
from fed_diffusion.build import Setup
from fed_diffusion.common.rng import Purpose
from fed_diffusion.config import Config
from fed_diffusion.data import ImageSet
from fed_diffusion.evaluation import no_quality
from fed_diffusion.evaluation.generated import UNFINISHED, evaluate, evaluation_entry
from fed_diffusion.generate import Sampler
from fed_diffusion.report.grids import save_grid
from fed_diffusion.report.holdings import grid_labels
from fed_diffusion.report.live import LivePage
from fed_diffusion.report.trackers import Trackers
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.store.live import Live
from fed_diffusion.store.record import Record
from fed_diffusion.store.rundir import RunDir

SMALL = 16
"""The number of images of a small grid."""


class Trained(Protocol):
    """What this module reads of the experiment that has trained; see `Experiment`."""

    config: Config
    setup: Setup
    coordinator: Coordinator
    dataset: ImageSet | None
    run: RunDir
    record: Record
    live: Live
    page: LivePage
    trackers: Trackers


def finish(experiment: Trained) -> dict[str, Any]:
    """Sample, measure, and write results.json and the report; return the results."""
    run, record = experiment.run, experiment.record
    run.write_results(_results(experiment, no_quality(UNFINISHED, 0, 0)) | {"evaluation": None})
    with record.timed("evaluate"):
        quality = _evaluate(experiment)
    entry = evaluation_entry(experiment.config.evaluation, experiment.coordinator.round, quality)
    results = _results(experiment, quality) | {"evaluation": run.append_evaluation(entry)}
    run.write_results(results)
    experiment.live.step("writing the report")
    experiment.page.end()
    from fed_diffusion.report.html import write_report  # matplotlib takes seconds to import

    write_report(run.path)
    run.write_status("finished")
    experiment.trackers.end(results)
    return results


def _evaluate(experiment: Trained) -> dict[str, Any]:
    """Draw the grid first, then the other images that the figures need, and measure."""
    live, count = experiment.live, experiment.config.evaluation.grid
    labels = grid_labels(count, experiment.setup.classes)
    return evaluate(
        _sampler(experiment),
        experiment.dataset,
        grid=lambda images: _save(experiment, images, "final.png", labels),
        told=live.step,
    )


def small_grid(experiment: Trained, round: int) -> None:
    """Where evaluation.every says so, images from the same noise each time."""
    every, rounds = experiment.config.evaluation.every, experiment.config.rounds
    if not every or round % every or round >= rounds:
        return
    with experiment.record.timed("evaluate"):
        images = _sampler(experiment).sample(
            SMALL,
            purpose=Purpose.GRID,
            progress=lambda done: experiment.live.step("sampling", done, SMALL),
        )
        _save(experiment, images, f"round-{round:04d}.png")


def _save(experiment: Trained, images: Tensor, name: str, labels: list[int] | None = None) -> None:
    save_grid(images, experiment.run.path / "samples" / name, labels=labels)
    experiment.trackers.images(experiment.coordinator.round, images)


def _sampler(experiment: Trained) -> Sampler:
    """A sampler of the moving average, or of theta where there is none."""
    setup, coordinator = experiment.setup, experiment.coordinator
    averaged = setup.config.ema.decay > 0
    return Sampler(setup, coordinator.ema if averaged else coordinator.theta)


def _results(experiment: Trained, quality: dict[str, Any]) -> dict[str, Any]:
    record, coordinator = experiment.record, experiment.coordinator
    return results_of(
        experiment.setup,
        record.history,
        coordinator.theta,
        seconds=record.seconds(),
        quality=quality,
        opened=experiment.run.opened(coordinator.round),
        data=None if experiment.dataset is None else experiment.dataset.facts(),
        changes=record.origin["changes"],
    )
