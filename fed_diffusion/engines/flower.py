"""The Flower engine: stage the app, start a private SuperLink, follow the run, end everything.

Imports neither flwr nor ray. It drives Flower's executables and reads the run directory, where the
ServerApp appends a line to metrics.jsonl every round and writes status.json as its last act.

Plain `flwr run` leaves a daemon behind, returns 0 for runs that fail, reinstalls the app's
dependencies, and can import another project's code; what is started here does none of that.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config, conf_dir
from fed_diffusion.config.names import names_own_parts
from fed_diffusion.engines.signals import stop_signals_interrupt
from fed_diffusion.engines.superlink import EngineError, SuperLink
from fed_diffusion.store.files import in_words

if TYPE_CHECKING:
    from fed_diffusion.store.rundir import RunDir

__all__ = ["EngineError", "run_on_flower", "stage_app"]

Progress = Callable[[dict[str, Any]], None]
Values = Mapping[str, str | int | float | bool]

PACKAGES = ("fed_diffusion", "server_app", "client_app")
PRESET = "resolved"
"""The name of the staged preset, which holds every setting of the run."""

POLL_S = 0.2
"""The seconds between looks at the run directory, at two files and three processes."""


def run_on_flower(
    config: Config,
    run_dir: Path | RunDir,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    accept_changes: bool = False,
) -> int:
    """Run the whole experiment on Flower's simulation engine, in a private SuperLink.

    This process holds the run directory's lock to the end, and the ServerApp joins it.

    Parameters
    ----------
    run_dir
        Where the ServerApp writes: a path, made if it is not there, or a directory that is locked
        already.
    resume
        Whether to go on with the run that is there.
    accept_changes
        See `fed_diffusion.store.origin.standing`.
    progress
        A function that is called with each round's line of metrics.jsonl as it appears.

    Returns
    -------
    int
        0, since the run finished.

    Raises
    ------
    EngineError
        The run failed; the message says why and where the full log is.
    KeyboardInterrupt
        SIGINT, SIGTERM or SIGHUP came; as in every other case nothing is left running.
    """
    from fed_diffusion.store.origin import resume_command  # torch takes seconds to import
    from fed_diffusion.store.rundir import LOCK_TOKEN, RunDir

    if isinstance(run_dir, RunDir):
        run = run_dir
    elif resume:
        run = RunDir.open(run_dir)
        run.lock()
    else:
        run = RunDir.create(run_dir, config)
    run_config: dict[str, str | bool] = {"preset": PRESET}
    run_config["resume" if resume else "run-dir"] = str(run.path)
    if accept_changes:
        run_config["accept-changes"] = "yes"
    try:
        with stop_signals_interrupt(), short_temp_dir() as stage:
            stage_app(stage, config)
            return _run_app(
                stage,
                run_config,
                _federation(config),
                run.path,
                progress,
                modules=Path.cwd() if names_own_parts(config) else None,
                ray_address=config.flower.ray_address,
                environment={LOCK_TOKEN: run.token},
            )
    except KeyboardInterrupt as error:
        if not run.finished():
            name = str(error) or "SIGINT"
            how = resume_command(run.path, engine="flower")
            run.write_status("stopped", f"interrupted: {name}. Go on with: {how}")
        raise
    finally:
        run.unlock()


def _run_app(
    app_dir: Path,
    run_config: Values,
    federation: Values,
    run_dir: Path,
    progress: Progress | None = None,
    *,
    modules: Path | None = None,
    ray_address: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run any Flower app that keeps to metrics.jsonl and status.json; see `run_on_flower`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "status.json").unlink(missing_ok=True)
    lines = MetricsTail(run_dir / "metrics.jsonl")
    with (
        stop_signals_interrupt(),
        short_temp_dir() as home,
        SuperLink(home, modules, ray_address, environment) as superlink,
    ):
        try:
            superlink.start()
            size = " ".join(f"{key}={json.dumps(value)}" for key, value in federation.items())
            superlink.submit(app_dir, to_toml(run_config), size)
            _follow(superlink, run_dir, lines, progress)
        except EngineError as error:
            try:
                log = superlink.keep_log(run_dir / "flower.log")
            except OSError as second:
                raise EngineError(f"{error}\n{in_words(second, run_dir)}") from None
            raise EngineError(f"{error}\nThe full log is in {log}.") from None
    return 0


def _follow(
    superlink: SuperLink, run_dir: Path, lines: MetricsTail, progress: Progress | None
) -> None:
    """Return when the run has finished; raise `EngineError` when it has failed or died."""
    while True:
        ended = superlink.why_ended()
        status = _status(run_dir)  # after the line above, before the one below: nothing is missed
        for line in lines.new():
            if progress is not None:
                progress(line)
        if status is not None:
            break
        if ended is not None:
            raise EngineError(ended)
        time.sleep(POLL_S)
    if status["state"] != "finished":
        superlink.wait_for_log()
        raise EngineError(f"The run {status['state']}: {status.get('reason') or 'no reason given'}")


def _status(run_dir: Path) -> dict[str, Any] | None:
    try:
        text = (run_dir / "status.json").read_text("utf-8")
    except FileNotFoundError:
        return None
    try:
        status = json.loads(text)
        return {"state": str(status["state"]), "reason": status.get("reason")}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineError(f"{run_dir / 'status.json'} is damaged: {error!r}") from error


class MetricsTail:
    """The lines that a growing JSON-lines file has gained since the last look.

    Parameters
    ----------
    whole
        Begin with the lines that are there already.
    """

    def __init__(self, path: Path, whole: bool = False):
        self._path = path
        self._offset = 0
        self._seen: set[bytes] = set()
        if not whole:
            self.new()  # what is there already is of an earlier part of the run

    def new(self) -> list[dict[str, Any]]:
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return []
        if size == self._offset:
            return []
        if size < self._offset:
            self._offset = 0  # rewritten, as when a run is resumed: read it again, repeat nothing
        with self._path.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read()
        whole = chunk[: chunk.rfind(b"\n") + 1]  # a line may be half written
        self._offset += len(whole)
        fresh = [line for line in whole.splitlines() if line and line not in self._seen]
        self._seen.update(fresh)
        return list(_objects(fresh))


def _objects(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects; a damaged line is left out, and the record says what is missing."""
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


