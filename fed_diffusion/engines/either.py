"""A run on either engine: what the command line and the public API share.

torch and Flower take seconds to import, so both are imported only where they are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fed_diffusion.config import Config, ConfigError

if TYPE_CHECKING:
    from fed_diffusion.experiment import Experiment
    from fed_diffusion.store.rundir import RunDir

Engine = Literal["local", "flower"]
Progress = Callable[[dict[str, Any]], None]


def run(
    config: Config,
    out: str | Path | None = None,
    engine: Engine = "local",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, sample, evaluate and write the report; return what results.json holds.

    Parameters
    ----------
    config
        The settings of the run, as `load_config` returns them.
    out
        The run directory, which must not exist yet; default: a new one under runs/.
    engine
        local: clients are processes of this machine, without Flower, one where there is one core.
        flower: Flower's simulation engine, in a SuperLink that ends with the run. Both end with the
        same parameters, bit for bit.
    progress
        A function that is called with each round's line of metrics.jsonl when the round is done.

    Raises
    ------
    ConfigError
        A setting cannot be used; nothing was computed.
    RuntimeError
        The run ended early; the message says why, and how to resume.

    Examples
    --------
    >>> import fed_diffusion as fd
    >>> results = fd.run(fd.load_config("digits-quick"), "runs/first")  # doctest: +SKIP
    >>> results["quality"]["fid"]  # doctest: +SKIP
    """
    return carry(begin(config, out, engine), config, progress)


def resume(
    run: str | Path,
    engine: Engine = "local",
    progress: Progress | None = None,
    *,
    accept_changes: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Go on with a run that was stopped or killed; it ends with the bits it would have ended with.

    With `overrides={"rounds": 20}` a finished run goes on, too. A schedule of the step size then
    means what it means in a run of 20 rounds from the start: with local.schedule = cosine a run
    that had come down to nearly 0 after 10 rounds goes on with the step size that is half way down,
    and falls to 0 again until round 20. With a constant step size the longer run ends with the bits
    of one that had 20 rounds from the start.

    Parameters
    ----------
    run
        The run directory.
    engine, progress
        See `run`.
    accept_changes
        Let through rounds, trackers, evaluation.* and worker.* that were changed in its
        config.yaml.
    overrides
        Dotted settings that have new values from here on, among rounds, trackers, evaluation.* and
        worker.*; config.yaml is written anew with them.

    Raises
    ------
    ConfigError
        There is no run, or nothing is left to do, or the run's files are not what they were.
    RuntimeError
        The run ended early again.
    """
    made, config = begin_again(run, engine, accept_changes, overrides)
    accepts = accept_changes or bool(overrides)
    return carry(made, config, progress, resumed=True, accept_changes=accepts)


@contextmanager
def ahead(config: Config, engine: Engine) -> Iterator[None]:
    """Start, before anything is checked, what a run that begins in this block waits for later.

    Workers are forked, where nothing that does not survive a fork can have happened yet: in a
    process that has not imported torch before, on a machine where none will use a GPU.
    """
    if engine != "local" or "torch" in sys.modules or sys.platform != "linux":
        yield
        return
    import torch

    from fed_diffusion.engines.local import processes_of
    from fed_diffusion.engines.pool import forked_ahead

    # where CUDA has begun, a forked process cannot use it; to count devices does not begin it
    unused = config.worker.device == "cpu" or torch.cuda.device_count() == 0
    # none for a GPU that is not there: the checks refuse it
    with forked_ahead(max(1, processes_of(config)) if unused else 1):
        yield


def begin(config: Config, out: str | Path | None, engine: Engine) -> Experiment | RunDir:
    """Check everything and claim the directory of a new run; see `carry` for what is returned."""
    from fed_diffusion.checks import check, data_hash
    from fed_diffusion.experiment import Experiment
    from fed_diffusion.store.rundir import RunDir

    _check_engine(engine)
    if out is not None:
        RunDir(out).refuse_existing()  # before the data are loaded
    if engine == "local":
        return Experiment(config, out)
    dataset = check(config)
    assert dataset is not None
    return RunDir.create(out, config, data_hash(config, dataset))


def begin_again(
    path: str | Path,
    engine: Engine,
    accept_changes: bool,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Experiment | RunDir, Config]:
    """Check everything and claim the directory of an existing run; return its settings too."""
    from fed_diffusion.checks import check_resume
    from fed_diffusion.experiment import Experiment
    from fed_diffusion.store.rundir import RunDir

    _check_engine(engine)
    run = RunDir.open(path)
    if engine == "local":
        experiment = Experiment.resume(run.path, None, True, accept_changes, overrides)
        return experiment, experiment.config
    run.lock()
    try:
        config, data = check_resume(run, accept_changes, overrides)
        run.note_beginning(data)
        if overrides:
            run.write_config(config)  # the ServerApp reads it there
    except BaseException:
        run.unlock()
        raise
    return run, config


def carry(
    made: Experiment | RunDir,
    config: Config,
    progress: Progress | None = None,
    *,
    resumed: bool = False,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Bring a run that has been claimed to its end, and return its results.

    Parameters
    ----------
    made
        The experiment, which this process runs, or for the Flower engine the run directory.
    """
    from fed_diffusion.experiment import Experiment

    if isinstance(made, Experiment):
        from fed_diffusion.engines.local import run_in_process

        return run_in_process(made, progress=progress)
    from fed_diffusion.engines.flower import run_on_flower

    run_on_flower(config, made, progress=progress, resume=resumed, accept_changes=accept_changes)
    return made.results()


def _check_engine(engine: str) -> None:
    if engine not in get_args(Engine):
        known = ", ".join(get_args(Engine))
        raise ConfigError(f"engine = {engine!r} is unknown. Allowed: {known}.")
