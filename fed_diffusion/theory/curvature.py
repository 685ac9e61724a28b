"""L at one theta: Hessian products in parts of a minibatch, within a training step's memory.

A product differentiates twice, and the graph of a gradient is several times that of a loss. So a
minibatch is split into as many parts as it takes: its times and noise were drawn for the whole of
it, and the parts' losses, weighted by their images, add up to its loss, so that their products add
up to its product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fed_diffusion.diffusion.loss import Network, NoisyBatch
from fed_diffusion.theory.estimates import Estimate

ROOM = 64 << 20
"""The bytes that a product may take in any case; smaller parts would take twice the time."""


def curvature(
    parameters: Sequence[Tensor],
    network: Network,
    batch: NoisyBatch,
    products: int,
    room: int = ROOM,
) -> Estimate:
    """Return ||H|| of a minibatch's loss by power iteration, starting from the gradient.

    The gradient leans towards the largest eigenvalues. The memory is about a training step's on the
    same minibatch, or `room`, or that of one image's product, whichever is largest.
    """

    def loss_of(part: NoisyBatch) -> Callable[[], Tensor]:
        return lambda: part.loss(network) * (len(part) / len(batch))

    parts = batch.split(images_at_once(parameters, network, batch, room))
    product = hessian_vector(parameters, [loss_of(part) for part in parts])
    # no name here holds the gradient: vectors of its size are the memory that counts
    return largest_curvature(product, _flat(gradient(parameters, batch.loss(network))), products)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(
    parameters: Sequence[Tensor], loss: Tensor, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradient of a loss, zero where the loss does not depend on a parameter."""
    return torch.autograd.grad(
        loss, parameters, create_graph=create_graph, materialize_grads=True, allow_unused=True
    )


def images_at_once(
    parameters: Sequence[Tensor], network: Network, batch: NoisyBatch, room: int = ROOM
) -> int:
    """Return how many images a Hessian product may take in a training step's memory, or in `room`.

    Both are measured on the first image, by the bytes that autograd keeps. The result is at least
    one.
    """
    one = batch[:1]
    with saved_bytes(parameters) as once:
        gradient(parameters, one.loss(network))
    with saved_bytes(parameters) as twice, sdpa_kernel(SDPBackend.MATH):
        gradient(parameters, one.loss(network), create_graph=True)
    return images_within(once() * len(batch), twice(), len(batch), room)


def images_within(step: float, product: float, images: int, room: int = ROOM) -> int:
    """Return how many images there is memory for, given a step of all and a product of one."""
    return max(1, min(images, int(max(step, room) / max(product, 1))))


@contextmanager
def saved_bytes(parameters: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes that autograd has kept inside, without parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, int] = {}
    alive: list[torch.UntypedStorage] = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def hessian_vector(
    parameters: Sequence[Tensor], losses: Callable[[], Tensor] | Sequence[Callable[[], Tensor]]
) -> Callable[[Tensor], Tensor]:
    """Return v -> H v, both [D], of a loss, or of the sum of several losses, one after another.

    Each loss must come out the same every time (fixed noise). Only one graph is held at a time.
    """
    every = [losses] if callable(losses) else losses
    sizes = [parameter.numel() for parameter in parameters]

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for loss in every:
            with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
                found = gradient(parameters, loss(), create_graph=True)
            # where the loss is flat or linear in a tensor, its gradient is a constant
            curved = [i for i, part in enumerate(found) if part.requires_grad]
            if not curved:
                continue
            parts = v.split(sizes)
            images = torch.autograd.grad(
                [found[i] for i in curved],
                parameters,
                [parts[i].view(found[i].shape) for i in curved],
                materialize_grads=True,
                allow_unused=True,
            )
            del found
            for sum_, image in zip(total.split(sizes), images, strict=True):
                sum_ += image.reshape(-1)
        return total

    return product


def largest_curvature(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Estimate:
    """Return ||H|| by power iteration: ||H v|| of a unit vector v, which is never above ||H||.

    With rho = <v, H v> an eigenvalue is within ||H v - rho v|| of rho; the error is that, and how
    far |rho| is from ||H v||. That it is the largest eigenvalue is what cannot be told.
    """
    v = start / torch.linalg.vector_norm(start)
    del start
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
