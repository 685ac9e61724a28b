"""The classifier that is trained once by a command and kept in a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fed_diffusion.cli.main import main
from fed_diffusion.config import build_config
from fed_diffusion.config.schema import Config, ConfigError, EvaluationConfig
from fed_diffusion.data.datasets import ImageSet, to_unit
from fed_diffusion.evaluation.checks import check_evaluation
from fed_diffusion.evaluation.features import weights_hash
from fed_diffusion.evaluation.quality import evaluate
from fed_diffusion.evaluation.trained import ResNet, load_features, save_features, shifted
from fed_diffusion.evaluation.weights import KEY


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the digits, trained by the command."""
    path = tmp_path_factory.mktemp("features") / "digits.safetensors"
    assert main(["features", "train", "digits", "--epochs", "3", "--out", str(path)]) == 0
    return path


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        found: dict[str, Any] = json.loads(opened.metadata()[KEY])
    return found


def own(path: Path) -> EvaluationConfig:
    return EvaluationConfig(extractor="classifier", weights=str(path))


def test_the_file_says_what_the_classifier_is_of_and_how_good(file: Path, digits: ImageSet) -> None:
    header = header_of(file)
    assert header["accuracy"] > 0.9
    stated = {name: header[name] for name in ("dataset", "images", "channels", "size", "classes")}
    assert stated == {
        "dataset": "digits",
        "images": 1797 - 179,
        "channels": 1,
        "size": 8,
        "classes": 10,
    }
    assert header["held_out"] == "179 images set aside"
    network, read = load_features(str(file), (1, 8, 8))
    assert read.to_dict() == header
    assert digits.labels is not None
    hits = network(to_unit(digits.images)).argmax(1) == digits.labels
    assert hits.double().mean() > 0.9


