"""FID, KID and Inception Score against independent formulas, and what happens without them."""

from __future__ import annotations

import hashlib
import json
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import feature_extractor_inceptionv3 as inceptionv3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from fed_diffusion.config import build_config
from fed_diffusion.config.schema import Config, ConfigError, EvaluationConfig
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation import extractors, quality
from fed_diffusion.evaluation.features import CLASSIFIER, fingerprint, trained_classifier
from fed_diffusion.evaluation.quality import check_evaluation, evaluate, fid_floor, no_quality

OWN = EvaluationConfig(extractor="classifier")
INCEPTION = EvaluationConfig(extractor="inception")
KEYS = {
    *("fid", "fid_floor", "inception_score", "kid", "precision", "recall", "intervals"),
    *("memorisation", "samples", "reference", "split", "extractor", "extractor_sha256"),
    *("extractor_because", "others"),
    *("sampler", "guidance", "nfe", "seed", "why"),
}


class InMemory(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def noisy(digits: ImageSet) -> Tensor:
    """600 digits under noise: worse than real ones, better than nothing."""
    generator = torch.Generator().manual_seed(0)
    chosen = digits.images[torch.randperm(1797, generator=generator)[:600]].float()
    noise = torch.randn(chosen.shape, generator=generator)
    return (chosen + 40 * noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def figures(digits: ImageSet, noisy: Tensor) -> dict[str, Any]:
    return evaluate(noisy, digits, OWN, seed=0, nfe=300)


@pytest.fixture
def inception_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Random weights in the file format of the real ones; FID on 64 of the features, for time."""
    monkeypatch.setitem(extractors.LAYERS, extractors.INCEPTION, ("64", "logits_unbiased"))
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inceptionv3.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = inceptionv3.FeatureExtractorInceptionV3("random", ["64"])
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def features(images: Tensor, reference: ImageSet) -> np.ndarray:
    classifier = trained_classifier(fingerprint(reference), 0)
    found: np.ndarray = classifier.features(images.float() / 127.5 - 1).double().numpy()
    return found


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), through a matrix square root."""
    mean = a.mean(0) - b.mean(0)
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    root = np.real(scipy.linalg.sqrtm(s_a @ s_b))
    return float(mean @ mean + np.trace(s_a + s_b - 2 * root))


def test_fid_is_the_frechet_distance_of_the_features(
    digits: ImageSet, noisy: Tensor, figures: dict[str, Any]
) -> None:
    expected = frechet(features(noisy, digits), features(digits.images, digits))
    assert figures["fid"] == pytest.approx(expected, rel=1e-4)


def test_kid_is_the_squared_mmd_of_a_cubic_kernel(
    digits: ImageSet, noisy: Tensor, figures: dict[str, Any]
) -> None:
    x, y = features(noisy, digits), features(digits.images, digits)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a @ b.T / 64 + 1) ** 3)

    def off_diagonal_mean(k: np.ndarray) -> float:
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    expected = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
    expected -= 2 * float(kernel(x, y).mean())
    assert figures["kid"] == pytest.approx(expected, rel=0.1)  # the mean over 100 random subsets


