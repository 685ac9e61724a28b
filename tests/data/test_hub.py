"""Data sets of the package datasets from local files, and Flower's partitioners; no network."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from fed_diffusion.build import Setup
from fed_diffusion.checks import check
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data import content_hash, flower, hub, load_dataset, partition
from fed_diffusion.engines.local import simulate
from fed_diffusion.evaluation.reference import reference_set
from fed_diffusion.store.rundir import RunDir
from tests.tiny import TINY

NAMES = ["bird", "ant", "cat"]


def needs(package):
    """Marks of a test that needs a package of the extra hf."""

    def marked(test):
        missing = importlib.util.find_spec(package) is None
        return pytest.mark.models(pytest.mark.skipif(missing, reason=f"needs {package}")(test))

    return marked


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def pixels(n=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def table(n=30, seed=0, label=None, names=NAMES):
    """A set with the columns image and label, whose images lie in it as PNG."""
    import datasets

    files = [{"bytes": png(image), "path": None} for image in pixels(n, seed)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    rows = {"image": files, "label": label or [i % 3 for i in range(n)]}
    return datasets.Dataset.from_dict(rows, datasets.Features(kinds))


def config(path, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    settings = {"data.name": f"hf:{path}", "data.size": 8, "data.channels": 1}
    return load_config("digits", TINY | settings | dotted)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (hub, {"data.name": "hf:ylecun/mnist"}, "data.name = 'hf:ylecun/mnist' needs .* datasets"),
        (
            flower,
            {"data.partition": "flwr_datasets.partitioner:IidPartitioner"},
            "needs the package flwr-datasets",
        ),
    ],
)
def test_without_the_package_the_message_has_the_command(monkeypatch, module, changes, message):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    settings = {"data.size": 8, "data.channels": 1} if "data.name" in changes else {}
    with pytest.raises(ConfigError, match=rf"{message}.*pip install 'fed-diffusion\[hf\]'"):
        check(load_config("digits", TINY | settings | changes))


def test_options_without_a_part_that_takes_them_are_refused(digits):
    options = {"data.partition_options": {"alpha": 1}}
    with pytest.raises(ConfigError, match="for one of Flower's partitioners, not for iid"):
        load_config("digits", TINY | options | {"data.partition": "iid"})
    own = load_config(
        "digits", TINY | options | {"data.partition": "examples.own_split:by_brightness"}
    )
    with pytest.raises(ConfigError, match="is a function of yours, which takes none"):
        partition(digits, own.data, 5, 0)


@needs("datasets")
@pytest.mark.parametrize("form", ["file", "folder", "saved", "saved splits"])
def test_parquet_and_saved_sets_have_the_images_labels_and_names_that_were_written(form, tmp_path):
    import datasets

    made, path = table(), tmp_path / "mine"
    if form in ("file", "folder"):
        path.mkdir()
        made.to_parquet(path / "train.parquet")
        path = path / "train.parquet" if form == "file" else path
    elif form == "saved":
        made.save_to_disk(path)
    else:
        datasets.DatasetDict(train=made, test=table(6, 1)).save_to_disk(path)
    found = load_dataset(config(path).data)
    assert np.array_equal(found.images.numpy(), pixels()[:, None])
    assert found.labels.tolist() == [i % 3 for i in range(30)]
    assert found.class_names == tuple(NAMES)


@needs("datasets")
@pytest.mark.parametrize(
    ("column", "given", "expected"),
    [
        ("text", ["a bird", None, " an ant "], ("a bird", "", "an ant")),
        ("caption", [["a bird", "wings"], [], None], ("a bird", "", "")),
        ("text", [1, 2, 3], None),
        ("notes", ["a bird", "a cat", "an ant"], None),
    ],
)
def test_a_column_of_texts_has_the_captions(column, given, expected, tmp_path):
    made = table(3).add_column(column, given)
    made.to_parquet(tmp_path / "mine.parquet")
    assert load_dataset(config(tmp_path / "mine.parquet").data).captions == expected


@needs("datasets")
def test_a_folder_of_images_has_its_folders_as_classes(tmp_path):
    for i, image in enumerate(pixels(9)):
        place = tmp_path / "photos" / "train" / NAMES[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(image))
    found = load_dataset(config(tmp_path / "photos").data)
    assert found.class_names == ("ant", "bird", "cat")
    assert found.per_class() == {"ant": 3, "bird": 3, "cat": 3}
    known = {image.tobytes() for image in pixels(9)}
    assert {image.numpy().tobytes() for image in found.images} == known


@needs("datasets")
def test_a_test_split_is_the_reference_and_one_split_alone_has_none(tmp_path):
    import datasets

    datasets.DatasetDict(train=table(), test=table(6, 1)).save_to_disk(tmp_path / "two")
    two = Setup.of(config(tmp_path / "two", evaluation__reference="test"))
    images = reference_set(two, None).images.images
    assert np.array_equal(images.numpy(), pixels(6, 1)[:, None])
    table().save_to_disk(tmp_path / "one")
    one = Setup.of(config(tmp_path / "one", evaluation__reference="test", data__holdout=0.2))
    assert "held out" in reference_set(one, None).images.name


@needs("datasets")
def test_a_run_notes_the_names_of_the_classes_and_a_node_with_other_numbers_agrees(tmp_path):
    table().save_to_disk(tmp_path / "mine")
    simulate(
        config(tmp_path / "mine", clients=3, rounds=1, model__conditional=True, data__classes=3),
        tmp_path / "run",
        processes=1,
    )
    data = RunDir.open(tmp_path / "run").config().data
    assert data.class_names == tuple(NAMES)
    few = table(4, 2, label=["cat", "bird", "cat", "cat"], names=["cat", "bird"])
    few.save_to_disk(tmp_path / "few")
    own = data.model_copy(update={"name": f"hf:{tmp_path / 'few'}"})
    assert load_dataset(own, own=True).labels.tolist() == [2, 0, 2, 2]


@needs("datasets")
@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ({"label": [0, 1, 2]}, {"data__classes": 2}, "label 2, but data.classes = 2"),
        ({"label": [-1, 0, 0]}, {}, "labels must count from 0"),
        ({"other": [1.0, 2.0, 3.0]}, {"data__classes": 3}, "has no labels"),
        ({"label": [0, 1, 2]}, {"data__size": 9}, r"3 images of 3.*image 0 is 8x8 pixels"),
        ({"label": [0, None, None]}, {}, "column 'label' is empty in 2 rows"),
        ({"image": [None, {"bytes": b"", "path": None}, None]}, {}, "image 0 is missing"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(columns, changes, message, tmp_path):
    import datasets

    files = [{"bytes": png(image), "path": None} for image in pixels(3)]
    made = datasets.Dataset.from_dict({"image": files} | columns)
    made.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "mine")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_dataset(config(tmp_path / "mine", model__conditional=False, **changes).data)


@needs("datasets")
def test_nodes_that_would_number_their_classes_in_different_ways_are_refused(tmp_path):
    table(4, 2, label=["cat", "bird", "cat", "cat"], names=["cat", "bird"]).save_to_disk(tmp_path)
    data = config(tmp_path, data__classes=3).data
    with pytest.raises(ConfigError, match=r"has 2 classes \(cat, bird\).*Set data.class_names"):
        load_dataset(data, own=True)


@needs("datasets")
def test_a_set_without_images_and_a_name_that_is_nowhere_are_refused(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(ConfigError, match="no column of images; its columns are text"):
        load_dataset(config(tmp_path / "words").data)
    with pytest.raises(ConfigError, match=r"cannot be opened.*hf:ylecun/mnist"):
        load_dataset(config("nobody/nothing").data)
    with pytest.raises(ConfigError, match="cannot be opened"):
        load_dataset(config(tmp_path / "gone").data)


@needs("datasets")
def test_the_cache_of_decoded_images_is_used_again(tmp_path, monkeypatch):
    table().save_to_disk(tmp_path / "mine")
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path / "images"))
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "1")
    first = load_dataset(config(tmp_path / "mine").data)

    def never(*given):
        raise AssertionError("decoded again")

    monkeypatch.setattr(hub, "fitted", never)
    assert content_hash(load_dataset(config(tmp_path / "mine").data)) == content_hash(first)


@needs("flwr_datasets")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DirichletPartitioner", {"alpha": "0.5", "min_partition_size": 5}),
        ("IidPartitioner", {}),
        ("ShardPartitioner", {"num_shards_per_partition": 2}),
        ("PathologicalPartitioner", {"num_classes_per_partition": 2}),
    ],
)
def test_flowers_partitioners_split_the_images_alike_in_every_process(name, options, digits):
    settings = {"data.partition": f"flwr_datasets.partitioner:{name}"}
    settings |= {"data.partition_options": options}
    data = load_config("digits", TINY | settings).data
    parts, again = (partition(digits, data, 5, seed=3) for _ in range(2))
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))
    assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
    assert min(map(len, parts)) >= 5
    other = partition(digits, data, 5, seed=4)
    same = all(np.array_equal(one, two) for one, two in zip(parts, other, strict=True))
    assert same == (name == "IidPartitioner")


@needs("flwr_datasets")
def test_the_parts_are_those_of_the_partitioner_itself(digits):
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    settings = {"data.partition": "flwr_datasets.partitioner:DirichletPartitioner"}
    settings |= {"data.partition_options": {"alpha": 0.3, "seed": 11}}
    parts = partition(digits, load_config("digits", TINY | settings).data, 5, seed=0)
    theirs = DirichletPartitioner(num_partitions=5, partition_by="label", alpha=0.3, seed=11)
    labels = digits.labels.tolist()
    theirs.dataset = datasets.Dataset.from_dict({"label": labels, "i": list(range(len(labels)))})
    for client, part in enumerate(parts):
        assert part.tolist() == sorted(theirs.load_partition(client)["i"][:])


@needs("flwr_datasets")
def test_options_that_a_partitioner_refuses_are_named(digits):
    settings = {"data.partition": "flwr_datasets.partitioner:DirichletPartitioner"}
    settings |= {"data.partition_options": {"beta": 1}}
    with pytest.raises(ConfigError, match=r"data\.partition = 'flwr_datasets.*beta"):
        partition(digits, load_config("digits", TINY | settings).data, 5, seed=0)