def test_the_same_seed_writes_the_same_weights(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    command = ["features", "train", "digits", "--epochs", "3", "--out"]
    assert main([*command, str(again)]) == 0
    assert header_of(again) == header_of(file)


def test_figures_made_with_it_carry_its_hash_and_need_no_labels(
    file: Path, digits: ImageSet, cache: Path
) -> None:
    reference = ImageSet(digits.images, name="mine")
    found = evaluate(digits.images[:100], reference, own(file), seed=0, nfe=1)
    sha = header_of(file)["sha256"]
    assert found["extractor_sha256"] == sha
    assert found["extractor"] == f"classifier(digits, 96 features, sha256 {sha[:12]})"
    assert found["fid"] > 0
    other_seed = evaluate(digits.images[:100], reference, own(file), seed=1, nfe=1)
    assert other_seed["fid"] == found["fid"]
    assert len(list(cache.iterdir())) == 1


def test_weights_of_another_hash_are_refused(file: Path, tmp_path: Path) -> None:
    tensors, path = load_file(file), tmp_path / "changed.safetensors"
    tensors["logits.bias"] += 1
    save_file(tensors, path, {KEY: json.dumps(header_of(file))})
    with pytest.raises(ConfigError, match=r"evaluation\.weights.*hash"):
        load_features(str(path), (1, 8, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_a_classifier_that_sees_no_finite_values_has_a_reason_in_place_of_figures(
    file: Path, tmp_path: Path, digits: ImageSet, cache: Path, value: float
) -> None:
    network, header = load_features(str(file), (1, 8, 8))
    with torch.no_grad():
        network.logits.bias[3] = value
    path = tmp_path / "broken.safetensors"
    save_features(path, network, replace(header, sha256=weights_hash(network)))
    found = evaluate(digits.images[:20], digits, own(path), seed=0, nfe=1)
    assert found["fid"] is found["intervals"] is None
    assert "not finite" in found["why"]
    assert not cache.exists()


def test_a_header_that_does_not_fit_its_tensors_is_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(load_file(file), path, {KEY: json.dumps({**header_of(file), "classes": 7})})
    with pytest.raises(ConfigError, match=r"evaluation\.weights.*does not fit"):
        load_features(str(path), (1, 8, 8))


@pytest.mark.parametrize("header", [None, "no JSON", '{"dataset": "digits"}', "[1]"])
def test_tensors_without_a_header_are_refused(header: str | None, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file({"a": torch.zeros(1)}, path, None if header is None else {KEY: header})
    with pytest.raises(ConfigError, match="not a file of a trained classifier"):
        check_evaluation(settings(path))


def settings(path: Path, **data: Any) -> Config:
    evaluation = {"extractor": "classifier", "weights": str(path)}
    return build_config({"data": data, "evaluation": evaluation})


def test_a_classifier_of_images_of_another_shape_is_refused_before_training(file: Path) -> None:
    check_evaluation(settings(file))
    with pytest.raises(ConfigError, match=r"\[1, 8, 8\], and the run's images are \[3, 32, 32\]"):
        check_evaluation(settings(file, name="cifar10"))


def test_a_trained_classifier_serves_a_set_whose_classes_are_unknown(file: Path) -> None:
    check_evaluation(settings(file, name="image_folder", dir=".", size=8, channels=1))


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_the_network_sees_images_of_any_size(size: int) -> None:
    network = ResNet(3, size, 5).eval()
    x = torch.zeros(2, 3, size, size)
    assert network.layers(x).shape[1] == 96
    assert max(network.layers(x).shape[2:]) <= 4
    assert network(x).shape == (2, 5)


def test_at_32_pixels_it_has_a_few_hundred_thousand_parameters() -> None:
    assert sum(p.numel() for p in ResNet(3, 32, 10).parameters()) == 339_010


def test_shifts_move_each_image_by_itself_and_lose_nothing_else() -> None:
    images = torch.zeros(200, 2, 7, 7, dtype=torch.uint8)
    images[:, :, 3, 3] = torch.arange(1, 201, dtype=torch.uint8)[:, None]
    moved = shifted(images, 2, False, torch.Generator().manual_seed(0))
    assert torch.equal(moved.amax(dim=(2, 3)), images.amax(dim=(2, 3)))
    assert int((moved > 0).sum()) == 400
    places = {tuple((image[0] > 0).nonzero()[0].tolist()) for image in moved}
    assert places == {(row, column) for row in range(1, 6) for column in range(1, 6)}


def test_mirroring_leaves_half_the_images_as_they_are() -> None:
    images = torch.arange(4, dtype=torch.uint8).repeat(400, 1, 4, 1)
    found: Tensor = shifted(images, 0, True, torch.Generator().manual_seed(0))
    same = (found == images).flatten(1).all(1)
    turned = (found == images.flip(-1)).flatten(1).all(1)
    assert bool((same ^ turned).all())
    assert 150 < int(same.sum()) < 250


def test_a_folder_of_images_trains_a_classifier(tmp_path: Path, digits: ImageSet) -> None:
    assert digits.labels is not None
    for i in range(60):
        folder = tmp_path / "real" / str(int(digits.labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(folder / f"{i}.png")
    out = tmp_path / "f.safetensors"
    command = ["features", "train", "image_folder", "--data-dir", str(tmp_path / "real")]
    sizes = ["--size", "8", "--channels", "1", "--flip", "--epochs", "1"]
    assert main([*command, *sizes, "--out", str(out)]) == 0
    assert header_of(out)["images"] == 54


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["digits", "--epochs", "0", "--out", "x.safetensors"], "--epochs = 0"),
        (["digits", "--out", "no/such/folder/x.safetensors"], "--out"),
        (["digits", "--out", "x.pt"], "--out"),
        (["digit", "--out", "x.safetensors"], "data.name = 'digit'"),
        (["image_folder", "--out", "x.safetensors"], "data.size"),
        (["digits", "--seed", "-1", "--out", "x.safetensors"], "seed = -1"),
        (["digits", "--device", "gpu", "--out", "x.safetensors"], "worker.device"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["features", "train", *arguments]) == 2
    assert named in capfd.readouterr().err
