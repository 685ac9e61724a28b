"""The Flower ServerApp: train with the FedDiffusion strategy, then sample, evaluate, report."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fed_diffusion.config import Config, ConfigError, load_config, parse_pairs
from fed_diffusion.experiment import Experiment
from fed_diffusion.runs import RunDir, new_run_path
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
        key: run_config[name] for name, key in KEYS.items() if run_config.get(name, "") != ""
    }
    pairs = parse_pairs(str(run_config.get("set", "")).split())
    if twice := sorted(overrides.keys() & pairs.keys()):
        raise ConfigError(f"{twice[0]} is given twice: as a run-config key and in set.")
    return load_config(str(run_config["preset"]), overrides | pairs)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run; however it ends, status.json in the run directory says so."""
    given = str(context.run_config.get("run-dir", ""))
    try:
        config = config_of(context.run_config)
        path = Path(given) if given else new_run_path(config)
        experiment = Experiment(config, path)
        FedDiffusion(experiment).run(grid)
        experiment.finish()
    except BaseException as error:
        if given and Path(given).is_dir():
            RunDir(given).write_status("failed", f"{type(error).__name__}: {error}")
        raise
    print(experiment.run.path, flush=True)
