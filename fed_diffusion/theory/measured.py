"""Theorem 4.11 for a run that has trained, from what its rounds measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fed_diffusion.config import Config
from fed_diffusion.data import image_shape
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.federation.coordinator import eta_of
from fed_diffusion.federation.norms import difference
from fed_diffusion.federation.records import RoundSummary
from fed_diffusion.models.build import build_network, parameters_of
from fed_diffusion.theory.advisor import advice
from fed_diffusion.theory.bound import (
    VARIANTS,
    Bound,
    Data,
    Steps,
    Training,
    lemma_4_6,
    theorem_4_11,
    to_F_scale,
)

LARGEST = ("sigma1", "sigma2", "L", "L_secant")
"""Estimates of suprema: of several rounds the largest counts."""


def measured(
    config: Config, history: Sequence[RoundSummary], theta: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The `theory` part of results.json; {"why": ...} where the bound cannot be evaluated.

    Everything on the scale of F, in nats, but `estimates`, which are on that of the simple loss.
    sigma_1, sigma_2 and L are the largest that any diagnostic round measured, eta the largest of
    any round; M_2 and F_n are those of the worker where they are largest. C_1 is not known, so that
    F_n stands for the excess F_n + C_1.

    Parameters
    ----------
    history
        All rounds of the run.
    theta
        theta_R.
    """
    rounds = [(s.round, s.theory) for s in history if s.theory is not None]
    why = _why_not(config, history, rounds)
    if why:
        return {"why": why}
    first = rounds[0][1]
    found = first["estimates"] | {
        name: max(seen, key=lambda estimate: estimate["value"])
        for name in LARGEST
        if (seen := [r["estimates"][name] for _, r in rounds if name in r["estimates"]])
    }
    d = math.prod(image_shape(config.data))
    diffusion = config.diffusion
    u = PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K)
    Z = DSMLoss(u).Z
    simple = _training(config, history, first, found, theta)
    training, data = to_F_scale(simple, Z, d), Data(d, float(first["M2"]))
    F_R = rounds[-1][1]["estimates"]["F"]["value"] * Z * d
    bounds = {v: theorem_4_11(data, Steps.of(u), training, variant=v) for v in VARIANTS}
    proved = bounds["as_proved"]
    return {
        "workers": min(r["workers"] for _, r in rounds),
        "rounds": [number for number, _ in rounds],
        "M2": data.M2,
        "Z_d": Z * d,
        "estimates": found,
        "w2_n_over_gamma": _over(training.w2 * training.N, training.gamma_star),
        "drift": training.drift,
        "F": [[number, r["estimates"]["F"]["value"] * Z * d] for number, r in rounds],
        "bound": {variant: _stated(bound) for variant, bound in bounds.items()},
        "infinite": proved.infinite,
        "covered": proved.covered,
        "conditions": [
            {"name": c.name, "holds": c.holds, "ratio": _finite(c.ratio), "says": c.says}
            for c in proved.conditions
        ],
        "lemma_4_6": _lemma_4_6(rounds, training, F_R, Z * d),
        "says": advice(proved),
    }


def _why_not(
    config: Config, history: Sequence[RoundSummary], rounds: Sequence[tuple[int, dict[str, Any]]]
) -> str:
    if config.theory.every == 0:
        return "theory.every is 0"
    if config.privacy.clip is not None:
        return "under privacy no gradient leaves a client unclipped, so nothing is measured"
    if config.round.mode == "buffered":
        return "buffered rounds are outside the theorem"
    if not rounds or rounds[0][0] != 1:
        return "no worker with the whole network answered in the first round"
    names = {name for _, r in rounds for name in r["estimates"]}
    if missing := sorted({"sigma2"} - names):
        return f"{', '.join(missing)} needs two workers with the whole network in one round"
    if not names & {"L", "L_secant"}:
        return "L was not measured"
    return "" if history else "no round has ended"


def _training(
    config: Config,
    history: Sequence[RoundSummary],
    first: Mapping[str, Any],
    found: Mapping[str, Mapping[str, float]],
    theta: Mapping[str, Tensor],
) -> Training:
    """What Lemmas 4.6 and 4.7 read, on the scale of the simple loss."""
    start = parameters_of(build_network(config))
    square, _ = difference(dict(theta), start, {})
    local = config.local
    optimizer = local.optimizer + (" with FedProx" if local.prox else "")
    return Training(
        N=config.clients,
        S=max(local.steps_of(c.images // (local.epochs or 1)) for s in history for c in s.clients),
        R=len(history),
        eta=max(eta_of(config, s.round) for s in history),
        L=max(found[name]["value"] for name in ("L", "L_secant") if name in found),
        sigma1=found["sigma1"]["value"],
        sigma2=found["sigma2"]["value"],
        w2=max(s.w2_max for s in history),
        gamma_star=min(s.gamma for s in history),
        F0=first["estimates"]["F"]["value"],
        Fn0=float(first["Fn"]),
        drift=math.sqrt(square),
        optimizer=optimizer,
        full_participation=all(len(s.clients) == config.clients for s in history),
    )


def _stated(bound: Bound) -> dict[str, Any]:
    """A bound as JSON has it: infinite values are null."""
    terms = {name: _finite(value) for name, value in bound.terms().items()}
    return {"total": _finite(bound.total), "terms": terms}


def _lemma_4_6(
    rounds: Sequence[tuple[int, dict[str, Any]]], training: Training, F_R: float, scale: float
) -> dict[str, Any]:
    """||grad F||^2 where it was measured, beside the lemma's right side for the run."""
    left = [[n, (r["estimates"]["gradient"]["value"] * scale) ** 2] for n, r in rounds]
    # an F that noise has put above F(theta_0) would make a negative term
    right = lemma_4_6(training, min(F_R, training.F0))
    return {
        "left": left,
        "right": _finite(sum(right)),
        "terms": {name: _finite(value) for name, value in right._asdict().items()},
    }


def _over(value: float, by: float) -> float | None:
    return value / by if by else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
