"""A group-aligned U-Net: every width is a multiple of one group size.

Normalisation groups have a fixed number of channels (not a fixed number of groups) and attention
heads a fixed size, so dropping whole groups leaves the statistics of every other group alone, also
across skip concatenations. A block whose level changes always has a 1x1 shortcut, so that the
levels' channel spaces are never tied. Hence a network with whole groups masked and the physically
smaller network compute the same function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fed_diffusion.diffusion.process import alpha, per_image, sigma


def noise_of(prediction: str, out: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The noise estimate that a network's output stands for, which is eps, v or x0 of x_u."""
    if prediction == "v":  # v = alpha eps - sigma x0, so eps = alpha v + sigma x
        return per_image(alpha(u), x) * out + per_image(sigma(u), x) * x
    if prediction == "x0":
        return (x - per_image(alpha(u), x) * out) / per_image(sigma(u), x)
    return out


def _start_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def reset(network: UNet) -> UNet:
    """Draw all parameters again, as in a new network."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding)):
            module.reset_parameters()
    for module in network.modules():
        if isinstance(module, ResBlock):
            _start_at_zero(module.conv2)
        elif isinstance(module, Attention):
            _start_at_zero(module.out)
    _start_at_zero(network.leave)
    return network


class ResBlock(nn.Module):
    """A block: norm-SiLU-conv, plus the time embedding, norm-SiLU-dropout-conv, plus a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, time: int, group: int, dropout: float, shortcut: bool
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(inputs // group, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(outputs // group, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if shortcut else nn.Identity()
        _start_at_zero(self.conv2)  # the block starts as its shortcut

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.shortcut(x)


class Attention(nn.Module):
    """Self-attention over pixels, in heads of a fixed size, is added to its input."""

    def __init__(self, channels: int, heads: int, head: int, group: int):
        super().__init__()
        self.head = head
        self.norm = nn.GroupNorm(channels // group, channels)
        self.query = nn.Conv2d(channels, heads * head, 1)
        self.key = nn.Conv2d(channels, heads * head, 1)
        self.value = nn.Conv2d(channels, heads * head, 1)
        self.out = nn.Conv2d(heads * head, channels, 1)
        _start_at_zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        h = self.norm(x)

        def split(t: Tensor) -> Tensor:  # [n, heads, pixels, head]
            return t.reshape(n, -1, self.head, height * width).transpose(2, 3)

        h = F.scaled_dot_product_attention(
            split(self.query(h)), split(self.key(h)), split(self.value(h))
        )
        return x + self.out(h.transpose(2, 3).reshape(n, -1, height, width))


class Stage(nn.Module):
    """A stage is a residual block and, at the chosen resolutions, attention."""

    def __init__(self, block: ResBlock, attention: Attention | None):
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, time: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.block(x if skip is None else torch.cat([x, skip], 1), time)
        return h if self.attention is None else self.attention(h)


class UNet(nn.Module):
    """The score network: eps_theta(x, u), or with `prediction` v or x0 converted to it.

    Parameters
    ----------
    channels, size
        The channels and the side of the images; the side must halve len(widths) - 1 times.
    widths
        Channels per level, each a multiple of `group`.
    blocks
        Residual blocks per level (one more on the way up, as in DDPM).
    attention
        Resolutions with self-attention; the middle has it always if any level does.
    classes
        Number of labels to condition on; None: unconditional. Label `classes` means "no label".
    """

    def __init__(
        self,
        channels: int,
        size: int,
        widths: tuple[int, ...],
        *,
        blocks: int = 1,
        attention: tuple[int, ...] = (),
        group: int = 8,
        head: int = 32,
        dropout: float = 0.0,
        classes: int | None = None,
        prediction: str = "eps",
    ):
        super().__init__()
        self.prediction = prediction
        self.checkpointing = False
        self.classes = classes
        self.frequencies = widths[0]
        time = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        self.label = nn.Embedding(classes + 1, time) if classes else None

        def stage(inputs: int, outputs: int, resolution: int, shortcut: bool) -> Stage:
            block = ResBlock(inputs, outputs, time, group, dropout, shortcut)
            heads = max(outputs // head, 1)
            attend = resolution in attention
            return Stage(block, Attention(outputs, heads, head, group) if attend else None)

        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        width = widths[0]
        for level, outputs in enumerate(widths):
            for i in range(blocks):
                first = i == 0 and (level > 0 or width != outputs)
                self.down.append(stage(width, outputs, size >> level, first))
                width = outputs
                skips.append(width)
            if level + 1 < len(widths):
                self.downsample.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        bottom = size >> (len(widths) - 1)
        self.middle = nn.ModuleList(
            [
                stage(width, width, bottom if attention else -1, False),
                Stage(ResBlock(width, width, time, group, dropout, False), None),
            ]
        )
        if attention and self.middle[0].attention is None:
            self.middle[0].attention = Attention(width, max(width // head, 1), head, group)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                self.up.append(stage(width + skips.pop(), widths[level], size >> level, True))
                width = widths[level]
            if level:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(width // group, width)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        _start_at_zero(self.leave)

    def forward(self, x: Tensor, u: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the noise estimate eps_theta(x, u).

        Parameters
        ----------
        x
            Noised images [n, channels, size, size].
        u
            Times to data [n], float64.
        labels
            int64 [n]; only for a conditional network, where None means "no label".
        """
        out = self._network(x, self._embed(u, labels).to(x.dtype))
        return noise_of(self.prediction, out, x, u)

    def _embed(self, u: Tensor, labels: Tensor | None) -> Tensor:
        """Return the embedding of the log noise-to-signal ratio: sines and cosines, then two
        layers.
        """
        half = self.frequencies // 2
        log_ratio = 0.5 * torch.log(torch.expm1(2 * u))  # log(sigma / alpha)
        scale = torch.exp(
            torch.linspace(math.log(0.25), math.log(25.0), half, dtype=u.dtype, device=u.device)
        )
        angle = log_ratio[:, None] * scale
        waves = torch.cat([angle.sin(), angle.cos()], 1)
        # the norm's dtype: a base of an adapter may hold its layers in another one
        embedding: Tensor = self.time(waves.to(self.norm.weight.dtype))
        if self.label is not None:
            if labels is None:
                labels = torch.full((len(u),), self.label.num_embeddings - 1, device=u.device)
            embedding = embedding + self.label(labels)
        return F.silu(embedding)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only what a stage is given, and compute the stage again in the backward pass."""
        self.checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep everything that the backward pass needs."""
        self.checkpointing = False

    def _through(self, stage: nn.Module, *given: Tensor) -> Tensor:
        again = self.checkpointing and torch.is_grad_enabled()
        h: Tensor = checkpoint(stage, *given, use_reentrant=False) if again else stage(*given)
        return h

    def _network(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.enter(x)
        skips = [h]
        blocks = len(self.down) // (len(self.downsample) + 1)
        for i, stage in enumerate(self.down):
            h = self._through(stage, h, time)
            skips.append(h)
            if (i + 1) % blocks == 0 and (level := i // blocks) < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        for stage in self.middle:
            h = self._through(stage, h, time)
        for i, stage in enumerate(self.up):
            h = self._through(stage, h, time, skips.pop())
            if (i + 1) % (blocks + 1) == 0 and (level := i // (blocks + 1)) < len(self.upsample):
                h = self.upsample[level](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        out: Tensor = self.leave(F.silu(self.norm(h)))
        return out