# --- the app as it is submitted -----------------------------------------------------------------


def stage_app(stage: Path, config: Config) -> None:
    """Copy the app into an empty directory, with the resolved config as its preset `resolved`.

    `flwr run` walks the whole directory and bundles what it finds there: in a checkout that would
    be the data sets and earlier runs.
    """
    package = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        # side by side in a checkout as in site-packages; sys.path may lead to another project's
        # client_app, a common name
        _copy(package.parent / name, stage / name, "**/*.py")
    _copy(conf_dir(), stage / "conf", "*.yaml")
    (stage / "conf" / f"{PRESET}.yaml").write_text(config.to_yaml(), "utf-8")
    (stage / "pyproject.toml").write_text(_app_toml(package), "utf-8")


def _copy(source: Path, target: Path, pattern: str) -> None:
    files = list(source.glob(pattern))
    if not files:
        raise EngineError(f"{source} holds no {pattern}; is the installation complete?")
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _app_toml(package: Path) -> str:
    """Return what Flower needs of our pyproject.toml, without fab-include."""
    shipped = package / "app.toml"  # in a wheel
    source = shipped if shipped.is_file() else package.parent / "pyproject.toml"
    try:
        whole = tomllib.loads(source.read_text("utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{source} is missing; is the installation complete?") from None
    project, app = whole["project"], whole["tool"]["flwr"]["app"]
    tables = {
        "project": {key: project[key] for key in ("name", "version", "description", "license")},
        "tool.flwr.app": {"publisher": app["publisher"]},
        "tool.flwr.app.components": app["components"],
        "tool.flwr.app.config": app["config"],
    }
    return "\n".join(f"[{name}]\n{to_toml(values)}" for name, values in tables.items())


def to_toml(values: Values) -> str:
    """Return plain values as TOML: JSON's notation of them is TOML's."""
    return "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()
    )


def _federation(config: Config) -> dict[str, int | float]:
    """Return Flower's settings for this run, with no more Ray workers than clients at once."""
    threads = config.worker.threads
    clients = math.ceil(config.clients * config.round.fraction)
    workers = max(1, min(usable_cores() // threads, clients))
    federation: dict[str, int | float] = {
        "num-supernodes": config.flower.supernodes or config.clients,
        "client-resources-num-cpus": threads,
        "client-resources-num-gpus": _gpus_per_client(config),
    }
    if config.flower.ray_address is None:  # a cluster that is there has its own size
        federation["init-args-num-cpus"] = workers * threads
    return federation


def _gpus_per_client(config: Config) -> float:
    """Return flower.gpus, or one for each client at once where clients train on GPUs."""
    if config.flower.gpus is not None:
        return config.flower.gpus
    if config.worker.device == "cpu":
        return 0.0
    from fed_diffusion.common.compute import device_of  # torch takes seconds to import

    return float(device_of(config.worker).type == "cuda")


@contextmanager
def short_temp_dir() -> Iterator[Path]:
    """Yield a private directory whose path leaves room for Ray's sockets (AF_UNIX: 103 bytes)."""
    parent = tempfile.gettempdir()
    if len(parent) > 20 and os.path.isdir("/tmp"):
        parent = "/tmp"
    with tempfile.TemporaryDirectory(prefix="fd-", dir=parent, ignore_cleanup_errors=True) as path:
        yield Path(path).resolve()
