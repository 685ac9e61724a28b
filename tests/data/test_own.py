"""A node's own images: checked against the run before training, and all of them one client's."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data import load_own
from fed_diffusion.experiment import Experiment
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.tiny import TINY


def save(folder, images, labels=None):
    """Images [n, C, H, W], grey or RGB, as PNG files, in folders by class if there are labels."""
    for i, image in enumerate(images):
        target = folder / (str(int(labels[i])) if labels is not None else ".") / f"{i:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(target)
    return folder


def config(**overrides):
    settings = {"data.partition": "iid", "clients": 3, "rounds": 2, "evaluation.every": 0}
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("digits", TINY | settings | given)


def own_of(config, folder, name):
    return load_own(config.data, config.model.conditional, folder, name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three nodes' folders: 20 digits, 12 digits, and 5 images of another size."""
    from fed_diffusion.data import load_dataset

    digits, root = load_dataset(config().data), tmp_path_factory.mktemp("nodes")
    save(root / "a", digits.images[:20])
    save(root / "b", digits.images[20:32])
    save(root / "wrong", torch.zeros((5, 1, 12, 12), dtype=torch.uint8))
    save(root / "labelled", digits.images[:20], digits.labels[:20])
    return root


def test_all_of_a_nodes_own_images_are_its_clients_whichever_number_it_has(folders):
    own = own_of(config(), str(folders / "a"), None)
    worker = Worker(config(), own, own=True)
    for client in (0, 2):
        assert sorted(np.concatenate(worker.images.of(client))) == list(range(20))
    tasks = [task for task in Experiment(config(), folders / "run").tasks(1) if task.client != 1]
    one, two = (worker.run(task) for task in tasks)
    name = next(iter(one.payload.arrays))
    assert one.payload.arrays[name] != two.payload.arrays[name]  # other randomness, same images
    train, _ = worker.images.of(0)
    assert one.payload.numbers["examples"] == len(train) == 18


def test_a_named_set_of_a_nodes_own_is_used_whole(folders):
    assert len(own_of(config(), None, "digits")) == 1797


@pytest.mark.parametrize(
    ("folder", "name", "says"),
    [
        ("wrong", None, "5 images of 5 that cannot be used"),
        ("absent", None, "does not exist"),
        (".", "cifar10", "contradicts data.name = 'cifar10'"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_what_is_wrong(folders, folder, name, says):
    with pytest.raises(ConfigError, match="own data do not fit") as caught:
        own_of(config(), str(folders / folder), name)
    assert says in str(caught.value)
    assert "1 x 8 x 8" in str(caught.value)


def test_a_conditional_run_needs_every_class_folder_be_it_empty(folders, tmp_path):
    settings = config(model__conditional=True)
    with pytest.raises(ConfigError, match=r"no class folders, but data\.classes = 10"):
        own_of(settings, str(folders / "a"), None)
    here = tmp_path / "two-classes"
    for label in range(10):
        (here / str(label)).mkdir(parents=True)
    source = folders / "labelled"
    for label in ("3", "7"):
        for file in (source / label).iterdir():
            (here / label / file.name).write_bytes(file.read_bytes())
    labels = own_of(settings, str(here), None).labels
    assert set(labels.tolist()) == {3, 7}


def test_a_node_has_folders_of_some_of_the_runs_classes_and_of_no_others(folders, tmp_path):
    """Without their names, a node with 3 and 7 alone would call them 0 and 1."""
    names = [str(label) for label in range(10)]
    settings = config(model__conditional=True, data__class_names=names)
    source = folders / "labelled"
    for label in ("3", "7"):
        shutil.copytree(source / label, tmp_path / label)
    found = own_of(settings, str(tmp_path), None)
    assert set(found.labels.tolist()) == {3, 7}
    assert found.class_names == tuple(names)
    shutil.copytree(source / "1", tmp_path / "one")
    with pytest.raises(ConfigError, match=r"'one', which is not in data\.class_names"):
        own_of(settings, str(tmp_path), None)
    with pytest.raises(ConfigError, match="no class folder '0'"):
        own_of(settings, str(folders / "a"), None)


def test_a_nodes_class_folder_that_holds_only_what_is_not_read_is_not_empty(folders, tmp_path):
    for label in range(10):
        shutil.copytree(folders / "labelled" / str(label), tmp_path / str(label))
    for file in (tmp_path / "3").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(
        ConfigError, match=r"class folder '3' with no image in it \(but \d \.heic\)"
    ):
        own_of(config(model__conditional=True), str(tmp_path), None)


def test_a_node_says_in_its_log_what_it_does_not_read(folders, tmp_path, caplog):
    shutil.copytree(folders / "a", tmp_path / "a")
    (tmp_path / "a" / "b.heic").write_text("")
    own_of(config(), str(tmp_path / "a"), None)
    assert "1 file beside the 20 images that were not read: 1 .heic" in caplog.text


def node(folder, partition, of=3):
    return {"data-dir": str(folder), "partition-id": partition, "num-partitions": of}


def test_nodes_train_on_their_own_folders_and_one_that_does_not_fit_is_named(folders, tmp_path):
    grid = LocalGrid([node(folders / "a", 0), node(folders / "b", 1), node(folders / "wrong", 2)])
    experiment = Experiment(config(), tmp_path / "run")
    FedDiffusion(experiment).run(grid)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len(lines) == 2
    for line in lines:
        assert [client["client"] for client in line["clients"]] == [0, 1]
        (refusal,) = line["rejected"]
        assert (refusal["client"], refusal["node"]) == (2, "102")
        assert "0000.png is 12x12 pixels" in refusal["reason"]
        assert line["dense_bytes"] == 2 * 4 * experiment.coordinator.parameters  # 2 was sent none


def test_a_mended_node_that_comes_back_is_asked_again(folders, tmp_path):
    grid = LocalGrid([node(folders / "a", 0, 2), node(folders / "wrong", 1, 2)])
    strategy = FedDiffusion(Experiment(config(clients=2), tmp_path / "run"))
    nodes = strategy._meet(grid)
    assert (nodes.host_of(0).node, nodes.host_of(1)) == (100, None)
    grid.online.remove(101)
    nodes.refresh()
    grid.nodes[101].node_config["data-dir"] = str(folders / "b")
    grid.online.add(101)
    nodes.refresh()
    assert nodes.host_of(1).node == 101
    assert list(nodes.refusals([0, 1])) == []


def test_a_node_with_its_own_data_is_one_client(folders, tmp_path):
    grid = LocalGrid([node(folders / "a", 0, 2), node(folders / "b", 1, 2)])
    strategy = FedDiffusion(Experiment(config(clients=4), tmp_path / "run"))
    with pytest.raises(RuntimeError, match="num-partitions=4, as many as clients = 4"):
        strategy._meet(grid)
