"""A short probe of a new network: what a plan needs to know of a run before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.analysis.covered import assumptions
from fed_diffusion.build import Setup
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.compute import kernels, pinned_threads
from fed_diffusion.common.rng import Purpose, torch_generator
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import ImageSet, class_count
from fed_diffusion.masks.families import derive
from fed_diffusion.masks.families.weights import in_scope
from fed_diffusion.masks.mask import Masks, Scattered, kept_values, pruning_error
from fed_diffusion.masks.plan import able, plan_round
from fed_diffusion.theory.bound import Condition, Data, Training, to_F_scale
from fed_diffusion.theory.curvature import curvature
from fed_diffusion.theory.estimates import (
    Estimate,
    gradient_distance,
    gradient_norm,
    gradient_variance,
    largest,
    largest_mean,
    mean,
    worker_distances,
)
from fed_diffusion.theory.sketch import Sketch, sampled_gradients

HEAVY = 2**30
"""Parameters times pixels above which the probe takes few images, at seconds each on a CPU."""
MOST_WORKERS = 10
SKETCH = 4096
"""The numbers in a sketch: squared norms have a standard error of 2.2 %."""


@dataclass(frozen=True)
class Effort:
    """How much is computed: workers, minibatches of each, images in each, Hessian products."""

    workers: int
    minibatches: int
    images: int
    products: int


@dataclass(frozen=True)
class Probe:
    """What was measured at theta_0.

    Attributes
    ----------
    data
        d, and M_2 of the worker where it is largest.
    training
        The arguments of the lemmas on the scale of F, with the configuration's eta.
    Z
        The factor of the configuration's partition: F is Z d times the simple loss.
    theta_norm2
        The squared norm of all that a scattered mask may drop.
    estimates
        The estimates on the scale of the simple loss, with their errors.
    settings
        What the theorem asks of the run's settings.
    notes
        What was assumed, and how much was looked at.
    """

    data: Data
    training: Training
    Z: float
    theta_norm2: float
    estimates: dict[str, Estimate]
    settings: tuple[Condition, ...]
    notes: tuple[str, ...]

    def at(self, eta: float) -> Training:
        """Return the training at another step size on F's scale; the drift is that of so many
        steps.
        """
        t = self.training
        return replace(t, eta=eta, drift=t.drift * eta / t.eta)


def probe(setup: Setup, dataset: ImageSet, notes: tuple[str, ...] = ()) -> Probe:
    """Measure theta_0 on a few minibatches of a run's workers.

    sigma_1^2 is brought to the real batch size as the variance of independent images; stratified
    times make larger minibatches better than that. F_n(theta_0) is that of the worker where it is
    largest. ||theta_R - theta_0|| is eta S R ||grad F(theta_0)||, as if every step were the first.
    """
    config, d, theta = setup.config, setup.d, setup.theta()
    worker = Worker(setup, dataset)
    effort = _effort(setup, sum(value.numel() for value in theta.values()))
    sketch = Sketch(config.seed, SKETCH)
    losses, sketches = [], []
    threads = config.worker.threads
    with torch.random.fork_rng(), pinned_threads(threads), kernels(config.worker, worker.device):
        for client in range(effort.workers):
            parameters, network, drawn = worker.minibatches(
                theta, client, 0, effort.minibatches, effort.images
            )
            few = (partial(batch.loss, network) for batch in drawn)
            values, gradients = sampled_gradients(parameters, few, sketch)
            losses.append(values)
            sketches.append(gradients)
        L = _curvature(worker, theta, effort)
    gradients = torch.stack(sketches)
    gamma, w2, full = _masks(setup, theta)
    M2 = max(map(worker.images.second_moment, range(config.clients)))
    sizes = set(map(worker.examples, range(config.clients)))
    steps = {worker.steps(size) for size in sizes}
    S = max(steps)
    share = min(1.0, effort.images / min(config.local.batch_of(size) for size in sizes))
    F = mean([value for values in losses for value in values])
    found = {
        "F": F,
        "Fn": largest_mean(losses),
        "sigma1": gradient_variance(gradients).scaled(share).root(),
        "sigma2": largest(worker_distances(gradients), gradient_distance(gradients)).root(),
        "gradient": gradient_norm(gradients).root(),
        "L": L,
    }
    eta = config.local.eta
    simple = Training(
        N=config.clients,
        S=S,
        R=config.rounds,
        eta=eta,
        L=L.value,
        sigma1=found["sigma1"].value,
        sigma2=found["sigma2"].value,
        w2=w2,
        gamma_star=gamma,
        F0=found["F"].value,
        Fn0=found["Fn"].value,
        drift=eta * S * config.rounds * found["gradient"].value,
        optimizer=config.local.optimizer,
        full_participation=full,
    )
    return Probe(
        data=Data(d, M2),
        training=to_F_scale(simple, setup.Z, d),
        Z=setup.Z,
        theta_norm2=pruning_error(_nothing_kept(config.pruning.scope, theta), theta),
        estimates=found,
        settings=assumptions(setup, steps),
        notes=(*notes, _looked_at(config, effort)),
    )


def stand_in(setup: Setup, M2: float | None = None) -> tuple[ImageSet, tuple[str, ...]]:
    """Images where the real ones are out of reach: every pixel +-sqrt(M_2 / d), at random.

    M_2 = d unless it is known; images in [-1, 1] cannot have more.

    Raises
    ------
    ConfigError
        No images in [-1, 1] have this M_2.
    """
    config, shape, d = setup.config, setup.shape, setup.d
    if M2 is not None and not 0 < M2 <= d:
        raise ConfigError(
            f"--data-moment = {M2:g} is not allowed; E ||X_0||^2 of images in [-1, 1] with "
            f"{d} values is above 0 and at most {d}."
        )
    level = math.sqrt((d if M2 is None else M2) / d)
    n = max(config.clients * config.local.batch, 256)
    random = torch_generator(config.seed, Purpose.PROBE)
    signs = torch.randint(0, 2, (n, *shape), generator=random) * 2 - 1
    images = ((signs * level + 1) * 127.5).round().to(torch.uint8)
    classes = class_count(config.data)
    labels = None if classes is None else torch.arange(n) % classes
    known = "given" if M2 is not None else "assumed, the most that images in [-1, 1] can have"
    note = (
        f"No images were read: M2 = {level**2 * d:.4g} is {known}, d = {d} is the data set's, and "
        "the network was probed with random pixels of that size in place of images, alike for all "
        "workers (so sigma_2 says nothing about the real ones)."
    )
    return ImageSet(images, labels, name=config.data.name), (note,)


def _effort(setup: Setup, parameters: int) -> Effort:
    config, (_, height, width) = setup.config, setup.shape
    if parameters * height * width > HEAVY:
        return Effort(min(config.clients, 2), 2, min(config.local.batch, 2), 1)
    return Effort(min(config.clients, MOST_WORKERS), 4, min(config.local.batch, 32), 10)


def _curvature(worker: Worker, theta: dict[str, Tensor], effort: Effort) -> Estimate:
    parameters, network, drawn = worker.minibatches(theta, 0, 0, 1, effort.images)
    return curvature(parameters, network, next(drawn), effort.products)


def _masks(setup: Setup, theta: dict[str, Tensor]) -> tuple[int, float, bool]:
    """Gamma, w^2 of the first round's masks, and whether every worker takes part."""
    config, family, layout = setup.config, setup.family, setup.layout
    ratios = setup.known_ratios()
    keeps = {client: ratios[client] for client in able(config.pruning, ratios)}
    if config.pruning.budget != "level":  # nodes have not said yet: as if all could carry it
        keeps = dict.fromkeys(range(config.clients), 1.0)
    full = len(keeps) == config.clients and config.round.fraction == 1
    recipes = plan_round(family, config.pruning.kind, 1, keeps, theta, layout)
    if all(recipe.whole() for recipe in recipes.values()):
        return len(keeps), 0.0, full
    mean, w2 = MaskedMean(theta, config.clients), 0.0
    for recipe in recipes.values():
        masks = derive(family, recipe, theta, layout)
        mean.add(kept_values(theta, masks), masks)
        w2 = max(w2, pruning_error(masks, theta))
    return mean.coverage.gamma(), w2, full


def _nothing_kept(scope: str, theta: dict[str, Tensor]) -> Masks:
    scoped = in_scope(theta, scope)
    return {n: Scattered(torch.zeros(v.shape, dtype=torch.bool)) for n, v in scoped.items()}


def _looked_at(config: Config, effort: Effort) -> str:
    text = (
        f"Probed at theta_0: {effort.workers} of {config.clients} workers, {effort.minibatches} "
        f"minibatches of {effort.images} images each; L from {effort.products} Hessian "
        f"product{'s' if effort.products > 1 else ''} on one minibatch. sigma_1, sigma_2 and L "
        "are of theta_0 alone, and the theorem's are the largest anywhere."
    )
    if effort.images < config.local.batch:
        text += f" sigma_1 is scaled to the real batch of {config.local.batch}."
    if config.pruning.budget != "level":
        text += f" pruning.budget = {config.pruning.budget}: taken as if nothing were dropped."
    return text
