"""The warm worker: real processes on a real socket, killed by real signals."""

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from flwr.app import ConfigRecord, RecordDict

from client_app import warm, work
from client_app.messages import to_records, to_update
from fed_diffusion.config import load_config
from fed_diffusion.experiment import Experiment
from tests.tiny import TINY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's SO_PEERCRED")
NODE = 4711


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Sockets of this test's own, and no worker left behind."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path / f"fed-diffusion-{os.geteuid()}"
    for process in workers():
        process.kill()
        process.wait(10)


def workers():
    """The living worker processes of this process."""
    found = []
    for child in psutil.Process().children():
        try:
            if "client_app.warm" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def task(tmp_path):
    """task(**settings) -> the content of a message with the first client's task of round 1."""

    numbers = itertools.count()

    def make(**settings):
        given = {key.replace("__", "."): value for key, value in settings.items()}
        config = load_config("digits", TINY | {"evaluation.every": 0} | given)
        (first, *_) = Experiment(config, tmp_path / f"run-{next(numbers)}").tasks(1)
        return to_records(first, json.dumps(config.to_dict()))

    return make


def copy(content):
    return warm._from_bytes(warm._to_bytes(content))


def train(content, node_config=None, seconds=60.0):
    return warm.hand_over("train", copy(content), NODE, node_config or {}, seconds)


def values_of(reply):
    return to_update(reply).payload.arrays


def test_a_worker_process_answers_with_the_bits_of_this_process_every_time(task):
    content = task()
    alone = values_of(work.train(copy(content), {}))
    assert values_of(train(content)) == alone
    (first,) = workers()
    assert values_of(train(content)) == alone  # nothing is left over from the task before
    assert workers() == [first]


def test_a_worker_that_is_killed_in_a_task_costs_that_task_only(task):
    content, long = task(), task(local__steps=100_000)
    train(content)
    failures = []

    def run():
        try:
            train(long)
        except RuntimeError as error:
            failures.append(str(error))

    (before,) = workers()
    running = threading.Thread(target=run)
    running.start()
    wait_until(lambda: workers() not in ([], [before]))  # another run: another process
    (during,) = workers()
    wait_until(lambda: during.cpu_times().user > 3)
    during.send_signal(signal.SIGKILL)
    running.join(30)
    assert failures
    assert "died in this task" in failures[0]
    assert values_of(train(content)) == values_of(work.train(copy(content), {}))


@pytest.mark.parametrize("change", ["node config", "run"])
def test_a_worker_of_another_run_or_node_config_is_replaced(task, change):
    train(task())
    (first,) = workers()
    if change == "run":
        train(task(local__steps=2))
    else:
        train(task(), {"keep": 0.5})
    (second,) = workers()
    assert second.pid != first.pid


def test_an_exception_in_the_worker_is_raised_here_with_its_message(task):
    content = task()
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
        warm.hand_over("nonsense", content, NODE, {})
    wait_until(lambda: not workers())  # what it left behind is not known, so it is not used again
    assert values_of(train(content))


def test_data_that_do_not_fit_are_an_answer_and_no_exception(task, tmp_path):
    hello = warm.hand_over("hello", task(), NODE, {"data-dir": str(tmp_path / "nowhere")})
    assert "nowhere" in str(hello["about"]["refused"])
    assert hello["metrics"]["own-data"] == 1


def test_a_worker_that_is_idle_ends_and_leaves_a_socket_that_a_new_one_takes(task):
    content = task()
    train(content, seconds=0.5)
    wait_until(lambda: not workers())
    assert values_of(train(content))


def test_a_worker_ends_with_its_supernode(task):
    """This process calls from below a parent, as a ClientApp does below Flower's SuperExec."""
    parent = subprocess.Popen(["sleep", "600"])
    listener = warm.socket.socket(warm.socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    options = ("-P", "-m", "client_app.warm")
    worker = subprocess.Popen(
        [sys.executable, *options, str(listener.fileno()), "key", "600", str(parent.pid)],
        env=os.environ | {"PYTHONPATH": str(warm.ROOT)},
        pass_fds=[listener.fileno()],
    )
    listener.close()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(5)
    parent.kill()
    parent.wait()
    assert worker.wait(60) == 0


def test_a_task_whose_clientapp_is_killed_ends_with_it(task, tmp_path):
    content = tmp_path / "content"
    content.write_bytes(warm._to_bytes(task(local__steps=100_000)))
    code = (
        "import sys; from pathlib import Path; from client_app import warm\n"
        "content = warm._from_bytes(Path(sys.argv[1]).read_bytes())\n"
        f"warm.hand_over('train', content, {NODE}, {{}})"
    )
    thin = subprocess.Popen(
        [sys.executable, "-c", code, content], env=os.environ | {"PYTHONPATH": str(warm.ROOT)}
    )
    found = []
    wait_until(lambda: found or found.extend(psutil.Process(thin.pid).children()))
    wait_until(lambda: found[0].cpu_times().user > 3)
    thin.kill()
    thin.wait()
    wait_until(lambda: not found[0].is_running() or found[0].status() == psutil.STATUS_ZOMBIE)


def test_sockets_lie_in_a_folder_that_is_this_users_alone(task, folder):
    train(task())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with pytest.raises(RuntimeError, match="closed to others"):
        train(task())
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")
    with pytest.raises(OSError, match="director"):
        train(task())


def test_who_asks_with_another_key_gets_no_answer_and_is_told_so(task):
    train(task())
    with warm._connected(NODE, b"other", 60.0) as connection:
        warm._send(connection, b"other")
        assert warm._receive(connection, 1) == [warm.STALE]
    wait_until(lambda: not workers())


def test_the_process_that_flower_starts_for_every_message_does_not_import_torch():
    code = "import sys, client_app.app; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path("/"),
        env=os.environ | {"PYTHONPATH": str(warm.ROOT)},
    )
    assert done.stdout.split()[0] == "False", done.stderr


def test_records_pass_the_socket_unchanged(task):
    content = task()
    again = copy(content)
    assert again["about"] == content["about"]
    assert again["metrics"] == content["metrics"]
    assert {n: a.data for n, a in again["arrays"].items()} == {
        n: a.data for n, a in content["arrays"].items()
    }
    assert copy(RecordDict({"about": ConfigRecord({"refused": "é"})}))["about"]["refused"] == "é"
