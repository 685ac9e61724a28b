"""Sweeps: a grid of presets x methods x seeds, one run directory each, that any number of processes
and machines work off together.

DIR/runs/<preset>-<method>-seed<n>/   the runs
DIR/locks/                            who is at which run, see `fed_diffusion.store.locks`
DIR/table.md, table.csv, runs.csv, loss.png, samples.png   what came out, see `report.sweep`

What is finished is never repeated, what was stopped or killed goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import platform
import shlex
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from fed_diffusion.build import with_class_names, with_start
from fed_diffusion.checks import check, data_hash
from fed_diffusion.common.compute import device_of
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config, ConfigError, conf_dir, load_config, refuse_overlaps
from fed_diffusion.config.schema import LARGEST, DataConfig, Section, as_numbers
from fed_diffusion.config.section import complaint
from fed_diffusion.config.yaml import read_yaml
from fed_diffusion.data import ImageSet
from fed_diffusion.engines.local import run_in_process
from fed_diffusion.experiment import Experiment, Progress
from fed_diffusion.store.locks import FileLock, LockLost
from fed_diffusion.store.origin import check_same_data
from fed_diffusion.store.rundir import DEFAULT_ROOT, RunBusy, RunDir

MACHINES = "machines.txt"
"""The file in a run directory with one line for each machine that worked on the run."""
logger = logging.getLogger(__name__)

Seed = Annotated[int, Field(ge=0, lt=LARGEST)]


class Sweep(Section):
    """What a file in conf/sweeps says."""

    name: str
    """The name of the sweep; by default that of its file."""
    presets: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    also: dict[str, tuple[str, ...]] = Field({})
    """Further presets with methods of their own, as {fashion_mnist-small-one: [FedDM-F]}."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    set: dict[str, Any] = Field({})
    """Settings of every run, such as `evaluation.samples: 1000`."""


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    name: str
    method: str
    config: Config
    path: Path

    def finished(self) -> bool:
        return RunDir(self.path).finished()

    def results(self) -> dict[str, Any]:
        return RunDir(self.path).results()


@dataclass
class Outcome:
    """What became of the runs that were asked for."""

    finished: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Run -> the reason why it failed."""
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Run -> the process that works on it."""


def sweeps() -> list[str]:
    return sorted(path.stem for path in (conf_dir() / "sweeps").glob("*.yaml"))


def load_sweep(file: str) -> Sweep:
    """Read a sweep: a name in conf/sweeps or the path of a YAML file.

    Raises
    ------
    ConfigError
        The message names the file, the key, the value and what is allowed.
    """
    is_path = file.endswith((".yaml", ".yml"))
    path = Path(file) if is_path else conf_dir() / "sweeps" / f"{file}.yaml"
    if not is_path and file not in sweeps():
        raise ConfigError(
            f"sweep {file!r} does not exist. There are: {', '.join(sweeps())}; or give the path of "
            "a YAML file."
        )
    found = read_yaml(path, "sweep")
    try:
        sweep = Sweep.model_validate({"name": path.stem, **found})
    except ValidationError as error:
        problems = "\n".join(
            f"sweep {path}: {'.'.join(map(str, item['loc']))} = {as_numbers(item['input'])!r} "
            f"is not allowed: {complaint(item)}."
            for item in error.errors()
            if item["type"] != "too_short" or not item["input"]  # of a list whose parts are wrong
        )
        raise ConfigError(f"{problems}\nIts keys are {_keys()}.") from error
    for key in ("seed", "method", "preset"):
        if key in sweep.set:
            raise ConfigError(
                f"sweep {path}: set.{key} = {as_numbers(sweep.set[key])!r} is not allowed; "
                f"the sweep's list of {key}s says it."
            )
    refuse_overlaps(sweep.set, f"sweep {path}: set")
    return sweep


def _keys() -> str:
    return ", ".join(Sweep.model_fields)


def default_out(sweep: Sweep) -> Path:
    return Path(DEFAULT_ROOT) / "sweeps" / sweep.name


def grid(sweep: Sweep, out: Path, overrides: Mapping[str, Any]) -> list[Run]:
    """Return every run with its settings, seed by seed, so that there is a whole table early on.

    Raises
    ------
    ConfigError
        A setting cannot be used, or two cells would be the same run.
    """
    runs: dict[str, Run] = {}
    columns = [*((p, sweep.methods) for p in sweep.presets), *sweep.also.items()]
    cells = ((s, p, m) for s in sweep.seeds for p, methods in columns for m in methods)
    for seed, preset, method in cells:
        given = {**sweep.set, **overrides, "method": method, "seed": seed}
        try:
            config = load_config(preset, given)
        except ConfigError as error:
            raise ConfigError(f"{preset}, {method}, seed {seed}: {error}") from error
        name = f"{config.preset}-{method}-seed{seed}"
        if name in runs:
            raise ConfigError(f"sweep {sweep.name}: {name} is in it twice; give each cell once.")
        runs[name] = Run(name, method, config, out / "runs" / name)
    return list(runs.values())


