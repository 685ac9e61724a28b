"""What Theorem 4.11 reads of a run, measured: each with its estimator, its cost and its error.

| quantity | estimator | cost | error |
|---|---|---|---|
| d | the images' shape | none | exact |
| M_{n,2} | `second_moment` | a pass over the bytes | exact |
| F_n, F | `mean` of `DSMLoss` over minibatches | a forward pass each | Student's interval |
| sigma_1^2 | `gradient_variance` | m backward passes a worker | Student's, and the sketch's |
| sigma_2^2 | `gradient_distance` | the same passes | the same |
| ||grad F||^2 | `gradient_norm` | the same passes | the sketch's, Student's from m = 3 |
| L at theta | `largest_curvature` | a double backward pass a step | distance to an eigenvalue |
| L on the path | `secant` | the same passes in two rounds | as ||grad F||^2 |

w^2 is `pruning_error`, Gamma_r `MaskedMean.gamma` and ||theta_R - theta_0|| `norms.difference`: all
exact. Losses and gradients are those of the simple loss F_n / (Z d), which training minimises;
`bound.to_F_scale` brings a `Training` made of them to the scale of F, in that one place.

Gradients come as [N, m, k]: m independent minibatches of each of N workers, whole (k = D) or as
`Sketch`es. Means over workers estimate suprema over workers and rounds from below, and L seen at
some places the largest L from below: they say so (`lower`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fed_diffusion.rng import Purpose, philox

SKETCH = 1024
"""Numbers in a sketch: squared norms to a standard error of sqrt(2 / 1024) = 4.4 %."""
CHUNK = 1 << 20
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes
    ----------
    value, error
        The estimate and half the width of its 95 % interval: 0 where it is exact, None where
        nothing is known of it.
    lower
        It estimates from below what the theorem asks for, the largest value anywhere.
    """

    value: float
    error: float | None = None
    lower: bool = False

    def root(self) -> Estimate:
        """Of the square root, 0 where noise has brought an unbiased estimate below 0."""
        middle = math.sqrt(max(self.value, 0.0))
        if self.error is None:
            return Estimate(middle, None, self.lower)
        top = math.sqrt(max(self.value + self.error, 0.0)) - middle
        bottom = middle - math.sqrt(max(self.value - self.error, 0.0))
        return Estimate(middle, max(top, bottom), self.lower)

    def scaled(self, by: float) -> Estimate:
        """Of `by` times the quantity."""
        error = None if self.error is None else self.error * by
        return Estimate(self.value * by, error, self.lower)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def second_moment(images: Tensor) -> float:
    """M_2 = E ||X_0||^2 of images uint8 [n, C, H, W] as networks see them, in [-1, 1]; exact."""
    counts = torch.bincount(images.reshape(-1), minlength=256).double()
    grey = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    return float((counts * grey.square()).sum()) / len(images)


def mean(values: Sequence[float], lower: bool = False) -> Estimate:
    """The mean of independent values with Student's interval; no interval of a single one."""
    return Estimate(math.fsum(values) / len(values), _student(values), lower)


class Sketch:
    """S x for vectors x of D numbers: `size` numbers that keep inner products on average.

    Coordinate i is added to the bucket h(i) with the sign s(i), both from one seeded stream
    (Charikar, Chen & Farach-Colton 2002): S is linear, E <Sx, Sy> = <x, y>, and the variance of
    <Sx, Sy> is at most (||x||^2 ||y||^2 + <x, y>^2) / size. O(D) time, no memory beyond a chunk.
    Whoever has the same seed has the same S.
    """

    def __init__(self, seed: int, size: int = SKETCH):
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
                values *= np.where(words >> np.uint64(63), -1.0, 1.0)
                bucket = ((words & np.uint64(0xFFFFFFFF)) % np.uint64(self.size)).astype(np.int64)
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


def gradient_variance(gradients: Tensor, sketched: bool = True) -> Estimate:
    """sigma_1^2 at the minibatches' size: E ||g - E g||^2, the mean over workers.

    Of each worker the sample variance, at two minibatches ||g_1 - g_2||^2 / 2; unbiased.
    """
    spread = gradients.double() - gradients.double().mean(1, keepdim=True)
    squares = spread.square().sum((1, 2)) / (_minibatches(gradients) - 1)
    values = squares.tolist()
    # a sum of at most m - 1 squared norms: as far off as one of them, at worst
    off = math.sqrt(2 / gradients.shape[2]) * float(squares.mean()) if sketched else 0.0
    return _joined(values, off, lower=True)


