"""The Flower ServerApp: train with the FedDiffusion strategy, then sample, evaluate, report."""

from __future__ import annotations

import shlex
import traceback
from pathlib import Path

from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fed_diffusion.config import (
    Config,
    ConfigError,
    load_config,
    parse_pairs,
    read_value,
    refuse_overlaps,
)
from fed_diffusion.evaluation.checks import OWN_DATA
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.store.files import in_words
from fed_diffusion.store.locks import LockLost
from fed_diffusion.store.rundir import RunDir, RunTaken
from server_app.strategy import FedDiffusion

app = ServerApp()

KEYS = {
    "method": "method",
    "rounds": "rounds",
    "clients": "clients",
    "seed": "seed",
    "data-dir": "data.dir",
}
"""The run-config keys that have names here; every other setting goes through `set`."""


def config_of(run_config: UserConfig) -> Config:
    """Return the configuration of `flwr run --run-config`; empty values mean the preset's."""
    overrides = {
        key: read_value(key, value) if isinstance(value := run_config[name], str) else value
        for name, key in KEYS.items()
        if run_config.get(name, "") != ""
    }
    try:
        words = shlex.split(str(run_config.get("set", "")))
    except ValueError as error:
        raise ConfigError(f"set = {run_config['set']!r} cannot be read: {error}.") from error
    pairs = parse_pairs(words)
    refuse_overlaps([*overrides, *pairs], "the run config's own keys and its set")
    return load_config(str(run_config["preset"]), overrides | pairs)


def _experiment(run_config: UserConfig) -> Experiment:
    """Return a new run or, with `resume`, the run in a run directory."""
    resumed = str(run_config.get("resume", ""))
    if resumed:
        stored = RunDir.open(resumed).config()
        accept = str(run_config.get("accept-changes", "")).lower() in ("yes", "true")
        needs_data = stored.evaluation.reference in OWN_DATA
        return Experiment.resume(resumed, needs_data=needs_data, accept_changes=accept)
    config = config_of(run_config)
    path = _run_dir(run_config)
    if path is not None:
        RunDir(path).refuse_existing()  # before anything is loaded
    # in a deployment the server has images only if it is to compare with them
    return Experiment(config, path, needs_data=config.evaluation.reference in OWN_DATA)


def _run_dir(run_config: UserConfig) -> Path | None:
    """Return where a new run is to be; None means a new directory under runs/."""
    given = str(run_config.get("run-dir", ""))
    return Path(given) if given else None


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do one run; however it ends, status.json in the run directory says so."""
    experiment = None
    try:
        experiment = _experiment(context.run_config)
        experiment.engine = "flower" if experiment.run.joined else "deployment"
        FedDiffusion(experiment).run(grid)
    except RunTaken:
        raise  # the run that is there keeps its status
    except (RunStopped, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, RunStopped):
            traceback.print_exc()
        raise  # its status says that it was stopped, and how to resume
    except BaseException as error:
        traceback.print_exc()  # Flower prints it only after Ray is down
        run = experiment.run if experiment else _unbegun(context.run_config)
        _note_failure(run, error)
        raise
    finally:
        if experiment is not None:
            experiment.close()
    print(experiment.run.path, flush=True)


def _unbegun(run_config: UserConfig) -> RunDir | None:
    """Return the directory of a run that was refused; an existing run keeps its status."""
    path = _run_dir(run_config)
    if path is None or run_config.get("resume"):
        return None
    run = RunDir(path)
    try:
        run.refuse_existing()
    except ConfigError:  # taken, or its run.json is damaged
        return None
    return run


def _note_failure(run: RunDir | None, error: BaseException) -> None:
    if run is None or isinstance(error, LockLost):
        return
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_status("failed", f"{type(error).__name__}: {error}")
    except OSError as second:  # a full disk: it must not hide the first error
        error.add_note(f"Then: {in_words(second, run.path)}")
