"""Which channels of a U-Net belong together, so that whole groups of them can be dropped.

Tensors that are added to one another share one *space* of channel groups. Where a group is dropped,
every row and column that belongs to it goes, in every tensor; since groups are normalised one by
one and heads attend one by one, what is left computes what it would have computed with the dropped
groups at zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fed_diffusion.masks.mask import Block, Runs
from fed_diffusion.masks.scattered import rounded
from fed_diffusion.models import lora
from fed_diffusion.models.unet import Attention, ResBlock, Stage, UNet

Channels = dict[str, tuple[int, ...]]
"""Space -> the groups that are kept, ascending."""


@dataclass(frozen=True)
class Space:
    """Channels that are kept or dropped together: `groups` of `size` channels each."""

    groups: int
    size: int


@dataclass(frozen=True)
class Layout:
    """The channel spaces of a network and where each of its tensors runs over them.

    Attributes
    ----------
    spaces
        The spaces by name, in the order of the forward pass.
    shapes
        The shape of every parameter.
    axes
        For every parameter and dimension, the spaces that it concatenates; () if it stays whole.
    """

    spaces: dict[str, Space]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[tuple[str, ...], ...]]

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def kept(self, counts: Mapping[str, int]) -> int:
        """Return how many parameters are left with so many groups of each space."""
        width = {name: space.size * counts[name] for name, space in self.spaces.items()}
        return sum(
            math.prod(
                sum(width[space] for space in axis) if axis else size
                for axis, size in zip(axes, self.shapes[name], strict=True)
            )
            for name, axes in self.axes.items()
        )

    @cached_property
    def _growth(self) -> list[str]:
        """Yield the space that gets its next group, from one group everywhere to all, most even
        first.
        """
        steps = [
            (count / space.groups, index, name)
            for index, (name, space) in enumerate(self.spaces.items())
            for count in range(2, space.groups + 1)
        ]
        return [name for _, _, name in sorted(steps)]

    @cached_property
    def _counts(self) -> dict[float, dict[str, int]]:
        return {}

    def counts(self, keep: float) -> dict[str, int]:
        """Return the groups per space of the largest sub-network with at most `keep` of all
        parameters.

        All spaces shrink by the same fraction, as nearly as whole groups allow. A smaller ratio
        never has more groups of any space.

        Raises
        ------
        ValueError
            One group per space has more than `keep` of the parameters.
        """
        if keep not in self._counts:
            self._counts[keep] = self._search(keep)
        return dict(self._counts[keep])

    def _search(self, keep: float) -> dict[str, int]:
        def after(steps: int) -> dict[str, int]:
            counts = dict.fromkeys(self.spaces, 1)
            for name in self._growth[:steps]:
                counts[name] += 1
            return counts

        allowed = keep * self.parameters
        least = self.kept(after(0))
        if least > allowed:
            raise ValueError(
                f"keep = {keep:g} is below the smallest sub-network, one group of channels "
                f"everywhere, which has {least / self.parameters:.4f} of the parameters; take a "
                "larger ratio, a smaller model.group or larger model.widths"
            )
        low, high = 0, len(self._growth)  # after(low) fits; after(high + 1) does not
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.kept(after(middle)) <= allowed else (low, middle - 1)
        return after(low)

    def blocks(self, channels: Channels) -> dict[str, Block]:
        """Return the block of every tensor that loses anything when only these groups are kept."""
        blocks = {}
        for name, axes in self.axes.items():
            shape = self.shapes[name]
            runs = tuple(
                self._runs(axis, channels) if axis else ((0, size),)
                for axis, size in zip(axes, shape, strict=True)
            )
            block = Block(shape, runs)
            if block.kept != shape:
                blocks[name] = block
        return blocks

    def shapes_of(self, blocks: Mapping[str, Block]) -> dict[str, tuple[int, ...]]:
        """Return the parameters' shapes in the network that keeps these blocks."""
        return {n: blocks[n].kept if n in blocks else shape for n, shape in self.shapes.items()}

    def _runs(self, axis: tuple[str, ...], channels: Channels) -> Runs:
        runs: list[tuple[int, int]] = []
        offset = 0
        for name in axis:
            size = self.spaces[name].size
            for group in channels[name]:
                start = offset + group * size
                if runs and runs[-1][1] == start:
                    runs[-1] = (runs[-1][0], start + size)
                else:
                    runs.append((start, start + size))
            offset += self.spaces[name].groups * size
        return tuple(runs)


class Ranks(Layout):
    """The ranks of an adapter: a space of one rank a group for each layer that has one."""

    def counts(self, keep: float) -> dict[str, int]:
        """Return keep x r of the r ranks, halves rounded up, the same for each layer.

        Raises
        ------
        ValueError
            No rank would be left.
        """
        found = {name: rounded(keep, space.groups) for name, space in self.spaces.items()}
        if min(found.values()) == 0:
            (r,) = {space.groups for space in self.spaces.values()}
            raise ValueError(
                f"keep = {keep:g} leaves none of the adapter's ranks (lora.rank = {r}); a ratio of "
                f"{1 / r:g} keeps one"
            )
        return found


