"""The client's side of a round: equation (7) under a mask, on images that stay here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fed_diffusion.build import channel_layout, evaluator, parameters_of, skeleton, time_grid
from fed_diffusion.client import diagnostics
from fed_diffusion.client.budget import measure_budget
from fed_diffusion.client.optimisers import Optimiser, SharedAdam, optimiser_of
from fed_diffusion.common.compute import (
    compiled,
    device_of,
    kernels,
    pinned_threads,
    precision_on,
)
from fed_diffusion.common.rng import Purpose, generator, seed_torch, torch_generator
from fed_diffusion.config import Config
from fed_diffusion.data import (
    ImageSet,
    augmentation,
    class_count,
    load_dataset,
    partition,
    split_holdout,
    to_unit,
)
from fed_diffusion.diffusion.loss import DSMLoss, Network, NoisyBatch
from fed_diffusion.masks.budget import Budget
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Numbers
from fed_diffusion.masks.subnetwork import resized
from fed_diffusion.models.unet import UNet
from fed_diffusion.protocol.clipping import clipped
from fed_diffusion.protocol.divergence import FIRST_LOSS, exploded
from fed_diffusion.protocol.messages import PRECISION, PRECISIONS, Task, Update
from fed_diffusion.protocol.moments import decode_state, encode_moments
from fed_diffusion.protocol.wire import Payload, decode_task, encode_update
from fed_diffusion.theory.estimates import second_moment

MOMENT_IMAGES = 1024
"""The number of images that M_{n,2} reads together, so that a client's images are not copied
whole.
"""


class Worker:
    """A worker runs tasks for any client of a run, and keeps the model and the data between them.

    A task that drops whole channels builds, trains and holds only the smaller network. Nothing of a
    task's result depends on what ran before it: workers are stateless between rounds, and the state
    of an optimiser that goes on (local.state) comes with the task.

    Parameters
    ----------
    dataset
        The images; by default those that the configuration names.
    own
        The data set is one client's own: all of it is that client's, whichever number it has (the
        number still says which randomness is its). Default: it is shared, and partitioned.
    """

    def __init__(self, config: Config, dataset: ImageSet | None = None, *, own: bool = False):
        self.config = config
        self.device = device_of(config)
        self.dataset = dataset if dataset is not None else load_dataset(config.data)
        self._parts = None if own else partition(self.dataset, config)
        self._skeleton = skeleton(config)
        self._shapes = parameters_of(self._skeleton)
        self._layout = channel_layout(config)
        self._networks: dict[tuple[torch.Size, ...], tuple[nn.Module, Network, Network]] = {}
        self._images = self.dataset.images.to(self.device)  # once: bytes, a GPU has room for them
        self._labels = None if self.dataset.labels is None else self.dataset.labels.to(self.device)
        self._budget: Budget | None = None
        self._moments: dict[int, float] = {}
        self._augment = augmentation(config.data)
        self._no_label = class_count(config.data) or 0  # the label behind the last class
        self.loss = DSMLoss(time_grid(config))

    def run(self, task: Task) -> Update:
        """Decode theta_{r,n,0}, take S local steps (7), send back what the mask keeps."""
        threads = self.config.worker.threads
        with (
            pinned_threads(threads),
            torch.random.fork_rng(),
            kernels(self.config, self.device),
        ):
            return self._run(task)

    def _run(self, task: Task) -> Update:
        began = time.perf_counter()
        config, seed = self.config, self.config.seed
        seed_torch(seed, Purpose.DROPOUT, task.round, task.client)
        recipe, masks, start = decode_task(task.payload, self._shapes, self._layout, config)
        train, holdout = split_holdout(self._images_of(task.client), config, task.client)
        measured, sketches = diagnostics.measure(self, start, task)
        network, forward, fast = self._network(start)
        numbers: Numbers = recipe.to_metrics() | measured
        if len(holdout):
            numbers["holdout_loss"] = self._holdout_loss(network, forward, holdout, task.client)
        batches = self._batches(task, train, self.steps(len(train)))
        state = decode_state(task.payload.arrays, self._shapes, masks, config)
        optimiser = optimiser_of(config, network, task.round, state)
        loss, first = self._train(network, forward, fast, task, batches, masks, optimiser)
        numbers["loss"] = loss
        if exploded(loss, first):
            numbers[FIRST_LOSS] = first
        numbers["images"] = sum(map(len, batches))
        numbers["examples"] = len(train)
        numbers[PRECISION] = PRECISIONS.index(precision_on(config, self.device))
        numbers["seconds"] = time.perf_counter() - began
        end = parameters_of(network)
        if config.privacy.clip is not None:
            end = clipped(end, start, config.privacy.clip)
        arrays = encode_update(end, start, masks, config, task.round, task.client) | sketches
        if isinstance(optimiser, SharedAdam):
            arrays |= encode_moments(optimiser.moments(), masks, config, task.round, task.client)
        return Update(task.round, task.client, Payload(arrays, numbers))

    def minibatches(
        self, theta: dict[str, Tensor], client: int, round: int, count: int, size: int
    ) -> tuple[list[nn.Parameter], Network, Iterator[NoisyBatch]]:
        """Return independent minibatches of a client, as training sees them, for the loss at theta.

        Dropout is off; images and noise come from a stream of their own. Where training takes
        smaller batches than `size` because the client has fewer images, so are these.

        Returns
        -------
        parameters, network, batches
            What to differentiate by; `count` minibatches, whose `loss(network)` does not change.
        """
        network, forward, _ = self._network(theta)
        network.eval()
        train = self._training_images(client)
        if self.config.local.epochs is not None:
            size = min(size, len(train))

        def drawn() -> Iterator[NoisyBatch]:
            draw = generator(self.config.seed, Purpose.DIAGNOSTIC, round, client)
            for _ in range(count):
                index = draw.choice(train, size, replace=size > len(train))
                noise = torch_generator(_seed(draw), Purpose.DIAGNOSTIC, device=self.device)
                chosen = torch.from_numpy(index).to(self.device)
                images, labels = self._batch(chosen, noise, draw)
                yield self.loss.draw(images, noise, labels)

        return list(network.parameters()), forward, drawn()

    def examples(self, client: int) -> int:
        """Return how many images a client trains on."""
        return len(self._training_images(client))

    def _training_images(self, client: int) -> np.ndarray:
        """Return the indices of a client's images without those that are held out."""
        return split_holdout(self._images_of(client), self.config, client)[0]

    def _network(self, theta: dict[str, Tensor]) -> tuple[nn.Module, Network, Network]:
        """Return a network that holds theta; one of each size stays resident.

        Returns
        -------
        network, plain, fast
            The module, and two ways to call it: as it is, for batches of any size and for second
            derivatives, and for the batches of training, compiled where worker.compile says so.
        """
        shapes = tuple(value.shape for value in theta.values())
        if shapes not in self._networks:
            network = self._skeleton
            if isinstance(network, UNet):
                network = resized(network, {name: tuple(v.shape) for name, v in theta.items()})
            # channels_last: 1.2x the training speed of the digits U-Net on a CPU
            network = network.to(self.device).to(memory_format=torch.channels_last)
            plain = evaluator(network, self.config, self.device)
            fast = plain
            if self.config.worker.compile:
                fast = evaluator(compiled(network), self.config, self.device)
            self._networks[shapes] = network, plain, fast
        parameters = parameters_of(self._networks[shapes][0])
        for name, value in theta.items():
            parameters[name].copy_(value)
        return self._networks[shapes]

    def _images_of(self, client: int) -> np.ndarray:
        """Return the indices of a client's images."""
        return np.arange(len(self.dataset)) if self._parts is None else self._parts[client]

    def second_moment(self, client: int) -> float:
        """Return M_{n,2} of the images that a client trains on, exact; it is computed once."""
        if client not in self._moments:
            index = torch.from_numpy(self._training_images(client))
            parts = ((part, self.dataset.images[part]) for part in index.split(MOMENT_IMAGES))
            total = math.fsum(len(part) * second_moment(images) for part, images in parts)
            self._moments[client] = total / len(index)
        return self._moments[client]

    def budget(self) -> Budget:
        """Return the keep ratio that this machine can carry (pruning.budget: auto); measured once.

        Raises
        ------
        BudgetError
            Not even the smallest ratio of pruning.ladder fits.
        """
        if self._budget is None:
            assert isinstance(self._skeleton, UNet)
            assert self._layout is not None
            clients = range(self.config.clients if self._parts is not None else 1)
            most = max(map(self.examples, clients))
            with (
                pinned_threads(self.config.worker.threads),
                torch.random.fork_rng(),
                kernels(self.config, self.device),
            ):
                local = self.config.local
                local = local.model_copy(update={"batch": local.batch_of(most)})
                self._budget = measure_budget(
                    self.config.model_copy(update={"local": local}),
                    self._skeleton,
                    self._layout,
                    self.loss,
                    self.device,
                    self.steps(most),
                )
        return self._budget

    def steps(self, examples: int) -> int:
        """Return S, the local steps of a client with so many training images."""
        return self.config.local.steps_of(examples)

    def _train(
        self,
        network: nn.Module,
        plain: Network,
        fast: Network,
        task: Task,
        batches: list[np.ndarray],
        masks: Masks,
        optimiser: Optimiser,
    ) -> tuple[float, float]:
        """Take S steps of (7) on the simple loss.

        The gradient is masked, so what is dropped stays 0. Where whole channels are dropped, the
        network is small and there is nothing to mask.

        Returns
        -------
        loss, first
            The mean per image (a smaller last batch of an epoch counts for its images), and the
            loss of the first step.
        """
        config = self.config
        noise = torch_generator(
            config.seed, Purpose.NOISE, task.round, task.client, device=self.device
        )
        changes = generator(config.seed, Purpose.AUGMENTATION, task.round, task.client)
        adjust = _Adjustment(network, masks, config.local.prox)
        network.train()
        total, first = torch.zeros((), device=self.device), None
        weight = 0.0
        indices = torch.from_numpy(np.concatenate(batches)).to(self.device)  # once, not per step
        for batch in indices.split([len(batch) for batch in batches]):
            images, labels = self._batch(batch, noise, changes)
            optimiser.zero_grad(set_to_none=True)
            # a compiled network is compiled for one batch size
            forward = fast if len(batch) == config.local.batch else plain
            loss = self.loss(forward, images, noise, labels)
            loss.backward()
            adjust()
            optimiser.step()
            share = len(batch) / config.local.batch  # 1 of a full batch, to the bit
            total += loss.detach() * share
            weight += share
            first = loss.detach() if first is None else first
        return float(total) / weight, math.nan if first is None else float(first)

    def _batches(self, task: Task, train: np.ndarray, steps: int) -> list[np.ndarray]:
        """Yield the image indices of each step, from one random order of the client's images after
        another.

        With local.epochs each order is cut by itself, and its last batch may be smaller. With
        local.steps they are strung together, so that every batch is full.
        """
        local = self.config.local
        draw = generator(self.config.seed, Purpose.BATCHES, task.round, task.client)
        if local.epochs is not None:
            cuts = range(local.batch, len(train), local.batch)
            orders = [draw.permutation(train) for _ in range(local.epochs)]
            return [batch for order in orders for batch in np.split(order, cuts)]
        needed = steps * local.batch
        orders = [draw.permutation(train) for _ in range(-(-needed // len(train)))]
        return list(np.concatenate(orders)[:needed].reshape(steps, -1))

    def _batch(
        self, index: Tensor, noise: torch.Generator, changes: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        pixels = self._images[index]
        if self._augment is not None:
            pixels = self._augment(pixels, changes)
        images = to_unit(pixels)
        if self.config.data.flip:
            flipped = torch.rand(len(images), generator=noise, device=self.device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        if not self.config.model.conditional or self._labels is None:
            return images, None
        labels = self._labels[index]
        if part := self.config.model.label_dropout:
            dropped = torch.rand(len(labels), generator=noise, device=self.device) < part
            labels = torch.where(dropped, self._no_label, labels)
        return images, labels

    @torch.no_grad()
    def _holdout_loss(
        self, network: nn.Module, forward: Network, holdout: np.ndarray, client: int
    ) -> float:
        """Return the simple loss of theta_{r,n,0} on held-out images, with the same noise every
        round.
        """
        noise = torch_generator(
            self.config.seed, Purpose.HOLDOUT, client=client, device=self.device
        )
        network.eval()
        size = self.config.local.batch
        # few images are repeated up to one batch: the spread comes from times and noise
        indices = np.resize(holdout, max(len(holdout), size))
        total = 0.0
        for start in range(0, len(indices), size):
            index = torch.from_numpy(indices[start : start + size]).to(self.device)
            images, labels = to_unit(self._images[index]), None
            if self.config.model.conditional and self._labels is not None:
                labels = self._labels[index]
            total += float(self.loss(forward, images, noise, labels)) * len(index)
        return total / len(indices)


class _Adjustment:
    """What is done to the gradients of a step before the optimiser sees them.

    FedProx adds mu (theta - theta_{r,n,0}); a scattered mask keeps the gradient where it keeps.
    """

    def __init__(self, network: nn.Module, masks: Masks, mu: float):
        self._parameters = list(network.parameters())
        self._mu = mu
        self._start = [p.detach().clone() for p in self._parameters] if mu else []
        named = dict(network.named_parameters())
        self._masks = [
            (named[name], mask.bools.to(named[name].device, named[name].dtype))
            for name, mask in masks.items()
            if mask.bools is not None
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        if self._mu:
            trained = [
                (parameter.grad, parameter, start)
                for parameter, start in zip(self._parameters, self._start, strict=True)
                if parameter.grad is not None
            ]
            gradients = [gradient for gradient, _, _ in trained]
            torch._foreach_add_(gradients, [here for _, here, _ in trained], alpha=self._mu)
            torch._foreach_sub_(gradients, [start for _, _, start in trained], alpha=self._mu)
        used = [(p.grad, mask) for p, mask in self._masks if p.grad is not None]
        if used:
            torch._foreach_mul_([gradient for gradient, _ in used], [mask for _, mask in used])


def _seed(draw: np.random.Generator) -> int:
    return int(draw.integers(2**63))
