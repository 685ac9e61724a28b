"""The public judges: what they see, which files they take, and that they see what people see."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from fed_diffusion.config.schema import ConfigError, EvaluationConfig
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation import quality
from fed_diffusion.evaluation.judge import Judge, look
from fed_diffusion.evaluation.public import EfficientNetLite0, ResNet56Cifar10
from fed_diffusion.evaluation.quality import evaluate, fid_floor, frechet_distance
from fed_diffusion.evaluation.resnet56 import ResNet56

CPU = torch.device("cpu")
EACH = 24
"""Images of each set that EfficientNet sees, at 30 to 70 ms for each of them."""
TORCH_FIDELITYS = "tests-judge"


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the form of the published file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ResNet56()
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 2.0)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "resnet56.th"
    torch.save({"state_dict": state, "best_prec1": 93.39}, path)
    return path


def settings(file: Path | None = None) -> EvaluationConfig:
    return EvaluationConfig(
        extractor="resnet56_cifar10", weights=None if file is None else str(file)
    )


@pytest.fixture(scope="module")
def resnet(resnet_file: Path) -> ResNet56Cifar10:
    return ResNet56Cifar10(settings(resnet_file), CPU)


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0:
    return EfficientNetLite0(EvaluationConfig(extractor="efficientnet_lite0"), CPU)


def coloured(n: int, side: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, side, side), generator=draw, dtype=torch.uint8)


def test_the_resnet_has_56_layers_and_as_many_parameters_as_its_paper_says() -> None:
    network = ResNet56()
    weighted = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == 56
    # of 0.85 million, by hand: a stage of width w has 9 w^2 a convolution and 2 w a batch norm
    stages = sum(9 * w * w * 18 - (9 * w * w // 2 if w > 16 else 0) + 36 * w for w in (16, 32, 64))
    count = sum(p.numel() for p in network.parameters())
    assert count == 27 * 16 + 32 + stages + 650 == 853_018


def test_the_resnet_computes_what_its_paper_says(
    resnet: ResNet56Cifar10, resnet_file: Path
) -> None:
    """Section 4.2 with option A, from the file's tensors and torch's functions alone."""
    state = torch.load(resnet_file, weights_only=True)["state_dict"]

    def tensor(name: str) -> Tensor:
        found: Tensor = state[f"module.{name}"]
        return found

    def normed(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            tensor(f"{name}.{part}")[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    images = coloured(3, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean[:, None, None]) / std[:, None, None]
    x = normed(F.conv2d(x, tensor("conv1.weight"), padding=1), "bn1").relu()
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(9):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, tensor(f"{name}.conv1.weight"), stride=stride, padding=1)
            y = F.conv2d(normed(y, f"{name}.bn1").relu(), tensor(f"{name}.conv2.weight"), padding=1)
            if stride == 2:
                zeros = torch.zeros(3, width // 4, *y.shape[2:])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = (normed(y, f"{name}.bn2") + x).relu()
    expected = x.mean(dim=(2, 3))
    features, logits = look(resnet, images, CPU)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    by_hand = expected @ tensor("linear.weight").T + tensor("linear.bias")
    torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-5)


def test_efficientnet_sees_images_as_its_own_preprocessing_makes_them(
    efficientnet: EfficientNetLite0,
) -> None:
    images = coloured(3, 32)
    x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", align_corners=False)
    x = (x - 127) / 128
    features, logits = look(efficientnet, images, CPU)
    network = efficientnet._network
    with torch.no_grad():
        expected = network.extract_features(x).mean((2, 3))
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, network(x), rtol=1e-4, atol=1e-4)
    assert (features.shape, logits.shape) == ((3, 1280), (3, 1000))


def test_efficientnet_knows_its_classes(efficientnet: EfficientNetLite0) -> None:
    """A chequered board of many fields is ImageNet's crossword puzzle, window screen or chainlink
    fence; with damaged weights or another preprocessing it would be anything."""
    board = ((torch.arange(224) // 4)[:, None] + torch.arange(224) // 4) % 2 * 255
    logits = look(efficientnet, board.to(torch.uint8).expand(1, 3, 224, 224), CPU)[1]
    assert {int(i) for i in logits[0].topk(3).indices} & {489, 904, 918}


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_grey_images_are_seen_as_three_equal_channels(
    name: str, request: pytest.FixtureRequest
) -> None:
    judge = request.getfixturevalue(name)
    grey = coloured(2, 28)[:, :1]
    seen = [look(judge, images, CPU) for images in (grey, grey.repeat(1, 3, 1, 1))]
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs)


def test_large_images_are_smoothed_before_they_are_made_smaller(resnet: ResNet56Cifar10) -> None:
    """Single pixels of black and white are grey from afar, whatever grid they are looked at on."""
    board = (torch.arange(128)[:, None] + torch.arange(128)) % 2 * 254
    grey = torch.full((1, 3, 128, 128), 127, dtype=torch.uint8)
    seen = look(resnet, board.to(torch.uint8).expand(1, 3, 128, 128), CPU)[0]
    torch.testing.assert_close(seen, look(resnet, grey, CPU)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_an_image_is_seen_alike_in_any_company(name: str, request: pytest.FixtureRequest) -> None:
    judge, images = request.getfixturevalue(name), coloured(9, 32)  # 9 are two calls for a CPU
    alone = torch.cat([look(judge, image[None], CPU)[0] for image in images[[0, 8]]])
    together = look(judge, images, CPU)[0][[0, 8]]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_a_judge_is_named_after_the_hash_of_its_file(
    resnet: ResNet56Cifar10, resnet_file: Path, efficientnet: EfficientNetLite0
) -> None:
    digest = hashlib.sha256(resnet_file.read_bytes()).hexdigest()
    assert resnet.sha256 == digest
    assert resnet.name == f"resnet56_cifar10(CIFAR-10, 64 features, sha256 {digest[:12]})"
    assert efficientnet.sha256.startswith("57934424")  # as its file's published name says
    assert efficientnet.name.startswith("efficientnet_lite0(ImageNet, 1280 features, sha256 5793")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_weights_that_cannot_be_used_are_refused_and_no_code_in_them_is_run(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.pth" for name in ("none", "text", "code", "others", "list")}
    files["text"].write_text("weights")
    touched = tmp_path / "touched"
    files["code"].write_bytes(pickle.dumps(Malicious(touched), protocol=2))
    torch.save({"conv1.weight": torch.zeros(3)}, files["others"])
    torch.save([torch.zeros(3)], files["list"])
    for file in files.values():
        with pytest.raises(ConfigError, match=rf"^evaluation\.weights = .*{file.name}"):
            ResNet56Cifar10(settings(file), CPU)
    assert not touched.exists()
    with pytest.raises(ConfigError, match=r"'resnet56_cifar10' needs evaluation\.weights"):
        ResNet56Cifar10(settings(), CPU)


class InMemory(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class AsTorchFidelityTakesIt(FeatureExtractorBase):
    """A judge behind torch-fidelity's interface."""

    def __init__(self, name: str, features_list: list[str], judge: Judge, **_: Any) -> None:
        super().__init__(name, features_list)
        self.judge = judge

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(("features", "logits"), self.judge(images), strict=True))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        raise NotImplementedError


