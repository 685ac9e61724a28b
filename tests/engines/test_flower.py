"""The Flower engine with real Flower and real Ray, and small apps in place of ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fed_diffusion.config import Config, build_config, load_config, load_preset
from fed_diffusion.engines.flower import (
    EngineError,
    MetricsTail,
    _federation,
    _run_app,
    run_on_flower,
    stage_app,
)
from fed_diffusion.engines.processes import MARK
from fed_diffusion.engines.signals import stop_signals_interrupt

FEDERATION = {
    "num-supernodes": 2,
    "client-resources-num-cpus": 1,
    "client-resources-num-gpus": 0.0,
    "init-args-num-cpus": 1,
}

PYPROJECT = """
[project]
name = "stand-in"
version = "1.0.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"

[tool.flwr.app.config]
preset = ""
run-dir = ""
"""

SERVER = """
import json, os, time
from pathlib import Path

import psutil
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


def ask_all(grid):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.05)
    messages = [Message(RecordDict(), dst_node_id=n, message_type="query") for n in nodes]
    return [m.content["told"] for m in grid.send_and_receive(messages)]


def write(path, text):
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


@app.main()
def main(grid, context):
    run_dir = Path(context.run_config["run-dir"])
    me = psutil.Process()
    SERVER_BODY
"""

CLIENT = """
import os, sys
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

CLIENT_BODY

app = ClientApp()


@app.query()
def query(message, context):
    told = {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "file": __file__}
    if "own_module" in sys.modules:
        told["own"] = sys.modules["own_module"].ANSWER
    return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)
"""

FINISHES = """
told = ask_all(grid)
family = [me, *me.parents()[:2], *me.children(recursive=True)]
report = {"pids": [p.pid for p in family], "mark": os.environ["FED_DIFFUSION_ENGINE"],
          "cwd": os.getcwd(), "told": [dict(t) for t in told],
          "config": dict(context.run_config)}
write(run_dir / "report.json", json.dumps(report))
with (run_dir / "metrics.jsonl").open("a") as file:
    for round in (1, 2):
        file.write(json.dumps({"round": round}) + "\\n")
