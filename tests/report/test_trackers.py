"""Trackers are told what happens, once and in order, and cannot end a run."""

import csv
import json
import logging

import pytest

import fed_diffusion as fd
from fed_diffusion.engines import local
from fed_diffusion.report.trackers import numbers_of
from fed_diffusion.store.rundir import RunDir
from tests.tiny import TINY

SMALL = TINY | {"clients": 2, "rounds": 3, "local.steps": 1, "evaluation.every": 2}
NOTES = []
"""What `Notes` and `Fragile` were told."""


class Notes:
    def __init__(self, config):
        NOTES.append("made")

    def begin(self, run, lines):
        NOTES.append(("begin", [line["round"] for line in lines]))

    def round(self, line):
        NOTES.append(("round", line["round"]))

    def images(self, round, images):
        NOTES.append(("images", round, len(images)))

    def end(self, results):
        NOTES.append(("end", results and results["rounds"]))


class Fragile(Notes):
    def round(self, line):
        raise OSError("the line is down")


class Refusing(Notes):
    def begin(self, run, lines):
        raise ConnectionError("no server")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)
    NOTES.clear()


def config(*names, **settings):
    trackers = [name if name == "csv" else f"{__name__}:{name}" for name in names]
    return fd.load_config("digits", SMALL | {"trackers": trackers} | settings)


def stop_after(round):
    def progress(line):
        if line["round"] == round:
            raise KeyboardInterrupt

    return progress


def test_a_tracker_is_told_of_everything_in_order(tmp_path):
    fd.run(config("Notes"), tmp_path / "run")
    rounds = [("round", 1), ("round", 2), ("images", 2, 16), ("round", 3), ("images", 3, 4)]
    assert ["made", ("begin", []), *rounds, ("end", 3)] == NOTES


def test_a_run_that_is_interrupted_ends_without_results_and_begins_again_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fd.run(config("Notes"), tmp_path / "run", progress=stop_after(1))
    assert NOTES == ["made", ("begin", []), ("round", 1), ("end", None)]
    NOTES.clear()
    fd.resume(tmp_path / "run")
    assert NOTES[:3] == ["made", ("begin", [1]), ("round", 2)]
    assert NOTES[-1] == ("end", 3)


def test_one_that_fails_is_left_out_with_a_warning_and_the_others_go_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fd.run(config("Fragile", "csv"), tmp_path / "run")
    (said,) = [r.getMessage() for r in caplog.records if r.name.endswith("report.trackers")]
    assert f"trackers = '{__name__}:Fragile' failed with OSError: the line is down" in said
    assert NOTES == ["made", ("begin", [])]
    assert len(rows(tmp_path / "run")) == 3


def test_one_that_cannot_begin_refuses_the_run_before_its_first_round(tmp_path):
    with pytest.raises(fd.ConfigError, match="ConnectionError: no server"):
        fd.run(config("Refusing"), tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def rows(run):
    with (run / "rounds.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_the_numbers_of_metrics_jsonl(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fd.run(
            config("csv", **{"round.checkpoint_every": 5}), tmp_path / "run", progress=stop_after(2)
        )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    table = rows(tmp_path / "run")
    assert [int(row["round"]) for row in table] == [1, 2]
    for row, line in zip(table, lines, strict=True):
        assert {"round", "loss", "gamma", "bytes_up", "clock", "seconds"} <= row.keys()
        for name, value in row.items():
            assert value == ("" if line[name] is None else str(line[name]))


def test_rounds_that_are_done_again_stand_in_the_table_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fd.run(config("csv"), tmp_path / "run", progress=stop_after(2))
    table = (tmp_path / "run/rounds.csv").read_text()
    # as after a kill behind the row of a round that has no checkpoint
    (tmp_path / "run/rounds.csv").write_text(table + table.splitlines()[-1] + "\n3,0.")
    fd.resume(tmp_path / "run")
    assert [int(row["round"]) for row in rows(tmp_path / "run")] == [1, 2, 3]


def test_trackers_may_change_when_a_run_goes_on_and_say_nothing_of_its_bits(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fd.run(config(), tmp_path / "run", progress=stop_after(1))
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("trackers: []", "trackers: [csv]"))
    with pytest.raises(fd.ConfigError, match=r"trackers = \['csv'\].*--accept-changes"):
        fd.resume(tmp_path / "run")
    resumed = fd.resume(tmp_path / "run", accept_changes=True)
    assert len(rows(tmp_path / "run")) == 3
    assert fd.run(config(), tmp_path / "whole")["loss"] == resumed["loss"]
    assert RunDir(tmp_path / "run").results()["changes"][0]["key"] == "trackers"


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_whose_package_is_missing_is_refused_with_what_to_install(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr("fed_diffusion.report.trackers.find_spec", lambda package: None)
    with pytest.raises(fd.ConfigError, match=rf"'{name}'.*pip install 'fed-diffusion\[{name}\]'"):
        fd.run(config().model_copy(update={"trackers": (name,)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_curves_and_the_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fd.run(config().model_copy(update={"trackers": ("tensorboard",)}), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [(e.step, e.value) for e in events.Scalars("loss")]
    assert told == [(line["round"], pytest.approx(line["loss"])) for line in lines]
    assert [e.step for e in events.Images("samples")] != []


def test_mlflow_has_one_run_with_settings_curves_and_results(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    fd.run(config().model_copy(update={"trackers": ("mlflow",)}), tmp_path / "run")
    id = (tmp_path / "run" / "mlflow-run.txt").read_text().strip()
    client = mlflow.MlflowClient()
    found = client.get_run(id)
    assert found.info.status == "FINISHED"
    assert found.data.params["local.steps"] == "1"
    assert [m.step for m in client.get_metric_history(id, "loss")] == [1, 2, 3]


def test_numbers_of_a_round_are_all_of_its_numbers_and_nothing_else(tmp_path):
    fd.run(config(), tmp_path / "run")
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    told = numbers_of(line)
    counted = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "round"}
    assert told == counted
