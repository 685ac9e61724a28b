"""The Flower ServerApp: train with the FedDiffusion strategy, then sample, evaluate, report."""

from __future__ import annotations

import os
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
from fed_diffusion.runs import RunDir, new_run_path
from fed_diffusion.superlink import MARK
from server_app.strategy import FedDiffusion

app = ServerApp()

KEYS = {
    "method": "method",
    "rounds": "rounds",
    "clients": "clients",
    "seed": "seed",
    "data-dir": "data.dir",
}
"""Run-config keys of their own; every other setting goes through `set`."""


def config_of(run_config: UserConfig) -> Config:
    """The configuration that `flwr run --run-config` describes; empty values mean the preset's."""
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


def _experiment(run_config: UserConfig, path: Path | None) -> Experiment:
    """A new run, or with `resume` the one that a run directory holds."""
    resumed = str(run_config.get("resume", ""))
    if resumed:
        stored = RunDir.open(resumed).config()
        return Experiment.resume(resumed, needs_data=stored.evaluation.reference in OWN_DATA)
    config = config_of(run_config)
    path = path or new_run_path(config)
    if (path / "metrics.jsonl").exists():
        raise FileExistsError(f"run-dir {path} holds a run already; give another directory")
    # in a deployment the server has images only if it is to compare with them
    return Experiment(config, path, needs_data=config.evaluation.reference in OWN_DATA)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run; however it ends, status.json in the run directory says so."""
    given = str(context.run_config.get("run-dir", ""))
    path = Path(given) if given else None
    try:
        experiment = _experiment(context.run_config, path)
        experiment.engine = "flower" if MARK in os.environ else "deployment"
        path = experiment.run.path
        FedDiffusion(experiment).run(grid)
    except FileExistsError:
        raise  # the run that is there keeps its status
    except (RunStopped, KeyboardInterrupt):
        traceback.print_exc()
        raise  # its status says that it was stopped, and how to resume
    except BaseException as error:
        traceback.print_exc()  # Flower prints it only after Ray is down
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
            RunDir(path).write_status("failed", f"{type(error).__name__}: {error}")
        raise
    print(experiment.run.path, flush=True)