register_feature_extractor(TORCH_FIDELITYS, AsTorchFidelityTakesIt)


@pytest.mark.parametrize(("name", "n"), [("resnet", 120), ("efficientnet", 10)])
def test_the_figures_are_those_of_torch_fidelity_with_the_same_judge(
    name: str, n: int, request: pytest.FixtureRequest, resnet_file: Path, digits: ImageSet
) -> None:
    config = settings(resnet_file)
    if name == "efficientnet":
        config = EvaluationConfig(extractor="efficientnet_lite0")
    real, images = digits.subset(range(n)), digits.images[n : 2 * n].flip(2)
    ours = evaluate(images, real, config, seed=0, nfe=1)
    expected = torch_fidelity.calculate_metrics(
        input1=InMemory(images),
        input2=InMemory(real.images),
        feature_extractor=TORCH_FIDELITYS,
        judge=request.getfixturevalue(name),
        **dict.fromkeys(("isc", "fid", "kid"), True),
        kid_subset_size=n // 2,
        isc_splits=min(10, n // 2),
        batch_size=32,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert ours["why"] is None
    assert ours["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    kid = expected["kernel_inception_distance_mean"]
    assert ours["kid"] == pytest.approx(kid, rel=1e-4, abs=1e-7)
    assert ours["inception_score"][0] == pytest.approx(expected["inception_score_mean"], rel=1e-5)


def test_real_images_lie_at_the_floor_and_worse_ones_above_it_in_order(
    digits: ImageSet, efficientnet: EfficientNetLite0
) -> None:
    """By EfficientNet-Lite0, of images that it was not made for: 8x8 digits."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    half, other, *_ = digits.images[order].split(EACH)
    rest = digits.subset(order[2 * EACH :].numpy())
    assert rest.labels is not None
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(2))
    noisy, noisier = ((other + s * noise).clamp(0, 255).to(torch.uint8) for s in (20, 80))
    blurred = once_blurred(other)
    sets = {"half": half, "other": other, "five classes": rest.images[rest.labels < 5][:EACH]}
    sets |= {"noisy": noisy, "noisier": noisier}
    sets |= {"blurred": blurred, "blurred twice": once_blurred(blurred)}
    seen = {name: look(efficientnet, images, CPU)[0] for name, images in sets.items()}
    fd = {name: frechet_distance(seen["half"], found) for name, found in seen.items()}
    floor = fid_floor(torch.cat([seen["half"], seen["other"]]), EACH, 0)
    assert 0.85 * floor < fd["other"] < 1.15 * floor
    assert 1.2 * fd["other"] < fd["five classes"]
    assert 1.15 * fd["other"] < fd["noisy"] < 0.6 * fd["noisier"]
    assert 2 * fd["other"] < fd["blurred"] < 0.8 * fd["blurred twice"]


def once_blurred(images: Tensor) -> Tensor:
    """Convolved with (1, 2, 1) / 4 either way."""
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (weights[:, None] * weights)[None, None]
    return F.conv2d(F.pad(images.float(), (1,) * 4), kernel).to(torch.uint8)


def test_features_of_a_reference_set_stay_on_disk_for_each_judge(
    digits: ImageSet, resnet_file: Path, cache: Path
) -> None:
    names = ("efficientnet_lite0", "resnet56_cifar10")
    config = EvaluationConfig(extractor=names, weights=str(resnet_file))
    few, images = digits.subset(range(5)), digits.images[5:9]
    first = evaluate(images, few, config, seed=0, nfe=1)
    kept = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == 2
    for name, sha256 in zip(
        names,
        (first["extractor_sha256"], first["others"]["resnet56_cifar10"]["extractor_sha256"]),
        strict=True,
    ):
        assert any(sha256 in file and name in file for file in kept)
    quality._judge.cache_clear()
    assert evaluate(images, few, config, seed=0, nfe=1) == first
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == kept


def test_public_judges_compare_images_of_two_sizes_and_numbers_of_channels(
    digits: ImageSet, resnet_file: Path
) -> None:
    found = evaluate(coloured(6, 20), digits.subset(range(6)), settings(resnet_file), seed=0, nfe=1)
    assert found["why"] is None
    assert found["fid"] > 0
