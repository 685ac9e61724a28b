"""A run says what made it, and its files are as open as the umask lets them be."""

import json
import os
import stat
import subprocess
import sys

import numpy
import pytest
import torch

import fed_diffusion as fd
from fed_diffusion.data import content_hash
from fed_diffusion.engines import local
from fed_diffusion.store.locks import FileLock
from fed_diffusion.store.provenance import command_line, commit
from fed_diffusion.store.rundir import RunDir
from tests.tiny import TINY

SMALL = TINY | {"clients": 2, "rounds": 2, "local.steps": 1}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)


def stop(line):
    raise KeyboardInterrupt


def test_a_run_that_is_resumed_names_both_of_its_beginnings(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/fed-diffusion", "run", "digits"])
    with pytest.raises(KeyboardInterrupt):
        fd.run(fd.load_config("digits", SMALL), tmp_path / "run", progress=stop)
    monkeypatch.setattr(sys, "argv", ["/somewhere/fed-diffusion", "resume", "a run"])
    fd.resume(tmp_path / "run")
    begun, resumed = json.loads((tmp_path / "run/provenance.json").read_text())["sessions"]
    assert begun["command"] == "fed-diffusion run digits"
    assert resumed["command"] == "fed-diffusion resume 'a run'"
    assert begun["data"] == resumed["data"] == content_hash(digits)
    assert begun["torch"] == torch.__version__.split("+")[0]
    assert (begun["numpy"], begun["fed-diffusion"]) == (numpy.__version__, fd.__version__)
    assert begun["python"] == ".".join(map(str, sys.version_info[:3]))
    assert begun["machine"]["cores"] >= 1
    assert begun["date"][:10] == RunDir(tmp_path / "run").identity()["created"][:10]


def test_a_damaged_note_keeps_no_run_from_going_on(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        fd.run(fd.load_config("digits", SMALL), tmp_path / "run", progress=stop)
    for name in ("provenance.json", "evaluations.jsonl"):
        (tmp_path / "run" / name).write_text("[damaged\n")
    results = fd.resume(tmp_path / "run")
    assert (tmp_path / "run/provenance.json").read_text() == "[damaged\n"
    assert "not noted there" in caplog.text
    assert results["evaluation"] == 2
    with pytest.raises(fd.ConfigError, match=r"evaluations\.jsonl is damaged"):
        RunDir(tmp_path / "run").evaluations()


def test_neither_host_nor_user_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [f"{tmp_path}/bin/fed-diffusion", "run", "x", "--out", f"{tmp_path}/r"]
    assert command_line(argv) == "fed-diffusion run x --out ~/r"
    assert command_line(["/a/fed_diffusion/__main__.py", "run"]) == "fed-diffusion run"
    assert command_line(["/home/me/study.py", "1"]) == "study.py 1"


def test_the_commit_is_that_of_the_source():
    git = ["git", "-C", os.path.dirname(fd.__file__), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("the source is in no git repository")
    assert commit().removesuffix("-dirty") == found.stdout.strip()


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o002, 0o775, 0o664), (0o077, 0o700, 0o600)])
def test_every_file_of_a_run_has_the_mode_that_the_umask_asks_for(tmp_path, mask, folder, file):
    before = os.umask(mask)
    try:
        path = tmp_path / "run"
        fd.run(fd.load_config("digits", SMALL | {"trackers": "csv", "rounds": 1}), path)
        holder = FileLock(path, "x")
        holder.acquire()
        FileLock(path, "x").join(holder.token)
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [path, *path.rglob("*")]}
    assert len(modes) > 12
    assert {p: oct(m) for p, m in modes.items() if m != (folder if p.is_dir() else file)} == {}
    holder.release()
