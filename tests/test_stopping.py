"""Full disks, read-only mounts, output that cannot be written: one sentence, and the way back."""

import errno
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fed_diffusion.config import load_config
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.federation.simulate import run_in_process
from fed_diffusion.runfiles import append_line, save_tensors, write_atomic
from tests.federation.conftest import TINY

SETTINGS = TINY | {"evaluation.every": 0, "clients": 2, "rounds": 2}
PAIRS = [f"--set={key}={value}" for key, value in SETTINGS.items()]


def cli(*arguments, **options):
    command = [sys.executable, "-m", "fed_diffusion.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def smallest(limit):
    """No file of this process may be larger: EFBIG, as a full disk says ENOSPC, for anybody."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def leftovers(path):
    return [p.name for p in path.iterdir() if p.name.startswith(".")]


def test_a_disk_that_is_full_ends_a_run_in_one_sentence_and_it_goes_on_later(tmp_path):
    path = tmp_path / "run with blanks"
    experiment = Experiment(load_config("digits", SETTINGS), path)
    whole = (path / "checkpoint/theta.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(line):
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, before[1]))

    try:
        with pytest.raises(RunStopped) as caught:
            run_in_process(experiment, processes=1, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    command = shlex.join(["fed-diffusion", "resume", str(path)])
    assert "theta.safetensors: File too large." in str(caught.value)
    assert f"The last checkpoint is of round 1; go on with: {command}" in str(caught.value)
    status = json.loads((path / "status.json").read_text())
    assert status == {"state": "stopped", "reason": str(caught.value)}
    assert leftovers(path) == []
    assert run_in_process(Experiment.resume(path), processes=1)["rounds"] == 2


def test_where_not_even_the_status_can_be_written_the_first_error_is_the_one_that_is_said(
    tmp_path, monkeypatch
):
    experiment = Experiment(load_config("digits", SETTINGS), tmp_path / "run")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fed_diffusion.rundir.append_line", full)
    monkeypatch.setattr("fed_diffusion.rundir.write_atomic", full)
    with pytest.raises(RunStopped, match=r"run: No space left on device\. The last checkpoint is"):
        run_in_process(experiment, processes=1)
    assert leftovers(tmp_path / "run") == []


def test_an_error_that_is_no_disk_s_keeps_its_kind_and_says_how_to_go_on(tmp_path):
    experiment = Experiment(load_config("digits", SETTINGS), tmp_path / "run")

    def broken(line):
        raise KeyError("missing")

    with pytest.raises(KeyError) as caught:
        run_in_process(experiment, processes=1, progress=broken)
    assert "fed-diffusion resume" in "".join(caught.value.__notes__)
    assert json.loads((tmp_path / "run/status.json").read_text())["reason"].startswith("KeyError")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_command_is_one_sentence_and_exit_code_1(tmp_path):
    done = cli("run", "digits", "--out", tmp_path / "run", *PAIRS, preexec_fn=smallest(3000))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("failed:") == 1
    assert "File too large" in done.stderr


def test_an_output_that_is_full_or_cannot_print_a_name_is_no_crash(tmp_path):
    experiment = Experiment(load_config("digits", SETTINGS | {"rounds": 1}), tmp_path / "run")
    run_in_process(experiment, processes=1)
    sample = [sys.executable, "-m", "fed_diffusion.cli", "sample", str(tmp_path / "run"), "--out"]
    with open("/dev/full", "wb") as full:
        out = str(tmp_path / "a.png")
        done = subprocess.run([*sample, out], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "standard output cannot be written: No space left on device." in done.stderr
    assert "Exception" not in done.stderr
    assert (tmp_path / "a.png").is_file()
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    names = [os.fsencode(tmp_path / "猫.png"), os.fsencode(tmp_path) + b"/caf\xe9.png"]
    told = [
        subprocess.run([*sample, name], env=latin, capture_output=True, check=True).stdout
        for name in names
    ]
    assert told[0].endswith(rb"\u732b.png" + b"\n")
    assert told[1] == names[1] + b"\n"  # a name that is no text comes out as its bytes


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_mount_that_is_full_or_becomes_read_only_ends_a_run_cleanly(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        experiment = Experiment(load_config("digits", SETTINGS), disk / "run")

        def fill(line):
            with (disk / "filler").open("wb", 0) as file:
                while file.write(bytes(512)):
                    pass

        with pytest.raises(OSError, match="No space"):
            fill(None)
        (disk / "filler").unlink()

        def fill_up(line):
            with pytest.raises(OSError, match="No space"):
                fill(line)

        with pytest.raises(RunStopped, match="No space left on device.*go on with"):
            run_in_process(experiment, processes=1, progress=fill_up)
        assert leftovers(disk / "run") == []
        (disk / "filler").unlink()

        def lock_up(line):
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

        resumed = Experiment.resume(disk / "run")
        assert resumed.coordinator.round == 1
        with pytest.raises(RunStopped, match="Read-only file system.*go on with"):
            # the last round's line is written, and what follows it is not
            resumed.train(lambda round: exchange_of(resumed, round), progress=lock_up)
        done = cli("run", "digits", "--out", disk / "new", *PAIRS)
        assert (done.returncode, "Read-only file system" in done.stderr) == (2, True)
        assert "Traceback" not in done.stderr
        done = cli("resume", disk / "run")
        assert (done.returncode, "Read-only file system" in done.stderr) == (2, True)
    finally:
        subprocess.run(["umount", disk], check=True)


def exchange_of(experiment, round):
    from fed_diffusion.federation.simulate import exchange, task_runner

    with task_runner(experiment.config, experiment.dataset, 1) as runner:
        exchange(experiment, runner, round)


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_finds_no_room_leaves_the_old_file_and_nothing_beside_it(tmp_path, small_files):
    import torch

    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(OSError, match="File too large"):
        write_atomic(path, "new" * 100)
    assert path.read_text() == "old"
    append_line(path, "er")
    with pytest.raises(OSError, match="File too large"):
        append_line(path, "x" * 200)
    assert path.read_text() == "older\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match="File too large") as caught:
        save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(100)})
    assert caught.value.errno == errno.EFBIG