def test_the_figures_are_those_of_torch_fidelitys_calculate_metrics(
    digits: ImageSet, noisy: Tensor, figures: dict[str, Any]
) -> None:
    expected = torch_fidelity.calculate_metrics(
        input1=InMemory(noisy),
        input2=InMemory(digits.images),
        feature_extractor=CLASSIFIER,
        classifier=trained_classifier(fingerprint(digits), 0),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=300,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert figures["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert figures["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert figures["inception_score"] == pytest.approx(
        [expected["inception_score_mean"], expected["inception_score_std"]], rel=1e-6
    )
    assert figures["precision"] == pytest.approx(expected["precision"])
    assert figures["recall"] == pytest.approx(expected["recall"])
    assert 0 < expected["recall"] < 1


def test_real_images_against_themselves_score_near_the_floor(digits: ImageSet) -> None:
    order = np.random.default_rng(0).permutation(1797)
    half, other = digits.subset(order[:898]), digits.subset(order[898:])
    found = evaluate(half.images, other, OWN, seed=0, nfe=0)
    # trained on one half only, the features know it a little better than the other
    assert 0.3 * found["fid_floor"] < found["fid"] < 3 * found["fid_floor"]


def test_worse_images_score_worse(digits: ImageSet, figures: dict[str, Any]) -> None:
    static = torch.randint(0, 256, (600, 1, 8, 8), dtype=torch.uint8)
    worst = evaluate(static, digits, OWN, seed=0, nfe=0)
    assert figures["fid_floor"] < figures["fid"] < worst["fid"]
    assert figures["kid"] < worst["kid"]
    assert 10 >= figures["inception_score"][0] > worst["inception_score"][0] >= 1


def test_the_floor_is_the_mean_of_ten_splits_with_as_many_images_a_side_as_were_generated(
    digits: ImageSet, figures: dict[str, Any]
) -> None:
    real = features(digits.images, digits)
    rng = np.random.default_rng(0)
    splits = []
    for _ in range(10):
        order = rng.permutation(1797)
        splits.append(frechet(real[order[:600]], real[order[600:1200]]))
    assert figures["fid_floor"] == pytest.approx(np.mean(splits), rel=0.25)


def test_more_images_than_half_the_reference_are_held_to_the_floor_of_its_halves(
    digits: ImageSet,
) -> None:
    small = digits.subset(range(200))
    many = evaluate(digits.images[:300], small, OWN, seed=0, nfe=0)
    half = evaluate(digits.images[:100], small, OWN, seed=0, nfe=0)
    assert many["fid_floor"] == half["fid_floor"] > 0


def test_the_floor_depends_on_the_seed_alone(digits: ImageSet) -> None:
    real = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    assert fid_floor(real, 40, seed=1) == fid_floor(real, 40, seed=1)
    assert fid_floor(real, 40, seed=1) != fid_floor(real, 40, seed=2)


@pytest.mark.parametrize(("n", "m"), [(300, 500), (500, 300), (20, 500), (500, 20), (20, 30)])
def test_the_fast_frechet_distance_is_torch_fidelitys(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n)
    mix = torch.randn(64, 64, generator=generator)
    a = (torch.randn(n, 64, generator=generator) @ mix).relu()
    b = (torch.randn(m, 64, generator=generator) @ mix + 0.3).relu()
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), False
    )
    found = quality.frechet_distance(a, b)
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)


def test_all_that_a_figure_depends_on_stands_beside_it(figures: dict[str, Any]) -> None:
    assert set(figures) == KEYS
    names = ("samples", "reference", "split", "extractor", "sampler", "guidance", "nfe", "seed")
    stated = {name: figures[name] for name in names}
    assert stated == {
        "samples": 600,
        "split": "data",
        "reference": "digits (1797 images)",
        "extractor": "classifier(digits, 64 features)",
        "sampler": "exponential_integrator",
        "guidance": 0.0,
        "nfe": 300,
        "seed": 0,
    }
    assert figures["why"] is None
    assert json.loads(json.dumps(figures)) == figures


def test_the_hash_is_of_the_weights_that_saw_the_images(
    digits: ImageSet, figures: dict[str, Any]
) -> None:
    state = trained_classifier(fingerprint(digits), 0).state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {list(state[name].shape)}\n".encode())
        digest.update(state[name].numpy().tobytes())
    assert figures["extractor_sha256"] == digest.hexdigest()


def test_no_quality_has_the_same_keys_and_the_reason() -> None:
    found = no_quality("evaluation.reference = none", samples=64, nfe=300)
    assert set(found) == KEYS
    assert found["fid"] is found["kid"] is found["inception_score"] is found["fid_floor"] is None
    assert (found["why"], found["samples"]) == ("evaluation.reference = none", 64)


def test_the_same_seed_gives_the_same_figures(
    digits: ImageSet, noisy: Tensor, figures: dict[str, Any]
) -> None:
    quality._judge.cache_clear()
    assert evaluate(noisy, digits, OWN, seed=0, nfe=300) == figures


