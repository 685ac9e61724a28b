"""What a run says of itself while it goes on, and what it says is left."""

import json
import time

import pytest

import fed_diffusion as fd
from fed_diffusion.engines import local
from fed_diffusion.generate import Sampler
from fed_diffusion.report import live as page
from fed_diffusion.store import live
from fed_diffusion.store.checkpoint import load_checkpoint
from fed_diffusion.store.live import Live
from fed_diffusion.store.rundir import RunDir
from tests.tiny import TINY

SMALL = TINY | {"clients": 3, "rounds": 3, "local.steps": 1}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def said(path):
    return json.loads((path / live.NAME).read_text())


def test_what_is_left_of_training_is_the_round_in_progress_and_those_to_come(tmp_path, clock):
    told = Live(RunDir(tmp_path), rounds=10)
    told.go_on([7.0, *[20.0] * 5])
    told.round(7)
    clock.now += 5
    told.answered(of=4)
    assert said(tmp_path)["seconds_left"] == 15 + 3 * 20
    clock.now += 15
    for _ in range(3):
        told.answered(of=4)
    assert said(tmp_path)["seconds_left"] == 3 * 20
    assert (said(tmp_path)["done"], said(tmp_path)["of"]) == (4, 4)


def test_the_start_of_the_workers_is_not_expected_again(tmp_path, clock):
    told = Live(RunDir(tmp_path), rounds=3)
    told.round(1)
    clock.now += 30
    for done in range(1, 6):
        clock.now += 2
        told.answered(of=5)
        left = said(tmp_path)["seconds_left"]
        assert left == (None if done < 4 else (5 - done) * 2 + 2 * 10)
    told.closed(40.0)
    assert said(tmp_path)["seconds_left"] == 2 * (8 / 4 * 5)


def test_what_is_left_of_sampling_goes_by_its_speed_up_to_now(tmp_path, clock):
    told = Live(RunDir(tmp_path), rounds=1)
    told.step("sampling", 0.0, 100)
    assert said(tmp_path)["seconds_left"] is None
    clock.now += 10
    told.step("sampling", 20.0, 100)
    assert said(tmp_path)["seconds_left"] == 40


def test_a_file_is_written_now_and_then_only(tmp_path, clock):
    told = Live(RunDir(tmp_path), rounds=1)
    told.step("sampling", 1.0, 100)
    told.step("sampling", 2.0, 100)
    assert said(tmp_path)["done"] == 1.0
    clock.now += live.EVERY_S
    told.step("sampling", 3.0, 100)
    assert said(tmp_path)["done"] == 3.0


def test_a_run_says_what_it_does_and_leaves_nothing_of_it_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    seen = []
    write = live.write_atomic

    def note(path, text, **options):
        seen.append(json.loads(text))
        write(path, text, **options)

    monkeypatch.setattr(live, "write_atomic", note)
    fd.run(fd.load_config("digits", SMALL), tmp_path / "run")
    assert {line["doing"] for line in seen} == {"training", "sampling", "writing the report"}
    inside = [(s["round"], s["done"]) for s in seen if s["doing"] == "training" and s["of"]]
    assert inside == [(round, done) for round in (1, 2, 3) for done in (1, 2, 3)]
    assert not (tmp_path / "run" / live.NAME).exists()


def test_a_running_run_is_sampled_and_has_a_page_of_the_rounds_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)
    monkeypatch.setattr(page, "EVERY_S", 0.0)
    path, found = tmp_path / "run", {}

    def look(line):
        if line["round"] == 2:
            before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.suffix != ".html"}
            found["images"] = Sampler.from_run(path).sample(2)
            after = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.suffix != ".html"}
            assert before == after
            deadline = time.monotonic() + 30
            while not (path / "report.html").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            found["page"] = (path / "report.html").read_text()
            assert RunDir(path).in_use()

    fd.run(fd.load_config("digits", SMALL), path, progress=look)
    assert found["images"].shape == (2, 1, 8, 8)
    assert "not finished" in found["page"]
    assert not RunDir(path).in_use()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    from fed_diffusion.store import checkpoint

    for round in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {}, {"round": round})
    read, calls = checkpoint._read, []

    def slow(folder):
        calls.append(folder)
        if len(calls) == 1:  # meanwhile the run goes on by a round
            checkpoint.save_checkpoint(tmp_path, {}, {"round": 3})
            raise checkpoint.CheckpointError("it was renamed")
        return read(folder)

    monkeypatch.setattr(checkpoint, "_read", slow)
    assert load_checkpoint(tmp_path).state["round"] == 3
