"""What runs behind the last round, and the small grids that are drawn on the way there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fed_diffusion.analysis.results import results_of
from fed_diffusion.common.rng import Purpose
from fed_diffusion.evaluation import no_quality
from fed_diffusion.evaluation.generated import measure
from fed_diffusion.generate import Sampler
from fed_diffusion.report.grids import save_grid
from fed_diffusion.report.holdings import grid_labels

if TYPE_CHECKING:
    from fed_diffusion.experiment import Experiment


def finish(experiment: Experiment) -> dict[str, Any]:
    """Sample, measure, and write results.json and the report; returns the results."""
    run, record = experiment.run, experiment.record
    why = "the evaluation did not finish; fed-diffusion evaluate RUN does it again"
    run.write_results(_results(experiment, no_quality(why, 0, 0)))
    with record.timed("evaluate"):
        quality = _evaluate(experiment)
    results = _results(experiment, quality)
    run.write_results(results)
    from fed_diffusion.report.html import write_report  # matplotlib takes seconds to import

    write_report(run.path)
    run.write_status("finished")
    experiment.trackers.end(results)
    return results


def _evaluate(experiment: Experiment) -> dict[str, Any]:
    """Sample once; the first images make the grid, all of them the figures."""
    sampler, config = _sampler(experiment), experiment.config.evaluation
    images = sampler.sample(max(config.samples, config.grid))
    _save(experiment, images[: config.grid], "final.png", grid_labels(experiment.config))
    return measure(sampler, images[: config.samples], experiment.dataset)


def small_grid(experiment: Experiment, round: int) -> None:
    """Images from the same noise each time."""
    with experiment.record.timed("evaluate"):
        images = _sampler(experiment).sample(16, purpose=Purpose.GRID)
        _save(experiment, images, f"round-{round:04d}.png")


def _save(
    experiment: Experiment, images: Tensor, name: str, labels: list[int] | None = None
) -> None:
    save_grid(images, experiment.run.path / "samples" / name, labels=labels)
    experiment.trackers.images(experiment.coordinator.round, images)


def _sampler(experiment: Experiment) -> Sampler:
    """A sampler of the moving average, or of theta where there is none."""
    config, coordinator = experiment.config, experiment.coordinator
    return Sampler(config, coordinator.ema if config.ema.decay > 0 else coordinator.theta)


def _results(experiment: Experiment, quality: dict[str, Any]) -> dict[str, Any]:
    record, coordinator = experiment.record, experiment.coordinator
    return results_of(
        experiment.config,
        record.history,
        coordinator.theta,
        seconds=record.seconds(),
        quality=quality,
        opened=experiment.run.opened(coordinator.round),
        data=None if experiment.dataset is None else experiment.dataset.facts(),
        changes=record.origin["changes"],
    )
