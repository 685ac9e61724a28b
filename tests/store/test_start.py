"""Runs that start from values that are there: checked by names, shapes, meaning and hash."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fed_diffusion.build import build_network, new_network, parameters_of, with_start
from fed_diffusion.checks import check_training
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.engines.local import simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.store.rundir import RunDir
from fed_diffusion.store.start import KEY, hash_of
from tests.tiny import TINY


@pytest.fixture(scope="module")
def first(tmp_path_factory, digits):
    path = tmp_path_factory.mktemp("first") / "run"
    simulate(load_config("digits", TINY | {"rounds": 1, "local.steps": 1}), out=path, processes=1)
    return path


def saved(path, config, metadata=None, **changes):
    theta = {n: torch.full_like(v, 0.25) for n, v in parameters_of(new_network(config)).items()}
    save_file(theta | changes, path, metadata)
    return str(path)


def test_a_run_starts_from_the_average_of_another_and_notes_its_hash(tiny, first, tmp_path):
    config = tiny(model__start=str(first), rounds=1, local__steps=1)
    average = RunDir.open(first).load_theta(ema=True)
    theta = parameters_of(build_network(config))
    assert all(torch.equal(theta[name], average[name]) for name in average)
    results = simulate(config, out=tmp_path / "second", processes=1)
    assert results["start"] == {"from": "run", "sha256": hash_of(average)}
    second = RunDir.open(tmp_path / "second")
    assert second.config().model.start_hash == hash_of(average)
    origin = second.load_checkpoint().state["origin"]
    assert origin["config"]["model"]["start_hash"] == hash_of(average)


def test_a_run_that_goes_on_needs_its_start_no_more(tiny, tmp_path):
    file = tmp_path / "start.safetensors"
    saved(file, tiny())
    experiment = Experiment(tiny(model__start=str(file)), tmp_path / "run")
    theta = dict(experiment.coordinator.theta)
    experiment.close()
    file.unlink()
    again = Experiment.resume(tmp_path / "run")
    try:
        assert all(torch.equal(again.coordinator.theta[name], theta[name]) for name in theta)
    finally:
        again.close()


def test_a_file_starts_a_run_and_the_order_of_its_tensors_changes_no_hash(tiny, tmp_path):
    config = tiny(model__start=saved(tmp_path / "a.safetensors", tiny()))
    theta = parameters_of(build_network(config))
    assert all(bool((value == 0.25).all()) for value in theta.values())
    backwards = dict(reversed(theta.items()))
    assert hash_of(backwards) == hash_of(theta) == with_start(config).model.start_hash


def test_without_a_start_nothing_is_noted(tiny):
    assert with_start(tiny()).model == tiny().model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__widths": [8, 24]}, r"of another shape: .*\[16, 8, 3, 3\] there and \[24, 8, 3"),
        ({"model__widths": [8, 8]}, r"of another shape: "),
        ({"model__blocks": 2}, r"only in this network: .* and \d+ more"),
        ({"model__widths": [8]}, r"only there: "),
        ({"model__conditional": True}, r"only in this network: label\.weight"),
    ],
)
def test_values_of_another_network_are_refused_with_the_difference(
    tiny, tmp_path, changes, message
):
    start = saved(tmp_path / "start.safetensors", tiny())
    with pytest.raises(ConfigError, match=message):
        check_training(tiny(model__start=start, **changes))


@pytest.mark.parametrize(
    ("key", "value"), [("prediction", "x0"), ("group", 4), ("name", "mine:Net"), ("head", 8)]
)
def test_tensors_that_would_be_another_function_are_refused(tiny, tmp_path, key, value):
    config = tiny()
    noted = config.model.model_dump(mode="json") | {key: value}
    start = saved(tmp_path / "start.safetensors", config, {KEY: json.dumps(noted)})
    with pytest.raises(ConfigError, match=rf"trained with model\.{key} = '?{value}"):
        check_training(tiny(model__start=start))


def test_a_run_of_another_prediction_is_refused_as_a_start(tiny, first):
    with pytest.raises(ConfigError, match=r"trained with model\.prediction = 'v'"):
        check_training(tiny(model__start=str(first), model__prediction="eps"))


def test_what_is_no_run_and_no_file_of_tensors_is_refused(tiny, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "other.bin").write_bytes(b"")
    for name, message in (
        ("nowhere", "neither the directory of a run nor"),
        ("other.bin", "neither the directory of a run nor"),
        ("text.safetensors", "cannot be read"),
        (".", "is not a run directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_training(tiny(model__start=str(tmp_path / name)))


def test_values_that_are_not_finite_are_refused(tiny, tmp_path):
    name, value = next(iter(parameters_of(new_network(tiny())).items()))
    start = saved(
        tmp_path / "start.safetensors", tiny(), **{name: torch.full_like(value, torch.nan)}
    )
    with pytest.raises(ConfigError, match=rf"no finite numbers: {name}"):
        check_training(tiny(model__start=start))


def test_other_values_than_those_of_the_hash_are_refused(tiny, tmp_path):
    config = with_start(tiny(model__start=saved(tmp_path / "start.safetensors", tiny())))
    saved(tmp_path / "start.safetensors", tiny(), **{"enter.bias": torch.zeros(8)})
    with pytest.raises(ConfigError, match=r"other values than model\.start_hash"):
        Experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