def chosen(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """Return the runs that a pattern fits: a part of the name, or with * ? [ the whole name."""
    if not patterns:
        return list(runs)
    whole = [p if any(c in p for c in "*?[") else f"*{p}*" for p in patterns]
    found = [run for run in runs if any(fnmatchcase(run.name, p) for p in whole)]
    if not found:
        raise ConfigError(
            f"--only {' '.join(patterns)} fits no run. There are: "
            f"{', '.join(run.name for run in runs)}."
        )
    return found


def key_of(data: DataConfig) -> str:
    """Return what tells a data set from others."""
    return data.model_dump_json()


def check_runs(runs: Sequence[Run]) -> dict[str, ImageSet]:
    """Refuse before the first run what would be refused in a later run; return the loaded data
    sets, by their `key_of`.

    Raises
    ------
    ConfigError
        The message names the run, the key and how to fix it.
    """
    datasets: dict[str, ImageSet] = {}
    hashes: dict[tuple[str, str | None], str | None] = {}
    for run in runs:
        key = key_of(run.config.data)
        try:
            dataset = check(run.config, datasets.get(key))
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from error
        assert dataset is not None
        datasets[key] = dataset
        if (run.path / "config.yaml").exists():
            _check_same(run, dataset)
            what = key, run.config.model.text
            if what not in hashes:
                hashes[what] = data_hash(run.config, dataset)
            # a finished one too: a table is of one set of images
            check_same_data(RunDir(run.path), run.config.data, None, hashes[what])
    return datasets


def _check_same(run: Run, dataset: ImageSet) -> None:
    there = RunDir(run.path).config().to_dict()
    now = with_start(with_class_names(run.config, dataset)).to_dict()
    different = [key for key in now if there[key] != now[key]]
    if different:
        raise ConfigError(
            f"{run.path} was begun with other settings ({', '.join(different)} differ). Put the "
            "sweep's file and --set back as they were, or give another --out."
        )


def refuse_existing(out: Path) -> None:
    """Raise `ConfigError` if the directory holds a sweep already."""
    if (out / "runs").exists():
        raise ConfigError(
            f"{out} holds a sweep already; go on with it (or join those who work on it) by "
            "--resume, or give another --out."
        )


def start(out: Path, *, resume: bool) -> None:
    """Make the sweep's directory; of several processes that do so without `resume`, one
    succeeds.
    """
    try:
        (out / "runs").mkdir(parents=True, exist_ok=resume)
    except FileExistsError:
        refuse_existing(out)
        raise


def command_line(arguments: Namespace) -> str:
    """Return what to type for the same figures, without options about a part of the sweep."""
    words = ["fed-diffusion", "sweep", arguments.file]
    for pair in arguments.set:
        words += ["--set", pair]
    for key in ("processes", "out", "report"):
        if (value := getattr(arguments, key)) is not None:
            words += [f"--{key}", str(value)]
    return shlex.join(words)


def run_sweep(
    runs: Sequence[Run],
    out: Path,
    datasets: Mapping[str, ImageSet],
    *,
    processes: int | None = None,
    progress: Callable[[Config], AbstractContextManager[Progress]],
    say: Callable[[str], None],
) -> Outcome:
    """Do what is left of these runs, one after another; a failing one does not end the others.

    Parameters
    ----------
    out
        The sweep's directory.
    datasets
        What `check_runs` loaded.
    processes
        Clients at once; see `fed_diffusion.engines.local.simulate`.
    progress
        A function that makes what is shown of one run while it trains.
    say
        A function that is called with a line for each run that begins or ends.
    """
    outcome = Outcome()
    for number, run in enumerate(runs, 1):
        where = f"[{number}/{len(runs)}] {run.name}"
        lock = FileLock(out / "locks", run.name)
        try:
            if not run.finished() and not lock.acquire():
                outcome.elsewhere[run.name] = lock.holder()
                say(f"{where}: {lock.holder()} works on it")
                continue
            if not run.finished():  # asked again: it may have been, just before it was ours
                with progress(run.config) as shown:
                    _do(
                        run,
                        datasets[key_of(run.config.data)],
                        processes,
                        _guarded(shown, lock),
                        where,
                        say,
                    )
            outcome.finished.append(run)
            say(f"{where}: finished")
        except RunBusy as error:  # by a resume of this one run
            outcome.elsewhere[run.name] = str(error)
            say(f"{where}: {error}")
        except Exception as error:
            logger.debug("%s", run.name, exc_info=True)
            outcome.failed[run.name] = f"{type(error).__name__}: {error}"
            say(f"{where}: failed: {outcome.failed[run.name]}")
        finally:
            lock.release()
    return outcome


def _do(
    run: Run,
    dataset: ImageSet,
    processes: int | None,
    progress: Progress,
    where: str,
    say: Callable[[str], None],
) -> None:
    """Take one run from where it is to its end; the run writes its own status."""
    if (run.path / "config.yaml").exists():
        experiment = Experiment.resume(run.path, dataset)
        say(f"{where}: goes on after round {experiment.coordinator.round}")
    else:
        experiment = Experiment(run.config, run.path, dataset)
        say(f"{where}: begins")
    with experiment.guarded():
        _note_machine(run)
        run_in_process(experiment, processes=processes, progress=progress)


def _guarded(progress: Progress, lock: FileLock) -> Progress:
    """Show a round's line, and end a run that another process has taken over."""

    def show(line: dict[str, Any]) -> None:
        if not lock.held():
            raise LockLost(f"this process was stopped for long, and {lock.holder()} took over")
        progress(line)

    return show


def _note_machine(run: Run) -> None:
    path, machine = run.path / MACHINES, machine_of(run.config)
    if not path.exists() or machine not in path.read_text("utf-8").splitlines():
        with path.open("a", encoding="utf-8") as file:
            file.write(machine + "\n")


def machine_of(config: Config) -> str:
    """This machine as a figure's reader needs to know it."""
    device = device_of(config.worker)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return (
        f"{platform.system()} {platform.machine()}, {usable_cores()} CPU cores, {gpu}, "
        f"torch {torch.__version__}"
    )
