"""Do the judges see what people see? Real images against real ones, and against spoiled ones.

    python benchmarks/judges.py cifar10 FOLDER [--images 1000] [--judges NAME ...] [--weights FILE]

FOLDER is where the data set lies: its own files, or for image_folder and cifar10 a folder of images
with a sub-folder per class. All sets have as many images as the reference has, so that the bias of
FD by that number is the same in each row. The table says FD of each set against one half of the
real images, its ratio to the first row, which is the other half, KID and the Inception Score.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fed_diffusion.common.compute import device_of
from fed_diffusion.config import Config, load_config
from fed_diffusion.data import ImageSet, load_dataset
from fed_diffusion.data.datasets import to_uint8
from fed_diffusion.evaluation.choice import choices
from fed_diffusion.evaluation.extractors import extractor_of
from fed_diffusion.evaluation.figures import figures

PUBLIC = ["efficientnet_lite0", "resnet56_cifar10"]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Convolved with a Gaussian of this many pixels."""
    reach = int(4 * sigma + 1)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    x = F.pad(images.float(), (reach,) * 4, mode="replicate")
    for k in (kernel, kernel.transpose(2, 3)):
        x = F.conv2d(x, k, groups=images.shape[1])
    return x.round().clamp(0, 255).to(torch.uint8)


def noisy(images: Tensor, sigma: float) -> Tensor:
    """With Gaussian noise of this many grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return to_uint8((images.float() + sigma * noise) / 127.5 - 1)


def spoiled(half: ImageSet, rest: ImageSet, n: int) -> dict[str, Tensor]:
    """n images each, from real to bad."""
    assert half.labels is not None
    assert rest.labels is not None
    few = rest.images[rest.labels < int(half.labels.max() + 1) // 2][:n]
    real = rest.images[:n]
    sets = {"the other half": real, "half the classes": few}
    sets |= {f"blur of {s} pixels": blurred(real, s) for s in (0.5, 1.0, 2.0)}
    sets |= {f"noise of {s} grey levels": noisy(real, s) for s in (5, 15, 45)}
    return sets | {"one image again and again": real[:1].expand(n, *real.shape[1:])}


def measured(config: Config, half: ImageSet, sets: dict[str, Tensor]) -> None:
    """Print a table per judge."""
    device = device_of(config.worker)
    for choice in choices(config.evaluation, tuple(half.images.shape[1:])):
        judge = extractor_of(choice.settings, half, 0).make(device)
        began = time.monotonic()
        real = judge.look(half.images)[0]
        speed = len(real) / (time.monotonic() - began)
        print(f"\n{judge.shown}, {speed:.0f} images/s\n")
        print("| images | FD | times the first | KID | Inception Score |\n|---|---|---|---|---|")
        first = None
        for name, images in sets.items():
            found = figures(*judge.look(images), real, 0, device)
            first = first or found["fid"]
            ratio, score = found["fid"] / first, found["inception_score"][0]
            cells = f"{found['fid']:.4g} | {ratio:.2f} | {found['kid']:.3g} | {score:.2f}"
            print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", help="cifar10, fashion_mnist, digits or image_folder")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="in each set")
    parser.add_argument("--judges", nargs="+", default=PUBLIC)
    parser.add_argument("--weights", help="resnet56_cifar10's file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = {"evaluation.extractor": arguments.judges, "evaluation.weights": arguments.weights}
    given |= {
        "data.name": arguments.dataset,
        "data.dir": arguments.folder and str(arguments.folder),
    }
    if arguments.dataset == "image_folder":
        given |= {"data.size": 32, "data.channels": 3}
    dataset = load_dataset(load_config("digits", given).data)
    order = np.random.default_rng(0).permutation(len(dataset))
    n = arguments.images
    half, rest = dataset.subset(order[:n]), dataset.subset(order[n:])
    measured(load_config("digits", given), half, spoiled(half, rest, n))


if __name__ == "__main__":
    main()
