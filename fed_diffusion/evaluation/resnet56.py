"""He et al.'s ResNet-56 for CIFAR-10, as a judge needs it: features and logits, no training.

"Deep Residual Learning for Image Recognition" (2016), section 4.2, with n = 9 and option A: where
the number of channels doubles, the shortcut takes every other pixel and pads channels with zeros.
The names of the weights are those of akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
BLOCKS = 9
"""The number of blocks of each width: 6 BLOCKS + 2 = 56 layers."""
CLASSES = 10


class ResNet56(nn.Module):
    """A network of 853,018 parameters; its 64 features are spatial means after the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _convolution(3, WIDTHS[0], 1)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0])
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1])
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2])
        self.linear = nn.Linear(WIDTHS[2], CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return [n, 64] features of normalised images [n, 3, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, 10] logits of normalised images [n, 3, H, W]."""
        out: Tensor = self.linear(self.features(x))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.stride = 1 if width == out else 2
        self.added = out - width
        self.conv1 = _convolution(width, out, self.stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = _convolution(out, out, 1)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        main = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.added // 2
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(main + F.pad(shortcut, (0, 0, 0, 0, half, half)))


def _stage(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(_Block(width, out), *(_Block(out, out) for _ in range(BLOCKS - 1)))


def _convolution(width: int, out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
