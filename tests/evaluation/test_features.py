"""The classifier behind the default quality figures, and how torch-fidelity sees it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.data.datasets import ImageSet, load_dataset, to_unit
from fed_diffusion.evaluation.features import (
    CLASSIFIER,
    FEATURES,
    Classifier,
    ClassifierFeatures,
    fingerprint,
    train_classifier,
    trained_classifier,
)


@pytest.fixture(scope="module")
def few(digits: ImageSet) -> ImageSet:
    return digits.subset(range(150))


def extractor(classifier: Classifier, *layers: str) -> ClassifierFeatures:
    return ClassifierFeatures(CLASSIFIER, list(layers), classifier=classifier)


def test_the_classifier_tells_the_digits_apart(digits: ImageSet) -> None:
    assert digits.labels is not None
    classifier = trained_classifier(fingerprint(digits), seed=0)
    accuracy = (classifier(to_unit(digits.images)).argmax(1) == digits.labels).double().mean()
    assert accuracy > 0.97


def test_what_it_learns_holds_for_digits_it_has_not_seen(digits: ImageSet) -> None:
    assert digits.labels is not None
    classifier = train_classifier(digits.subset(range(0, 1797, 2)), seed=0, epochs=6)
    unseen = digits.subset(range(1, 1797, 2))
    assert unseen.labels is not None
    accuracy = (classifier(to_unit(unseen.images)).argmax(1) == unseen.labels).double().mean()
    assert accuracy > 0.94


def test_the_same_seed_trains_the_same_classifier(few: ImageSet) -> None:
    once, again = (train_classifier(few, seed=3, epochs=2).state_dict() for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_another_seed_trains_another_classifier(few: ImageSet) -> None:
    one, other = (train_classifier(few, seed=seed, epochs=1).logits.weight for seed in (1, 2))
    assert not torch.equal(one, other)


def test_training_neither_reads_nor_moves_the_global_generator(few: ImageSet) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = train_classifier(few, seed=0, epochs=1).logits.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(train_classifier(few, seed=0, epochs=1).logits.weight, one)


def test_a_set_of_the_same_content_is_not_trained_on_twice(digits: ImageSet) -> None:
    same = load_dataset(DataConfig(name="digits"))
    first = trained_classifier(fingerprint(digits), seed=0)
    assert trained_classifier(fingerprint(same), seed=0) is first


@pytest.mark.parametrize("changed", ["pixel", "label", "no labels", "shape"])
def test_a_set_of_other_content_has_another_fingerprint(few: ImageSet, changed: str) -> None:
    assert few.labels is not None
    images, labels = few.images.clone(), few.labels.clone()
    if changed == "pixel":
        images[7, 0, 3, 3] += 1
    elif changed == "label":
        labels[7] = (labels[7] + 1) % 10
    elif changed == "shape":
        images = images.reshape(150, 1, 4, 16)
    other = ImageSet(images, None if changed == "no labels" else labels)
    assert fingerprint(other) != fingerprint(few)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 13, 28, 32, 64])
def test_images_of_any_size_have_64_features(size: int, channels: int) -> None:
    labels = torch.arange(10) % 3
    images = torch.randint(0, 256, (10, channels, size, size), dtype=torch.uint8)
    classifier = train_classifier(ImageSet(images, labels), seed=0, epochs=1)
    features, logits = extractor(classifier, "64", "logits")(images)
    assert features.shape == (10, FEATURES)
    assert logits.shape == (10, 3)
    assert bool(features.isfinite().all())


def test_features_come_in_the_order_they_were_asked_for(few: ImageSet) -> None:
    classifier = train_classifier(few, seed=0, epochs=1)
    logits, features = extractor(classifier, "logits", "64")(few.images)
    assert torch.equal(classifier.logits(features), logits)


def test_an_images_features_do_not_depend_on_its_batch(few: ImageSet) -> None:
    classifier = train_classifier(few, seed=0, epochs=1)
    (together,) = extractor(classifier, "64")(few.images)
    (alone,) = extractor(classifier, "64")(few.images[5:6])
    torch.testing.assert_close(alone[0], together[5])


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(4, 1, 8, 8),
        torch.rand(4, 1, 8, 8, dtype=torch.float64) * 255,
        torch.zeros(4, 1, 8, 8, dtype=torch.int64),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
        torch.zeros(4, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(4, 1, 8, 8, dtype=torch.uint8).numpy(),
    ],
    ids=["unit floats", "doubles", "int64", "no channels", "two channels", "array"],
)
def test_whatever_is_not_uint8_images_is_refused(images: object) -> None:
    classifier = Classifier(channels=1, size=8, classes=10)
    with pytest.raises(TypeError, match="uint8"):
        extractor(classifier, "64")(images)


def test_images_without_labels_train_no_classifier(few: ImageSet) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.extractor = classifier needs labels"):
        train_classifier(ImageSet(few.images, name="mine"), seed=0)


def test_a_single_class_trains_no_classifier(few: ImageSet) -> None:
    with pytest.raises(ConfigError, match="two classes"):
        train_classifier(ImageSet(few.images, torch.zeros(150, dtype=torch.int64)), seed=0)


def test_checking_a_config_does_not_import_torch_fidelity() -> None:
    code = "import sys, fed_diffusion.evaluation; sys.exit('torch_fidelity' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
