"""A resumed run is the run that was begun: everything it depends on is compared before a write."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from fed_diffusion.cli.main import main
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data import ImageSet, content_hash
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import Sampler
from fed_diffusion.store.checkpoint import load_checkpoint, save_checkpoint
from fed_diffusion.store.rundir import RunDir
from tests.tiny import TINY

SETTINGS = TINY | {"evaluation.every": 0, "clients": 2, "rounds": 3}


def stop_after(round):
    def progress(line):
        if line["round"] == round:
            raise KeyboardInterrupt

    return progress


def stopped(path, round=2, **overrides):
    config = load_config("digits", SETTINGS | overrides)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(Experiment(config, path), processes=1, progress=stop_after(round))
    return path


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    return stopped(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(halted, tmp_path):
    """A copy of a run that was stopped after two of three rounds."""
    return shutil.copytree(halted, tmp_path / "run")


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def edit(run, **changes):
    """Settings in config.yaml, as `local__eta=1`."""
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = settings
        for section in sections:
            node = node[section]
        node[last] = value
    path.write_text(yaml.safe_dump(settings))


def refused(run, *words, accept=False):
    """The refusal; nothing was written, and the run is free."""
    before = contents(run)
    with pytest.raises(ConfigError) as caught:
        Experiment.resume(run, accept_changes=accept)
    assert contents(run) == before
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


DECIDES = {
    "seed": ({"seed": 1}, "seed = 1 (it was 0)"),
    "clients": ({"clients": 3}, "clients = 3 (it was 2)"),
    "partition": ({"data__partition": "shards"}, "data.partition = 'shards' (it was 'iid')"),
    "T": ({"diffusion__T": 5.0}, "diffusion.T = 5.0 (it was 4.13)"),
    "K": ({"diffusion__K": 30}, "diffusion.K = 30 (it was 20)"),
    "eta": ({"local__eta": 0.5}, "local.eta = 0.5"),
    "optimiser": ({"local__optimizer": "sgd"}, "local.optimizer = 'sgd'"),
    "level": ({"pruning__level": "S"}, "pruning.level = 'S'"),
    "widths": ({"model__widths": [16, 16]}, "model.widths = [16, 16] (it was [8, 16])"),
    "round.mode": (
        {"round__mode": "buffered", "wire__differences": True},
        "round.mode = 'buffered' (it was 'synchronous')",
    ),
}


@pytest.mark.parametrize("case", DECIDES)
@pytest.mark.parametrize("accept", [False, True])
def test_a_setting_that_decides_on_bits_is_refused_with_both_values(case, accept, run):
    changes, words = DECIDES[case]
    edit(run, **changes)
    message = refused(run, words, "every result depends on these", accept=accept)
    assert f"Put {words.split(' =')[0]}" in message


def test_settings_that_may_change_need_a_word_and_are_kept_in_the_results(run, monkeypatch):
    monkeypatch.setattr("fed_diffusion.engines.local.usable_cores", lambda: 1)
    edit(run, rounds=4, evaluation__grid=2, worker__memory_mb=99.0)
    message = refused(run, "rounds = 4 (it was 3)", "evaluation.grid = 2", "worker.memory_mb = 99")
    command = f"fed-diffusion resume {run} --accept-changes"
    assert command in message
    assert main([*command.split()[1:]]) == 0
    results = RunDir(run).results()
    assert results["rounds"] == 4
    assert {"after_round": 2, "key": "rounds", "was": 3, "is": 4} in results["changes"]
    assert len(results["changes"]) == 3


def test_once_accepted_a_change_is_the_run_s_own(run):
    edit(run, rounds=4)
    Experiment.resume(run, accept_changes=True).close()
    Experiment.resume(run).close()
    edit(run, rounds=3)
    refused(run, "rounds = 3 (it was 4)")


def test_one_setting_that_may_not_change_stops_those_that_may(run):
    edit(run, rounds=4, seed=1)
    assert "Put seed back" in refused(run, "rounds = 4", "seed = 1", accept=True)


def test_a_finished_run_goes_on_for_more_rounds_when_asked_to(tmp_path):
    config = load_config("digits", SETTINGS | {"rounds": 1})
    simulate(config, tmp_path / "run", processes=1)
    refused(tmp_path / "run", "is finished", "For more rounds: fed-diffusion resume")
    refused(tmp_path / "run", "is finished", accept=True)
    edit(tmp_path / "run", rounds=2)
    refused(tmp_path / "run", "is finished")
    experiment = Experiment.resume(tmp_path / "run", accept_changes=True)
    assert run_in_process(experiment, processes=1)["rounds"] == 2
    simulate(load_config("digits", SETTINGS | {"rounds": 2}), tmp_path / "whole", processes=1)
    one, two = (load_checkpoint(tmp_path / name).tensors["theta"] for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_has_done_more_rounds_than_it_is_to_says_what_to_set(run):
    edit(run, rounds=1)
    refused(run, "has done 2 rounds, more than rounds = 1", "set rounds to 2", accept=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__prediction": "eps"}, "model.prediction = 'eps' (it was 'v')"),
        ({"diffusion__K": 30}, "diffusion.K = 30 (it was 20)"),
        ({"model__widths": [8, 24]}, "model.widths = [8, 24] (it was [8, 16])"),
        ({"data__holdout": 0.2}, "data.holdout = 0.2 (it was 0.1)"),
    ],
)
def test_a_network_is_sampled_and_measured_with_the_settings_it_was_trained_with_or_not_at_all(
    changes, words, run, tmp_path, capsys
):
    (run / "results.json").write_text('{"rounds": 2}')
    edit(run, **changes)
    before = contents(run)
    for command in (["sample", str(run), "--out", str(tmp_path / "a.png")], ["evaluate", str(run)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "is not what its network was trained with" in said
        assert f"{words}. Put {words.split(' =')[0]} back" in said
    assert contents(run) == before


def test_what_only_concerns_sampling_may_be_changed_before_a_network_is_sampled(run):
    edit(run, evaluation__batch=3, worker__memory_mb=99.0, rounds=9)
    assert len(Sampler.from_run(run).sample(4)) == 4


def test_a_run_that_went_on_after_its_results_is_not_measured_for_them(run, capsys):
    (run / "results.json").write_text('{"rounds": 1}')
    assert main(["evaluate", str(run)]) == 2
    assert "results.json is of round 1 and its checkpoint of round 2" in capsys.readouterr().err
    assert (run / "results.json").read_text() == '{"rounds": 1}'


# --- images -------------------------------------------------------------------------------------


def write_images(folder, count):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.new("L", (8, 8), 5 * number).save(folder / f"{number:02}.png")


def test_images_that_came_changed_or_left_are_refused(tmp_path):
    folder = tmp_path / "images"
    write_images(folder, 20)
    data = {"data.name": "image_folder", "data.dir": str(folder), "data.size": 8}
    run = stopped(tmp_path / "run", **data, **{"data.channels": 1, "evaluation.reference": "none"})
    (folder / "99.png").write_bytes((folder / "03.png").read_bytes())
    refused(run, "the images of", str(folder), "begin a new run", accept=True)
    (folder / "99.png").unlink()
    Image.new("L", (8, 8), 200).save(folder / "03.png")
    refused(run, "the images of")
    write_images(folder, 20)
    moved = folder.rename(tmp_path / "elsewhere")  # the same images in another place
    edit(run, data__dir=str(moved))
    refused(run, "data.dir", "--accept-changes")
    results = run_in_process(Experiment.resume(run, accept_changes=True), processes=1)
    assert results["rounds"] == 3


def test_other_images_than_those_of_the_run_are_neither_measured_against_nor_begun_with(
    tmp_path, capsys
):
    folder = tmp_path / "images"
    write_images(folder, 20)
    data = {"data.name": "image_folder", "data.dir": str(folder), "data.size": 8}
    data |= {"data.channels": 1, "evaluation.reference": "none"}
    run = stopped(tmp_path / "run", **data)
    (run / "results.json").write_text('{"rounds": 2}')
    (folder / "99.png").write_bytes((folder / "03.png").read_bytes())
    command = ["evaluate", str(run), "--samples", "4", "--reference", "train"]
    assert main([*command, "--extractor", "inception"]) == 2
    assert "the images of" in capsys.readouterr().err
    for name in ("checkpoint", "checkpoint-previous", "metrics.jsonl", "results.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(run, "the images of")  # of a run that has done nothing yet, run.json knows them


def test_the_hash_of_images_tells_pixels_labels_order_and_folders_apart():
    images = torch.arange(4 * 64, dtype=torch.uint8).reshape(4, 1, 8, 8)
    labels, of = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    sets = [
        ImageSet(images),
        ImageSet(images.flip(0)),
        ImageSet(images, labels),
        ImageSet(images, 1 - labels),
        ImageSet(images, labels, ("a", "b"), of),
        ImageSet(images, labels, ("a", "b"), 1 - of),
        ImageSet(images, labels, ("a", "c"), of),
        ImageSet(images.reshape(4, 1, 4, 16)),
    ]
    assert len({content_hash(one) for one in sets}) == len(sets)
    assert content_hash(ImageSet(images.clone())) == content_hash(sets[0])


def test_a_server_without_images_goes_on_and_keeps_the_hash_that_was_known(run):
    known = load_checkpoint(run).state["origin"]["data"]
    experiment = Experiment.resume(run, needs_data=False)
    assert known is not None
    assert experiment.dataset is None
    assert experiment.record.origin["data"] == known
    experiment.close()


# --- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path):
    other = stopped(tmp_path / "other")
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(other / "checkpoint", run / "checkpoint")
    refused(run, "is of another run")
    shutil.rmtree(run / "checkpoint")  # the one before it is the run's own
    Experiment.resume(run).close()


def test_a_whole_copy_of_a_run_goes_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy/run.json").unlink()
    assert run_in_process(Experiment.resume(tmp_path / "copy"), processes=1)["rounds"] == 3


@pytest.mark.parametrize("left", [b'{"round": 1}\n', b"damaged"])
def test_where_rounds_were_done_and_no_checkpoint_is_left_nothing_is_wiped(left, run):
    for name in ("checkpoint", "checkpoint-previous"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").write_bytes(left)
    refused(run, "its checkpoints are gone")
    (run / "metrics.jsonl").unlink()
    (run / "results.json").write_text("{}")
    refused(run, "its checkpoints are gone")


@pytest.mark.parametrize("key", ["checkpoint", "wire"])
def test_a_checkpoint_of_another_version_is_refused(key, run):
    found = load_checkpoint(run)
    found.state["origin"]["versions"] |= {key: 0}
    save_checkpoint(run, found.tensors, found.state)
    refused(run, "another version of fed-diffusion")
    del found.state["origin"]
    save_checkpoint(run, found.tensors, found.state)
    refused(run, "another version of fed-diffusion")


def test_a_run_that_was_begun_under_another_torch_goes_on_with_a_warning(run, caplog):
    found = load_checkpoint(run)
    found.state["origin"]["made_by"] |= {"torch": "1.0"}
    save_checkpoint(run, found.tensors, found.state)
    Experiment.resume(run).close()
    assert f"torch 1.0 (now {torch.__version__})" in caplog.text


# --- the record ---------------------------------------------------------------------------------


def test_a_record_that_lost_a_round_is_not_gone_on_with_unasked(run):
    first, second = (run / "metrics.jsonl").read_text().splitlines()
    wrong = json.dumps(json.loads(first) | {"loss": "much"})
    (run / "metrics.jsonl").write_text(f"{wrong}\n{second}\n")
    message = refused(run, "lacks rounds 1 (damaged: line 1) of the 2", "--accept-changes")
    assert "Put them back" in message
    experiment = Experiment.resume(run, accept_changes=True)
    results = run_in_process(experiment, processes=1)
    assert results["rounds_not_recorded"] == [1]
    assert results["bytes_up"] == sum(
        json.loads(line)["bytes_up"] for line in (run / "metrics.jsonl").open()
    )


def test_a_record_without_any_round_is_refused(run):
    (run / "metrics.jsonl").write_bytes(b"")
    refused(run, "lacks rounds 1, 2", accept=True)
