"""Full disks, read-only mounts, output that cannot be written: one sentence, and the way back."""

import errno
import io
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fed_diffusion.cli.main import main
from fed_diffusion.config import load_config
from fed_diffusion.engines.local import Exchange, run_in_process
from fed_diffusion.engines.pool import task_runner
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.store.files import append_line, save_tensors, write_atomic
from tests.tiny import TINY

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

    monkeypatch.setattr("fed_diffusion.store.run_files.append_line", full)
    monkeypatch.setattr("fed_diffusion.store.run_files.write_atomic", full)
    monkeypatch.setattr("fed_diffusion.store.rundir.write_atomic", full)
    with pytest.raises(RunStopped, match=r"run: No space left on device\. No round was finished"):
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


def test_a_full_disk_under_the_command_is_one_sentence_and_exit_code_1(tmp_path):
    done = cli("run", "digits", "--out", tmp_path / "run", *PAIRS, preexec_fn=smallest(3000))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("failed:") == 1
    assert "File too large" in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "run"
    experiment = Experiment(load_config("digits", SETTINGS | {"rounds": 1}), path)
    run_in_process(experiment, processes=1)
    return path


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_sentence_and_what_was_made_is_there(
    trained, tmp_path, monkeypatch, capsys
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["sample", str(trained), "--num", "1", "--out", str(tmp_path / "a.png")]) == 1
    said = capsys.readouterr().err
    assert said == "failed: standard output cannot be written: No space left on device.\n"
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("encoding", "name", "printed"),
    [
        ("latin-1", "猫.png", rb"\u732b.png"),
        ("latin-1", "é.png", b"\xe9.png"),
        ("utf-8", "猫.png", "猫.png".encode()),
        ("utf-8", os.fsdecode(b"caf\xe9.png"), b"caf\xe9.png"),  # a name that is no text
        ("ascii", "\U0001f600.png", rb"\U0001f600.png"),
    ],
)
def test_a_name_is_printed_whatever_the_encoding_of_the_output(
    encoding, name, printed, trained, tmp_path, monkeypatch
):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["sample", str(trained), "--num", "1", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / name).is_file()
    assert output.buffer.getvalue() == os.fsencode(tmp_path) + b"/" + printed + b"\n"


def test_a_picture_that_could_not_be_written_is_refused_before_it_is_made(
    trained, tmp_path, capsys
):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "x.png"):
        assert main(["sample", str(trained), "--out", str(out)]) == 2
        assert f"--out {out}" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_mount_that_is_full_or_becomes_read_only_ends_a_run_cleanly(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk])
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

        with pytest.raises(RunStopped, match=r"No space left on device.*go on with"):
            run_in_process(experiment, processes=1, progress=fill_up)
        assert leftovers(disk / "run") == []
        (disk / "filler").unlink()

        def lock_up(line):
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

        resumed = Experiment.resume(disk / "run")
        assert resumed.coordinator.round == 1
        with pytest.raises(RunStopped, match=r"Read-only file system.*go on with"):
            # the last round's line is written, and what follows it is not
            resumed.train(lambda round: exchange_of(resumed, round), progress=lock_up)
        for command in (
            ["run", "digits", "--out", str(disk / "new")],
            ["resume", str(disk / "run")],
        ):
            assert main(command) == 2
            assert "Read-only file system" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def exchange_of(experiment, round):
    with task_runner(experiment.config, experiment.dataset, 1) as runner:
        Exchange(experiment, runner)(round)


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