def test_evaluation_says_nothing(
    digits: ImageSet, noisy: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(noisy[:50], digits, OWN, seed=0, nfe=0)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("n", [2, 3, 15])
def test_a_handful_of_images_has_figures(digits: ImageSet, n: int) -> None:
    found = evaluate(digits.images[:n], digits, OWN, seed=0, nfe=0)
    values = [found["fid"], found["fid_floor"], found["kid"], *found["inception_score"]]
    assert bool(np.isfinite(values).all())


@pytest.mark.parametrize(("generated", "real"), [(1, 100), (0, 100), (10, 3)])
def test_too_few_images_have_a_reason_in_place_of_figures(
    digits: ImageSet, generated: int, real: int
) -> None:
    found = evaluate(digits.images[:generated], digits.subset(range(real)), OWN, seed=0, nfe=0)
    assert found["fid"] is None
    assert "images" in found["why"]


def test_unlabelled_reference_images_have_a_reason_in_place_of_figures(digits: ImageSet) -> None:
    bare = ImageSet(digits.images, name="mine")
    found = evaluate(digits.images[:10], bare, OWN, seed=0, nfe=0)
    assert found["fid"] is None
    assert "labels" in found["why"]


def test_a_classifier_compares_no_images_of_two_shapes(digits: ImageSet) -> None:
    larger = digits.images[:10].repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = evaluate(larger, digits, OWN, seed=0, nfe=0)
    assert found["fid"] is None
    assert "[1, 16, 16]" in found["why"]


def test_float_images_are_refused(digits: ImageSet) -> None:
    with pytest.raises(TypeError, match="uint8"):
        evaluate(digits.images.float() / 255, digits, OWN, seed=0, nfe=0)


def test_inception_gets_grey_images_as_three_equal_channels(
    digits: ImageSet, inception_weights: str
) -> None:
    config = EvaluationConfig(extractor="inception", weights=inception_weights)
    few = digits.subset(range(4))
    found = evaluate(digits.images[4:6], few, config, seed=0, nfe=1)
    assert found["extractor"] == "inception-v3-compat"
    assert found["fid"] > 0
    judge = quality._judge(fingerprint(few), extractors.extractor_of(config, few, 0), "cpu")
    colour = judge.seen(few.images[:1].expand(1, 3, 8, 8))[0]
    torch.testing.assert_close(colour[0], judge.real[0])


def test_inceptions_features_of_a_reference_set_stay_on_disk(
    digits: ImageSet, inception_weights: str, cache: Path
) -> None:
    config = EvaluationConfig(weights=inception_weights)
    few = digits.subset(range(4))
    first = evaluate(digits.images[4:6], few, config, seed=0, nfe=1)
    (path,) = cache.iterdir()
    before = path.stat().st_mtime_ns
    assert first["extractor_sha256"] in path.name
    quality._judge.cache_clear()
    assert evaluate(digits.images[4:6], few, config, seed=0, nfe=1) == first
    assert path.stat().st_mtime_ns == before


def test_without_a_network_inception_has_a_reason_in_place_of_figures(
    digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(inceptionv3, "load_state_dict_from_url", offline)
    found = evaluate(digits.images[:10], digits, INCEPTION, seed=0, nfe=5)
    assert set(found) == KEYS
    assert found["fid"] is None
    assert "no route to host" in found["why"]
    assert "evaluation.weights=FILE" in found["why"]


def test_weights_that_do_not_exist_are_refused(digits: ImageSet, tmp_path: Path) -> None:
    config = EvaluationConfig(weights=str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match=r"evaluation\.weights = .*none\.pth.*does not exist"):
        evaluate(digits.images[:10], digits, config, seed=0, nfe=0)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_weights_with_code_in_them_are_refused_and_not_run(tmp_path: Path) -> None:
    touched, weights = tmp_path / "touched", tmp_path / "weights.pth"
    weights.write_bytes(pickle.dumps(Malicious(touched), protocol=2))
    with pytest.raises(ConfigError, match=r"evaluation\.weights"):
        check_evaluation(settings(weights=str(weights)))
    assert not touched.exists()


def settings(data: dict[str, Any] | None = None, **evaluation: Any) -> Config:
    return build_config({"data": data or {}, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (settings(reference="no/such/folder"), "evaluation.reference"),
        (settings(reference="Data"), "evaluation.reference"),
        (settings(weights="no/such/file"), "evaluation.weights"),
        (settings(weights=__file__), "evaluation.weights"),
        (settings(extractor="classifier", weights="no/such/file"), "evaluation.weights"),
        (settings(extractor="classifier", weights=__file__), "evaluation.weights"),
        (settings(samples=1), "evaluation.samples"),
        (
            settings({"name": "image_folder", "size": 8, "channels": 1}, extractor="classifier"),
            "evaluation.extractor",
        ),
    ],
)
def test_an_evaluation_bound_to_fail_is_refused_before_training(config: Config, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_evaluation(config)


def test_a_reference_folder_needs_a_folder_per_class_for_a_classifier(tmp_path: Path) -> None:
    config = settings(reference=str(tmp_path), extractor="classifier")
    with pytest.raises(ConfigError, match="sub-folder per class"):
        check_evaluation(config)
    (tmp_path / "cats").mkdir()
    (tmp_path / "dogs").mkdir()
    check_evaluation(config)


@pytest.mark.parametrize(
    "config",
    [
        settings(),
        settings(extractor="classifier"),
        settings(reference="none", weights="no/such/file"),
        settings(samples=0, reference="no/such/folder"),
        settings(reference="train"),
        settings(reference="test"),
        settings(reference=str(Path(__file__).parent)),
    ],
)
def test_an_evaluation_that_can_work_is_accepted(config: Config) -> None:
    check_evaluation(config)
