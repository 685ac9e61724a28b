"""Locks as files: one holder at a time, and what a killed process leaves is taken over."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from fed_diffusion.store.locks import STALE_S, FileLock

HOLD = """
import sys
from pathlib import Path
from fed_diffusion.store.locks import FileLock
lock = FileLock(Path(sys.argv[1]), "run")
print(lock.join(sys.argv[2]) if sys.argv[2:] else lock.acquire(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A process of its own that holds the lock "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_has_one_holder_and_is_free_when_released(tmp_path):
    one, two = FileLock(tmp_path, "run"), FileLock(tmp_path, "run")
    assert one.acquire()
    assert not two.acquire()
    assert (one.held(), two.held()) == (True, False)
    one.release()
    assert list(tmp_path.iterdir()) == []
    assert two.acquire()
    assert not one.held()
    two.release()


def test_locks_of_other_names_do_not_touch(tmp_path):
    names = ["run", "run.1", "run-[1]", "run.1.lock"]
    locks = [FileLock(tmp_path, name) for name in names]
    assert all(lock.acquire() for lock in locks)
    assert all(lock.held() for lock in locks)
    for lock in locks:
        lock.release()


def test_a_lock_of_a_living_process_is_not_taken(tmp_path, other):
    lock = FileLock(tmp_path, "run")
    assert not lock.acquire()
    assert f"process {other.pid} on " in lock.holder()
    assert "since 20" in lock.holder()
    assert "from fed_diffusion.store.locks import" in lock.holder()  # its command line


def test_who_knows_the_token_holds_the_lock_beside_its_owner_and_beyond_its_end(tmp_path, other):
    token = json.loads((tmp_path / "run.1.lock").read_text())["token"]
    command = [sys.executable, "-c", HOLD, str(tmp_path), token]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
        assert second.stdout.readline() == b"True\n"
        other.kill()
        other.wait()
        lock = FileLock(tmp_path, "run")
        assert not lock.acquire()
        second.kill()
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize("token", ["", "another"])
def test_without_the_token_nobody_joins(tmp_path, token):
    lock = FileLock(tmp_path, "run")
    assert not lock.join(token)
    assert lock.acquire()
    assert not FileLock(tmp_path, "run").join(token)
    lock.release()


def test_a_lock_that_finds_no_room_leaves_nothing_that_keeps_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dump", no_room)
    with pytest.raises(OSError, match="No space"):
        FileLock(tmp_path, "run").acquire()
    assert list(tmp_path.iterdir()) == []


def no_room(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = FileLock(tmp_path, "run")
    assert lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_number_another_process_has_now_is_taken_over(tmp_path):
    first = FileLock(tmp_path, "run")
    assert first.acquire()
    path = tmp_path / "run.1.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 1e6}))
    second = FileLock(tmp_path, "run")
    assert second.acquire()
    assert (first.held(), second.held()) == (False, True)
    first.release()  # what it lost it does not free
    assert second.held()
    second.release()


@pytest.mark.parametrize(("age", "taken"), [(STALE_S - 30, False), (STALE_S + 30, True)])
def test_a_lock_of_another_machine_is_taken_over_when_untouched_for_long(tmp_path, age, taken):
    path = tmp_path / "run.1.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pids": 1, "pid": 1, "started": 0}))
    now = FileLock(tmp_path, "clock")._now()
    os.utime(path, (now - age, now - age))
    lock = FileLock(tmp_path, "run")
    assert lock.acquire() == taken
    lock.release()


def test_of_many_that_find_a_lock_left_over_one_takes_it(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    locks = [FileLock(tmp_path, "run") for _ in range(16)]
    gate, taken = threading.Barrier(len(locks)), []

    def race(lock):
        gate.wait()
        if lock.acquire():
            taken.append(lock)

    threads = [threading.Thread(target=race, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert taken[0].held()
    taken[0].release()
