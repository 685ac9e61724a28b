"""The classes of a folder are named wherever a run says what it was trained on."""

import json

import pytest
import torch
import yaml

from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.config.schema import DataConfig
from fed_diffusion.data import ImageSet, load_dataset
from fed_diffusion.data.datasets import KNOWN
from fed_diffusion.engines.local import simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.sweep.grid import Run, check_runs
from tests.data.test_own import save
from tests.tiny import TINY


@pytest.fixture
def folder(tmp_path):
    """30 digits of the classes eight, five and two, and a file that is not read."""
    digits = load_dataset(DataConfig())
    names = {2: "two", 5: "five", 8: "eight"}
    for label, name in names.items():
        save(tmp_path / "images" / name, digits.images[digits.labels == label][:10])
    (tmp_path / "images" / "a.heic").write_text("")
    return tmp_path / "images"


def config(folder, **data):
    given = {"name": "image_folder", "dir": str(folder), "size": 8, "channels": 1} | data
    settings = {"evaluation.every": 0, "rounds": 1, "clients": 2, "evaluation.reference": "none"}
    return load_config("digits", TINY | settings | {f"data.{k}": v for k, v in given.items()})


def test_a_run_names_its_classes_in_its_config_results_and_report(folder, tmp_path, caplog):
    results = simulate(config(folder, classes=None), tmp_path / "run", processes=1)
    assert results["data"]["images"] == 30
    assert results["data"]["classes"] == {"eight": 10, "five": 10, "two": 10}
    (note,) = results["data"]["notes"]
    assert "1 file beside the 30 images that were not read: 1 .heic" in note
    assert caplog.text.count(note) == 1
    assert json.loads((tmp_path / "run/results.json").read_text())["data"] == results["data"]
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["data"]["class_names"] == ["eight", "five", "two"]
    page = (tmp_path / "run/report.html").read_text()
    for label, name in enumerate(("eight", "five", "two")):
        assert f'<td>{label}</td><td class="text">{name}</td><td>10</td>' in page
    assert "1 .heic" in page


def test_a_run_whose_classes_have_changed_is_not_resumed(folder, tmp_path):
    Experiment(config(folder), tmp_path / "run")
    save(folder / "a new one", torch.zeros((1, 1, 8, 8), dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"'a new one', which is not in data\.class_names"):
        Experiment.resume(tmp_path / "run")


def test_a_sweep_over_a_folder_of_classes_goes_on_where_it_was(folder, tmp_path):
    cell = Run("one", "FedDM-F", config(folder), tmp_path / "run")
    Experiment(cell.config, cell.path)
    check_runs([cell])
    changed = Run("one", "FedDM-F", config(folder, flip=True), cell.path)
    with pytest.raises(ConfigError, match="data differ"):
        check_runs([changed])


def test_the_embedded_sets_have_their_classes_names():
    assert load_dataset(DataConfig()).class_names == tuple("0123456789")
    assert all(len(known.class_names) == 10 for known in KNOWN.values())
    from torchvision.datasets import FashionMNIST

    assert KNOWN["fashion_mnist"].class_names == tuple(FashionMNIST.classes)


def test_other_names_can_be_given_to_a_named_sets_classes():
    names = [f"digit {label}" for label in range(10)]
    assert load_dataset(DataConfig(class_names=names)).class_names == tuple(names)
    with pytest.raises(ConfigError, match=r"data\.classes = 2 contradicts data\.name = 'digits'"):
        load_dataset(DataConfig(class_names=["even", "odd"]))


def test_labels_beyond_the_names_are_refused():
    with pytest.raises(ValueError, match="labels must count from 0 to 1, found 0 to 2"):
        ImageSet(
            torch.zeros((2, 1, 4, 4), dtype=torch.uint8),
            torch.tensor([0, 2]),
            class_names=("a", "b"),
        )