def gradient_distance(gradients: Tensor, sketched: bool = True) -> Estimate:
    """sigma_2^2 = ||grad F_n - grad F||^2, the mean over workers, without the minibatches' noise.

    d_i = g_{n,i} - mean over workers of g_{.,i} is independent between minibatches i, so that the
    mean of <d_i, d_j> over i != j is unbiased (from two halves: <d_1, d_2>). It can be below 0.
    """
    differences = gradients.double() - gradients.double().mean(0)
    found = [_squared_mean(worker) for worker in differences]
    off = sum(error for _, error in found) / len(found) if sketched else 0.0
    return _joined([value for value, _ in found], off, lower=True)


def gradient_norm(gradients: Tensor, sketched: bool = True) -> Estimate:
    """||grad F||^2 at one theta, F the mean over workers, without the minibatches' noise.

    Unbiased as `gradient_distance`; the interval is a delete-one jackknife's, from 3 minibatches.
    """
    return _squared(gradients.double().mean(0), sketched)


def secant(before: Tensor, after: Tensor, distance: float, sketched: bool = True) -> Estimate:
    """||grad F(theta') - grad F(theta)|| / ||theta' - theta||, at most L, without the noise.

    Parameters
    ----------
    before, after
        Gradients [N, m, k] at theta and at theta'.
    distance
        ||theta' - theta||, above 0.
    """
    change = _squared((after.double() - before.double()).mean(0), sketched)
    return replace(change.scaled(1 / distance**2), lower=True).root()


def hessian_vector(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor]
) -> Callable[[Tensor], Tensor]:
    """v -> H v, both [D], of a loss that must come out the same each time (fixed noise).

    The loss and its gradient are computed once; each product is one more backward pass.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
        found = torch.autograd.grad(
            loss(), parameters, create_graph=True, materialize_grads=True, allow_unused=True
        )
    # where the loss is flat or linear in a tensor, its gradient is a constant
    curved = [i for i, gradient in enumerate(found) if gradient.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]

    def product(v: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(v)
        parts = v.split(sizes)
        image = torch.autograd.grad(
            [found[i] for i in curved],
            parameters,
            [parts[i].view(found[i].shape) for i in curved],
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        return torch.cat([part.reshape(-1) for part in image])

    return product


def largest_curvature(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Estimate:
    """||H|| by power iteration: ||H v|| of a unit vector v after so many products, never above it.

    With rho = <v, H v> an eigenvalue is within ||H v - rho v|| of rho; the error is that, and how
    far |rho| is from ||H v||. That it is the largest eigenvalue is what cannot be told.
    """
    v = start / torch.linalg.vector_norm(start)
    value = error = 0.0
    for _ in range(steps):
        image = product(v)
        rho = torch.dot(v, image)
        value = float(torch.linalg.vector_norm(image))
        error = float(torch.linalg.vector_norm(image - rho * v)) + abs(value - abs(float(rho)))
        if value == 0:
            break
        v = image / value
    return Estimate(value, error, lower=True)


def _squared(copies: Tensor, sketched: bool) -> Estimate:
    """||E x||^2 from independent copies [m, k]."""
    m = len(copies)
    value, off = _squared_mean(copies)
    if m < 3:
        return Estimate(value, None)
    left_out = [_squared_mean(copies[[j for j in range(m) if j != i]])[0] for i in range(m)]
    spread = float(np.std(left_out)) * math.sqrt(m - 1)
    half = float(stdtrit(m - 1, (1 + LEVEL) / 2)) * spread
    return Estimate(value, math.hypot(half, 1.96 * off if sketched else 0.0))


def _squared_mean(copies: Tensor) -> tuple[float, float]:
    """The mean of <x_i, x_j> over i != j, and a bound on the standard error of sketching it."""
    m = _minibatches(copies[None])
    gram = copies @ copies.T
    squares = gram.diagonal()
    apart = ~torch.eye(m, dtype=torch.bool)
    value = float(gram[apart].mean())
    variance = (squares[:, None] * squares + gram.square()) / copies.shape[1]
    return value, float(variance.sqrt()[apart].mean())


def _joined(values: list[float], sketch_error: float, lower: bool) -> Estimate:
    """The mean over workers; all share one sketch, so its error does not average out."""
    found = mean(values, lower)
    if found.error is None:
        return found
    return Estimate(found.value, math.hypot(found.error, 1.96 * sketch_error), lower)


def _student(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / math.sqrt(n))


def _minibatches(gradients: Tensor) -> int:
    if gradients.shape[1] < 2:
        raise ValueError("one minibatch tells nothing of the noise; at least two are needed")
    return gradients.shape[1]
