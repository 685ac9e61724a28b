"""Gradients as a few numbers that keep their inner products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.common.rng import Purpose, philox

SKETCH = 1024
"""Numbers in a sketch: squared norms to a standard error of sqrt(2 / 1024) = 4.4 %."""
CHUNK = 1 << 20
SIGN = np.uint64(1 << 63)
"""Of a word of the stream, and of a float64."""


class Sketch:
    """S x for vectors x of D numbers: `size` numbers that keep inner products on average.

    Coordinate i is added to the bucket h(i) with the sign s(i), both from one seeded stream
    (Charikar, Chen & Farach-Colton 2002): S is linear, E <Sx, Sy> = <x, y>, and the variance of
    <Sx, Sy> is at most (||x||^2 ||y||^2 + <x, y>^2) / size. O(D) time, no memory beyond a chunk.
    Whoever has the same seed has the same S. The size is a power of 2.
    """

    def __init__(self, seed: int, size: int = SKETCH):
        if size < 1 or size & (size - 1):
            raise ValueError(f"a sketch of {size} numbers; it must be a power of 2")
        self.size = size
        self._seed = seed

    def __call__(self, tensors: Iterable[Tensor]) -> Tensor:
        """The sketch of tensors laid end to end, float64 [size]."""
        stream = philox(self._seed, Purpose.SKETCH)
        total = np.zeros(self.size)
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().view(-1).numpy()
            for start in range(0, len(flat), CHUNK):
                values = flat[start : start + CHUNK].astype(np.float64)
                words = np.asarray(stream.random_raw(len(values)), dtype=np.uint64)
                values.view(np.uint64)[:] ^= words & SIGN
                bucket = (words & np.uint64(self.size - 1)).view(np.int64)
                total += np.bincount(bucket, values, minlength=self.size)
        return torch.from_numpy(total)


def sampled_gradients(
    parameters: Sequence[Tensor], losses: Iterable[Callable[[], Tensor]], sketch: Sketch
) -> tuple[list[float], Tensor]:
    """The values of m losses, and their sketched gradients, float64 [m, k]."""
    values, sketches = [], []
    for loss in losses:
        value = loss()
        gradients = torch.autograd.grad(
            value, parameters, materialize_grads=True, allow_unused=True
        )
        values.append(float(value.detach()))
        sketches.append(sketch(gradients))
    return values, torch.stack(sketches)