def ranks_of(network: nn.Module) -> Ranks:
    """Return the spaces of a network whose parameters are those of an adapter alone."""
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    spaces: dict[str, Space] = {}
    axes: dict[str, tuple[tuple[str, ...], ...]] = {}
    for name, shape in shapes.items():
        layer, which = lora.parted(name)
        rank_axis = 0 if which == lora.A else 1
        spaces[layer] = Space(shape[rank_axis], 1)
        axes[name] = tuple((layer,) if axis == rank_axis else () for axis in range(len(shape)))
    return Ranks(spaces, shapes, axes)


def layout_of(network: nn.Module) -> Layout:
    """Return the channel spaces of a `UNet`; image channels and the embeddings stay whole.

    Raises
    ------
    TypeError
        For another network, it is not known which channels belong together.
    """
    if not isinstance(network, UNet):
        raise TypeError(
            f"channels can be dropped from the built-in U-Net only, not from "
            f"{type(network).__name__}"
        )
    trace = _Trace(network)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    axes = {name: trace.axes.get(name, ((),) * len(shape)) for name, shape in shapes.items()}
    return Layout(trace.spaces, shapes, axes)


class _Trace:
    """A trace follows the forward pass and notes the spaces that each tensor runs over."""

    def __init__(self, network: UNet):
        self.spaces: dict[str, Space] = {}
        self.axes: dict[str, tuple[tuple[str, ...], ...]] = {}
        self._group = network.norm.num_channels // network.norm.num_groups
        self._follow(network)

    def _follow(self, network: UNet) -> None:
        here = self._space("enter", network.enter.out_channels)
        self._conv("enter", (here,), ())
        skips = [here]
        blocks = len(network.down) // (len(network.downsample) + 1)
        for i, stage in enumerate(network.down):
            here = self._stage(f"down.{i}", stage, (here,))
            skips.append(here)
            if (i + 1) % blocks == 0 and (level := i // blocks) < len(network.downsample):
                here = self._resample(f"downsample.{level}", network.downsample[level], here)
                skips.append(here)
        for i, stage in enumerate(network.middle):
            here = self._stage(f"middle.{i}", stage, (here,))
        for i, stage in enumerate(network.up):
            here = self._stage(f"up.{i}", stage, (here, skips.pop()))
            if (i + 1) % (blocks + 1) == 0 and (level := i // (blocks + 1)) < len(network.upsample):
                here = self._resample(f"upsample.{level}", network.upsample[level], here)
        self._norm("norm", (here,))
        self._conv("leave", (), (here,))

    def _space(self, name: str, channels: int, size: int | None = None) -> str:
        size = size or self._group
        self.spaces[name] = Space(channels // size, size)
        return name

    def _stage(self, name: str, stage: nn.Module, inputs: tuple[str, ...]) -> str:
        assert isinstance(stage, Stage)
        here = self._block(f"{name}.block", stage.block, inputs)
        if stage.attention is not None:
            self._attention(f"{name}.attention", stage.attention, here)
        return here

    def _block(self, name: str, block: ResBlock, inputs: tuple[str, ...]) -> str:
        hidden = self._space(f"{name}.hidden", block.conv1.out_channels)
        if isinstance(block.shortcut, nn.Identity):  # input plus output: one space
            (here,) = inputs
        else:
            here = self._space(name, block.conv2.out_channels)
            self._conv(f"{name}.shortcut", (here,), inputs)
        self._norm(f"{name}.norm1", inputs)
        self._conv(f"{name}.conv1", (hidden,), inputs)
        self.axes[f"{name}.time.weight"] = ((hidden,), ())
        self.axes[f"{name}.time.bias"] = ((hidden,),)
        self._norm(f"{name}.norm2", (hidden,))
        self._conv(f"{name}.conv2", (here,), (hidden,))
        return here

    def _attention(self, name: str, attention: Attention, here: str) -> None:
        heads = self._space(f"{name}.heads", attention.query.out_channels, attention.head)
        self._norm(f"{name}.norm", (here,))
        for part in ("query", "key", "value"):
            self._conv(f"{name}.{part}", (heads,), (here,))
        self._conv(f"{name}.out", (here,), (heads,))

    def _resample(self, name: str, conv: nn.Module, inputs: str) -> str:
        assert isinstance(conv, nn.Conv2d)
        here = self._space(name, conv.out_channels)
        self._conv(name, (here,), (inputs,))
        return here

    def _conv(self, name: str, outputs: tuple[str, ...], inputs: tuple[str, ...]) -> None:
        self.axes[f"{name}.weight"] = (outputs, inputs, (), ())
        self.axes[f"{name}.bias"] = (outputs,)

    def _norm(self, name: str, axis: tuple[str, ...]) -> None:
        self.axes[f"{name}.weight"] = self.axes[f"{name}.bias"] = (axis,)
