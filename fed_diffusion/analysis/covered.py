"""What Theorem 4.11 and its proof ask of a run's settings, and which images they are about."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from fed_diffusion.build import Setup
from fed_diffusion.common.rng import Purpose, seed_torch, torch_generator
from fed_diffusion.config.schema import LocalConfig
from fed_diffusion.theory.bound import Condition, yes_or_no

NOISY_LAYERS = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.RReLU,
)
"""Layers that make the network another function in training than in sampling."""
TRIED = 16
"""The number of images on which a network is tried."""


def assumptions(
    setup: Setup, steps: Collection[int], precisions: Collection[str] = ()
) -> tuple[Condition, ...]:
    """Return what is asked of the settings, a condition each; `bound.conditions` has the rest.

    Settings that stand in no condition change nothing that the proof reads: the data and their
    split (Assumption 4.4 holds for all images), the kind of the masks (w^2 and Gamma* say what they
    cost), the prediction (a converter onto the same score), sampling (`images`), and whatever
    leaves clients out (`full participation` is counted, not read from the settings).

    Parameters
    ----------
    steps
        S of all clients in all rounds.
    precisions
        What they computed in; default: what this machine computes in.
    """
    config = setup.config
    local, rounds, wire, model = config.local, config.round, config.wire, config.model
    varies = [f"local.warmup = {local.warmup}"] if local.warmup else []
    varies += [f"local.schedule = {local.schedule}"] if local.schedule != "constant" else []
    clip = config.privacy.clip
    computed = set(precisions) or {setup.precision}
    fewest, most = min(steps), max(steps)
    return (
        yes_or_no(
            "synchronous rounds", rounds.mode == "synchronous", f"round.mode = {rounds.mode}"
        ),
        yes_or_no(
            "the mean of equation (8)",
            rounds.aggregation == "mean",
            f"round.aggregation = {rounds.aggregation}",
        ),
        yes_or_no(
            "no server optimiser",
            config.server.optimizer == "none",
            f"server.optimizer = {config.server.optimizer}",
        ),
        yes_or_no(
            "equal weights", rounds.weighting == "uniform", f"round.weighting = {rounds.weighting}"
        ),
        yes_or_no(
            "the same S for all",
            fewest == most,
            f"S = {most}" if fewest == most else f"S is from {fewest} to {most}",
        ),
        yes_or_no("one eta", not varies, ", ".join(varies) or f"local.eta = {local.eta:g}"),
        yes_or_no("no proximal term", local.prox == 0, f"local.prox = {local.prox:g}"),
        yes_or_no("no weight decay", local.decay == 0, f"local.weight_decay = {local.decay:g}"),
        yes_or_no(
            "whole gradients",
            local.max_grad_norm is None,
            "local.max_grad_norm is off"
            if local.max_grad_norm is None
            else f"local.max_grad_norm = {local.max_grad_norm:g}",
        ),
        _no_dropout(setup),
        yes_or_no(
            "no dropped labels",
            model.label_dropout == 0,
            f"model.label_dropout = {model.label_dropout:g}",
        ),
        yes_or_no(
            "gradients in fp32",
            computed == {"fp32"},
            f"arithmetic in {' and '.join(sorted(computed))}",
        ),
        yes_or_no(
            "nothing rounded on the way",
            wire.down == wire.up == "fp32",
            f"wire.down = {wire.down}, wire.up = {wire.up}",
        ),
        yes_or_no(
            "no clipping and no noise",
            clip is None,
            "privacy.clip is off" if clip is None else f"privacy.clip = {clip:g}",
        ),
    )


def _no_dropout(setup: Setup) -> Condition:
    """F_n is a loss of the network that samples, and dropout trains another one."""
    model = setup.config.model
    says = f"model.dropout = {model.dropout:g}"
    layers: set[str] = set()
    differs = ""
    if model.name != "unet":
        network = setup.network(started=False)
        modules = network.modules()
        noisy = [module for module in modules if isinstance(module, NOISY_LAYERS)]
        layers = {type(module).__name__ for module in noisy if getattr(module, "p", 1) != 0}
        differs = ", ".join(sorted(layers)) or _differs_in_training(network, setup)
        says += f", and {model.name} has {differs or 'nothing of that kind'}"
    return yes_or_no("no dropout", model.dropout == 0 and not differs, says)


@torch.no_grad()
def _differs_in_training(network: nn.Module, setup: Setup) -> str:
    """How a network is another function in training than in sampling; empty where it is not.

    The network is tried on noise, with noise added to its parameters: layers that start at 0 hide
    others.
    """
    seed = setup.config.seed
    noise = torch_generator(seed, Purpose.PROBE)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    x = torch.randn((TRIED, *setup.shape), generator=noise)
    u, labels = torch.ones(TRIED, dtype=torch.float64), None
    if classes := setup.classes:
        labels = torch.arange(TRIED) % classes
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed, Purpose.PROBE, cuda=False)
        try:
            found = [network.train(mode)(x, u, labels) for mode in (False, True)]
        except Exception as error:  # a user's code, at the end of a run that must not be lost
            return f"an error where it was tried on this machine ({type(error).__name__}: {error})"
    return "" if torch.equal(*found) else "another value in training than in sampling"


def images(setup: Setup) -> dict[str, Any]:
    """The images that the bound is about, those that the run samples, and how these differ."""
    config = setup.config
    diffusion, evaluation = config.diffusion, config.evaluation
    steps = evaluation.steps or diffusion.K
    averaged = config.ema.decay > 0
    told = "labels" if config.model.text is None else "captions"
    conditional = config.model.conditional or config.model.text is not None
    precision = setup.precision
    about = (
        f"theta_R, sampled by the exponential integrator in K = {diffusion.K} steps of the "
        f"partition {diffusion.partition} from T = {diffusion.T:g} to delta = {diffusion.delta:g}, "
        "without a last denoising step and without guidance"
    )
    if conditional:
        about += f", with {told} drawn as they occur among the worker's images"
    model = f"the moving average (ema.decay = {config.ema.decay:g})" if averaged else "theta_R"
    run = f"{model}, sampled by {evaluation.sampler} in {steps} steps"
    run += ", with a last denoising step" if evaluation.denoise else ""
    run += f", with guidance {evaluation.guidance:g}" if evaluation.guidance else ""
    every = "every label" if config.model.text is None else "every prompt"
    run += f", with {every} equally often" if conditional else ""
    different = {
        "the moving average in place of theta_R": averaged,
        f"the sampler {evaluation.sampler}": evaluation.sampler != "exponential_integrator",
        f"{steps} steps in place of K = {diffusion.K}": steps != diffusion.K,
        "a last denoising (Tweedie) step": evaluation.denoise,
        f"guidance {evaluation.guidance:g}": evaluation.guidance > 0,
        f"{every} equally often": conditional,
        f"arithmetic in {precision}": precision != "fp32",
    }
    return {
        "bound": about,
        "compared_with": "the images that the worker trains on"
        + (", each of them mirrored half of the time" if config.data.flip else "")
        + ", noised up to delta",
        "run": run,
        "differences": [what for what, differs in different.items() if differs],
    }


def caveats(local: LocalConfig, steps: Collection[int]) -> list[str]:
    """What holds for every run: what the theorem leaves open, or its proof takes for granted."""
    found = [
        "sigma_1, sigma_2 and L are measured at a few theta, and the theorem asks for their "
        "largest values anywhere: the bound, and the condition on eta, are as good as these "
        "estimates.",
        'The theorem leaves a constant open ("<~"): it is taken as 1. C_1, which is never above 0, '
        "is taken as 0.",
    ]
    if max(steps) > 1:
        found.append(
            "The proof has independent minibatches; a worker takes its images in random order, "
            "each once before any comes again, so that those of a round are not independent."
        )
    if local.epochs is not None:
        found.append(
            "The last batch of a pass over a worker's images may be smaller: sigma_1 is that of "
            "full batches, and a smaller one's is larger."
        )
    return found
