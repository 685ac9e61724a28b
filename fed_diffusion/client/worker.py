"""The client's side of a round: equation (7) under a mask, on images that stay here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fed_diffusion.build import Setup, parameters_of
from fed_diffusion.client import diagnostics
from fed_diffusion.client.budget import measure_budget
from fed_diffusion.client.images import ClientImages
from fed_diffusion.client.networks import Networks
from fed_diffusion.client.optimisers import Optimiser, SharedAdam, optimiser_of
from fed_diffusion.common.compute import kernels, pinned_threads
from fed_diffusion.common.rng import Purpose, generator, seed_torch, torch_generator
from fed_diffusion.config import Config
from fed_diffusion.config.schema import LocalConfig
from fed_diffusion.data import ImageSet
from fed_diffusion.diffusion.loss import Network, NoisyBatch
from fed_diffusion.masks.budget import Budget
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Numbers
from fed_diffusion.models.checkpointing import checkpointed
from fed_diffusion.protocol.clipping import clipped
from fed_diffusion.protocol.divergence import note_divergence
from fed_diffusion.protocol.messages import PRECISION, PRECISIONS, Task, Update
from fed_diffusion.protocol.moments import decode_state, encode_moments
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.protocol.wire import Payload, Wire, decode_task, encode_update


class Worker:
    """A worker runs tasks for any client of a run, and keeps the model and the data between them.

    A task that drops whole channels builds, trains and holds only the smaller network. Nothing of a
    task's result depends on what ran before it: workers are stateless between rounds, and the state
    of an optimiser that goes on (local.state) comes with the task.

    Parameters
    ----------
    run
        The configuration of the run, or the setup that was made of it.
    dataset
        The images; by default those that the configuration names.
    own
        The data set is one client's own: all of it is that client's, whichever number it has (the
        number still says which randomness is its). Default: it is shared, and partitioned.
    """

    def __init__(self, run: Config | Setup, dataset: ImageSet | None = None, *, own: bool = False):
        self.setup = setup = Setup.of(run)
        self.config = config = setup.config
        self.device = setup.device
        self.images = ClientImages(setup, dataset, own)
        self.dataset = self.images.dataset
        self.networks = Networks(setup)
        self.wire = Wire(config.wire, config.pruning, config.local, setup.family, config.seed)
        self.shapes, self.layout, self.loss = setup.shapes, setup.layout, setup.loss
        self._budget: Budget | None = None

    def run(self, task: Task) -> Update:
        """Decode theta_{r,n,0}, take S local steps (7), send back what the mask keeps."""
        worker = self.config.worker
        with (
            pinned_threads(worker.threads),
            torch.random.fork_rng(),
            kernels(worker, self.device),
        ):
            return self._run(task)

    def _run(self, task: Task) -> Update:
        began = time.perf_counter()
        config, seed = self.config, self.config.seed
        seed_torch(seed, Purpose.DROPOUT, task.round, task.client)
        recipe, masks, start = decode_task(task.payload, self.shapes, self.layout, self.wire)
        train, holdout = self.images.of(task.client)
        measured, sketches = diagnostics.measure(self, start, task)
        network, forward, fast = self.networks.holding(start, masks)
        numbers: Numbers = recipe.to_metrics() | measured
        if len(holdout):
            numbers["holdout_loss"] = self._holdout_loss(network, forward, holdout, task.client)
        batches = self.images.batches(task.round, task.client, train, self.steps(len(train)))
        arrays, dtype = task.payload.arrays, config.wire.state
        state = decode_state(arrays, self.shapes, masks, config.local, dtype)
        eta = eta_of(config.local, config.rounds, task.round)
        optimiser = optimiser_of(config.local, network, eta, state)
        with checkpointed(network, config.worker.checkpointing):
            loss, first = self._train(network, forward, fast, task, batches, masks, optimiser)
        numbers["loss"] = loss
        hide = config.privacy.noise == "clients"  # who is lost must not depend on the images
        note_divergence(numbers, first, config.clients if hide else None)
        numbers["images"], numbers["examples"] = sum(map(len, batches)), len(train)
        numbers[PRECISION] = PRECISIONS.index(self.setup.precision)
        numbers["seconds"] = time.perf_counter() - began
        end = parameters_of(network)
        if config.privacy.clip is not None:
            end = clipped(end, start, config.privacy.clip)
        arrays = encode_update(end, start, masks, self.wire, task.round, task.client) | sketches
        if isinstance(optimiser, SharedAdam):
            arrays |= encode_moments(
                optimiser.moments(), masks, dtype, config.seed, task.round, task.client
            )
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
        network, forward, _ = self.networks.holding(theta)
        network.eval()
        train = self.images.of(client).train
        if self.config.local.epochs is not None:
            size = min(size, len(train))

        def drawn() -> Iterator[NoisyBatch]:
            draw = generator(self.config.seed, Purpose.DIAGNOSTIC, round, client)
            for _ in range(count):
                index = draw.choice(train, size, replace=size > len(train))
                noise = torch_generator(_seed(draw), Purpose.DIAGNOSTIC, device=self.device)
                chosen = torch.from_numpy(index).to(self.device)
                images, labels = self.images.batch(chosen, noise, draw)
                yield self.loss.draw(images, noise, labels)

        return list(network.parameters()), forward, drawn()

    def examples(self, client: int) -> int:
        """How many images a client trains on."""
        return len(self.images.of(client).train)

    def budget(self) -> Budget:
        """Return the keep ratio that this machine can carry (pruning.budget: auto); measured once.

        Raises
        ------
        BudgetError
            Not even the smallest ratio of pruning.ladder fits.
        """
        if self._budget is None:
            config = self.config
            clients = range(config.clients if self.images.shares is not None else 1)
            most = max(map(self.examples, clients))
            local = config.local.model_copy(update={"batch": config.local.batch_of(most)})
            setup = Setup.of(config.model_copy(update={"local": local}))
            with (
                pinned_threads(config.worker.threads),
                torch.random.fork_rng(),
                kernels(config.worker, self.device),
            ):
                self._budget = measure_budget(setup, self.steps(most))
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
        adjust = _Adjustment(network, masks, config.local)
        network.train()
        total, first = torch.zeros((), device=self.device), None
        weight = 0.0
        indices = torch.from_numpy(np.concatenate(batches)).to(self.device)  # once, not per step
        for batch in indices.split([len(batch) for batch in batches]):
            images, labels = self.images.batch(batch, noise, changes)
            optimiser.zero_grad()
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
            images, labels = self.images.plain(index)
            total += float(self.loss(forward, images, noise, labels)) * len(index)
        return total / len(indices)


class _Adjustment:
    """What is done to the gradients of a step before the optimiser sees them.

    FedProx adds mu (theta - theta_{r,n,0}); a scattered mask keeps the gradient where it keeps; a
    gradient that is too long is scaled down.
    """

    def __init__(self, network: nn.Module, masks: Masks, local: LocalConfig):
        self._parameters = list(network.parameters())
        self._mu, self._most = (mu := local.prox), local.max_grad_norm
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
        if self._most is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._most)


def _seed(draw: np.random.Generator) -> int:
    return int(draw.integers(2**63))
