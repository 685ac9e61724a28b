"""The results of a run of a benchmark: read where it is done, gone on with where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fed_diffusion.config import Config
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir


def made(config: Config, path: Path, **how: Any) -> dict[str, Any]:
    """Return the results of the run in a directory, after the rounds that it lacks.

    Parameters
    ----------
    how
        See `engines.local.simulate`.
    """
    run = RunDir(path)
    if run.finished():
        return run.results()
    if run.has_checkpoint():
        return run_in_process(Experiment.resume(path), **how)
    return simulate(config, path, **how)