write(run_dir / "status.json", json.dumps({"state": "finished", "reason": None}))
"""

HANGS = FINISHES.rsplit("\n", 2)[0] + "\ntime.sleep(600)\n"


def write_app(folder: Path, server: str = FINISHES, client: str = "") -> Path:
    app = folder / "app"
    body = textwrap.indent(server.strip(), "    ").strip()
    for name, text in (
        ("server_app", SERVER.replace("SERVER_BODY", body)),
        ("client_app", CLIENT.replace("CLIENT_BODY", client)),
    ):
        (app / name).mkdir(parents=True)
        (app / name / "__init__.py").touch()
        (app / name / "app.py").write_text(text)
    (app / "pyproject.toml").write_text(PYPROJECT)
    return app


def run(folder: Path, app: Path, **options: Any) -> int:
    run_dir = folder / "run"
    run_config = {"preset": 'it\'s "quoted"', "run-dir": str(run_dir)}
    return _run_app(app, run_config, FEDERATION, run_dir, **options)


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    return loaded


def alive(pids: list[int], mark: str) -> list[str]:
    """Processes of the run, by pid or by the variable that all of them inherit."""
    left = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == mark
            if ours or (process.pid in pids and process.status() != psutil.STATUS_ZOMBIE):
                left.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:
            continue
    return left


@pytest.fixture
def temp_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of the test's own, to see what is left in it."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


def test_a_run_that_finishes_returns_0_reports_each_round_and_leaves_nothing(
    tmp_path: Path, temp_root: Path
) -> None:
    own = tmp_path / "own"
    (own / "client_app").mkdir(parents=True)  # another project's package of the same name
    (own / "client_app" / "__init__.py").write_text("raise ImportError('the wrong client_app')")
    (own / "own_module.py").write_text("ANSWER = 42")
    app = write_app(tmp_path, client="import own_module")
    rounds: list[dict[str, Any]] = []

    assert run(tmp_path, app, progress=rounds.append, modules=own) == 0

    report = report_of(tmp_path)
    assert rounds == [{"round": 1}, {"round": 2}]
    assert len(report["pids"]) > 8  # SuperLink, superexec, simulation, Ray and a worker
    assert alive(report["pids"], report["mark"]) == []
    assert list(temp_root.iterdir()) == []
    assert report["config"]["preset"] == 'it\'s "quoted"'
    assert Path(report["cwd"]).parent.parent == temp_root
    for told in report["told"]:
        assert told["threads"] == "1"
        assert told["own"] == 42
        assert told["file"].startswith(str(temp_root))


def test_sigint_ends_every_process_of_the_run(tmp_path: Path) -> None:
    engine = engine_in_a_process(tmp_path, write_app(tmp_path, HANGS))
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl", engine)
        report = report_of(tmp_path)
        assert alive(report["pids"], report["mark"]) != []
        engine.send_signal(signal.SIGINT)
        _, errors = engine.communicate(timeout=30)
    finally:
        engine.kill()
    assert b"KeyboardInterrupt" in errors
    assert alive(report["pids"], report["mark"]) == []


def engine_in_a_process(folder: Path, app: Path) -> subprocess.Popen[bytes]:
    code = (
        "from pathlib import Path; from fed_diffusion.engines.flower import _run_app\n"
        f"run = Path({str(folder / 'run')!r})\n"
        f"_run_app(Path({str(app)!r}), {{'run-dir': str(run)}}, {FEDERATION!r}, run)"
    )
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE)


def wait_for(path: Path, engine: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert engine.poll() is None, "the engine ended early"
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_app_that_says_it_failed_is_an_engine_error_with_its_reason(
    tmp_path: Path,
) -> None:
    failed = {"state": "failed", "reason": "ValueError: theta went missing"}
    status = f"write(run_dir / 'status.json', {json.dumps(failed)!r})"
    app = write_app(tmp_path, f"print('in the log')\n{status}\nraise ValueError")
    with pytest.raises(EngineError, match="theta went missing"):
        run(tmp_path, app)
    assert "in the log" in (tmp_path / "run" / "flower.log").read_text()


@pytest.mark.slow
def test_a_server_app_that_raises_without_a_word_is_an_engine_error_with_the_exception(
    tmp_path: Path,
) -> None:
    app = write_app(tmp_path, "raise ValueError('theta went missing')")
    with pytest.raises(EngineError, match=r"theta went missing[\s\S]*flower\.log"):
        run(tmp_path, app)


@pytest.mark.slow
def test_a_client_app_that_cannot_be_imported_is_an_engine_error_with_the_exception(
    tmp_path: Path,
) -> None:
    app = write_app(tmp_path, client="import no_such_module")
    with pytest.raises(EngineError, match="no_such_module"):
        run(tmp_path, app)


@pytest.mark.slow
def test_a_server_app_that_is_killed_is_noticed_at_once(tmp_path: Path) -> None:
    app = write_app(tmp_path, "os.kill(os.getpid(), 9)")
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"was killed \(out of memory"):
        run(tmp_path, app)
    assert time.monotonic() - began < 45  # Flower itself takes 60 s longer


@pytest.mark.slow
def test_an_app_that_flower_refuses_is_an_engine_error_with_flowers_words(tmp_path: Path) -> None:
    app = write_app(tmp_path)
    (app / "pyproject.toml").write_text(PYPROJECT.replace('run-dir = ""', ""))
    with pytest.raises(EngineError, match=r"Flower did not accept the run: .code: 15. Invalid"):
        run(tmp_path, app)


@pytest.mark.slow
def test_when_the_engine_itself_is_killed_its_processes_end_too(tmp_path: Path) -> None:
    engine = engine_in_a_process(tmp_path, write_app(tmp_path, HANGS))
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl", engine)
    finally:
        engine.kill()
        engine.communicate()
    report = report_of(tmp_path)
    deadline = time.monotonic() + 30
    while (left := alive(report["pids"], report["mark"])) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


@pytest.mark.slow
def test_our_own_app_trains_the_digits(tmp_path: Path) -> None:
    settings = {
        "clients": 2,
        "rounds": 1,
        "model": {"widths": [8], "blocks": 1, "group": 8},
        "local": {"steps": 1, "batch": 4},
        "evaluation": {"samples": 0, "grid": 4, "steps": 8, "reference": "none"},
    }
    rounds: list[dict[str, Any]] = []
    assert run_on_flower(build_config(settings), tmp_path / "run", progress=rounds.append) == 0
    assert [line["round"] for line in rounds] == [1]
    assert (tmp_path / "run" / "results.json").is_file()


# --- without Flower -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ray_cluster_that_runs_already_is_used_and_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_enable_worker_prestart", "0")
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as home:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus", "2"]
        ray += ["--port", "0", "--temp-dir", home, "--include-dashboard", "false", "--block"]
        with subprocess.Popen(ray, stdout=subprocess.PIPE, text=True) as head:
            try:
                assert head.stdout is not None
                started = next(line for line in head.stdout if "address='" in line)
                address = started.split("address='")[1].split("'")[0]
                small = {"rounds": 1, "clients": 2, "local.steps": 1, "evaluation.samples": 0}
                small |= {"evaluation.every": 0, "evaluation.grid": 1, "evaluation.steps": 10}
                config = load_config("digits", small | {"flower.ray_address": address})
                assert run_on_flower(config, tmp_path) == 0
                assert head.poll() is None
                # nothing but the run can have asked this cluster for workers
                assert list(Path(home).glob("session_*/logs/worker-*.out"))
            finally:
                for process in psutil.Process(head.pid).children(recursive=True):
                    process.kill()
                head.kill()


def test_the_staged_app_holds_the_code_and_the_presets_and_nothing_else(tmp_path: Path) -> None:
    stage_app(tmp_path, Config())
    files = set(contents(tmp_path))
    assert {
        "pyproject.toml",
        "conf/resolved.yaml",
        "conf/digits.yaml",
        "fed_diffusion/config/load.py",
        "server_app/app.py",
        "client_app/app.py",
    } <= files
    assert {Path(name).parts[0] for name in files} == {
        "pyproject.toml",
        "conf",
        "fed_diffusion",
        "server_app",
        "client_app",
    }
    assert {Path(name).suffix for name in files} == {".py", ".yaml", ".toml"}


def test_an_installed_wheel_stages_the_same_app_as_a_checkout(tmp_path: Path) -> None:
    root, site = Path(__file__).resolve().parents[2], tmp_path / "site"
    for name in ("fed_diffusion", "server_app", "client_app"):
        shutil.copytree(root / name, site / name)
    shutil.copytree(root / "conf", site / "fed_diffusion" / "conf")
    shutil.copy(root / "pyproject.toml", site / "fed_diffusion" / "app.toml")
    staged = tmp_path / "staged"
    staged.mkdir()
    code = (
        "import sys; from pathlib import Path; from fed_diffusion.config import Config\n"
        "from fed_diffusion.engines.flower import stage_app\n"
        "assert not {'flwr', 'ray', 'server_app'} & set(sys.modules)\n"
        "stage_app(Path(sys.argv[1]), Config())"
    )
    command = [sys.executable, "-c", code, str(staged)]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, check=True)
    stage_app(tmp_path / "checkout", Config())
    assert contents(staged) == contents(tmp_path / "checkout")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in files}


def test_the_staged_preset_is_the_whole_config(tmp_path: Path) -> None:
    config = build_config({"preset": "mine", "rounds": 3, "local": {"epochs": 2}})
    stage_app(tmp_path, config)
    assert build_config(load_preset(str(tmp_path / "conf" / "resolved.yaml"))) == config


def test_there_are_no_more_ray_workers_than_clients_in_a_round() -> None:
    config = build_config({"clients": 4, "round": {"fraction": 0.25}})
    assert _federation(config)["init-args-num-cpus"] == 1
    assert _federation(config)["num-supernodes"] == 4


def test_a_worker_with_more_threads_than_cores_still_gets_its_place() -> None:
    threads = 4 * (os.cpu_count() or 1)
    federation = _federation(build_config({"worker": {"threads": threads}}))
    assert federation["init-args-num-cpus"] == federation["client-resources-num-cpus"] == threads


def test_only_whole_new_lines_are_reported_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n')
    lines = MetricsTail(path)
    assert lines.new() == []
    with path.open("a") as file:
        file.write('{"round": 2}\n{"rou')
    assert lines.new() == [{"round": 2}]
    assert lines.new() == []
    with path.open("a") as file:
        file.write('nd": 3}\n')
    assert lines.new() == [{"round": 3}]
    path.write_text('{"round": 1}\n')
    assert lines.new() == []
    with path.open("a") as file:
        file.write('{"round": 2, "again": true}\n')
    assert lines.new() == [{"round": 2, "again": True}]


def test_sigterm_interrupts_and_its_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), stop_signals_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    seen = []

    def inside() -> None:
        with stop_signals_interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
