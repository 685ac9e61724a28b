"""Theorem 4.11 for a run that has trained, from what its rounds measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from fed_diffusion.analysis.advisor import advice
from fed_diffusion.analysis.covered import assumptions, caveats, images
from fed_diffusion.build import Setup
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.schema import LocalConfig
from fed_diffusion.protocol.codecs import difference
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.theory.bound import (
    VARIANTS,
    Bound,
    Data,
    Steps,
    Training,
    Variant,
    lemma_4_6,
    theorem_4_11,
    to_F_scale,
)
from fed_diffusion.theory.estimates import Estimate, largest, pooled
from fed_diffusion.theory.sketch import SKETCH

Measured = tuple[int, Mapping[str, Any]]
"""A round (1-based) and what was measured in it (`diagnostics.close`)."""


def measured(
    setup: Setup, history: Sequence[RoundSummary], theta: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the `theory` part of results.json; {"why": ...} where the bound cannot be evaluated.

    Everything on the scale of F, in nats, but `estimates`, which are on that of the simple loss.
    The squares of sigma_1 and sigma_2 are means over the diagnostic rounds, sigma_2 of the worker
    where this is largest and sigma_1 the mean over workers. L is the largest that any round
    measured (of a secant the lower end of its interval), eta the largest of any round; M_2 and F_n
    are those of the worker where they are largest. C_1 is not known, so that F_n stands for the
    excess F_n + C_1.

    Parameters
    ----------
    history
        All rounds of the run.
    theta
        theta_R.
    """
    config = setup.config
    asked = [(s.round, s.theory) for s in history if s.theory is not None]
    unanswered = [
        {"round": number, **entry} for number, r in asked for entry in r.get("unanswered", ())
    ]
    rounds = [(number, r) for number, r in asked if r["workers"]]
    why = _why_not(config, history, rounds)
    if why:
        return {"why": why} | ({"unanswered": unanswered} if unanswered else {})
    try:
        start = setup.theta()
    except ConfigError as error:  # what the run started from is gone: that ends no run
        return {"why": f"theta_0 cannot be read again: {error}"}
    first = rounds[0][1]
    found = _estimates(rounds)
    d, u, Z = setup.d, setup.u, setup.Z
    steps = steps_taken(config.local, history)
    simple = _training(setup, history, found, (start, theta), max(steps))
    training, data = to_F_scale(simple, Z, d), Data(d, float(first["M2"]))
    asks = assumptions(setup, steps, precisions(history))

    def bound(training: Training, variant: Variant) -> Bound:
        return theorem_4_11(data, Steps.of(u), training, variant=variant, settings=asks)

    proved = bound(training, "as_proved")
    ends = _ends(found, Z * d)
    return {
        "workers": min(r["workers"] for _, r in rounds),
        "minibatches": min(r["minibatches"] for _, r in rounds),
        "rounds": [number for number, _ in rounds],
        "unanswered": unanswered,
        "M2": data.M2,
        "Z_d": Z * d,
        "estimates": {name: estimate.to_dict() for name, estimate in found.items()},
        "w2_n_over_gamma": _over(training.w2 * training.N, training.gamma_star),
        "drift": training.drift,
        "F": [[number, r["estimates"]["F"]["value"] * Z * d] for number, r in rounds],
        "bound": {v: _stated(partial(bound, variant=v), training, ends) for v in VARIANTS},
        "infinite": proved.infinite,
        "covered": proved.covered,
        "conditions": [
            {"name": c.name, "holds": c.holds, "ratio": _finite(c.ratio), "says": c.says}
            for c in proved.conditions
        ],
        "caveats": [*caveats(config.local, steps), *_unresolved(found, training, Z * d)],
        "images": images(setup),
        "lemma_4_6": _lemma_4_6(rounds, training, Z * d),
        "says": advice(proved),
    }


def steps_taken(local: LocalConfig, history: Sequence[RoundSummary]) -> set[int]:
    """S of all clients in all rounds, by what they report of their images."""
    if local.steps is not None:
        return {local.steps}
    epochs = local.epochs or 1
    return {
        epochs * max(1, -(-c.images // (epochs * local.batch))) for s in history for c in s.clients
    }


def precisions(history: Sequence[RoundSummary]) -> set[str]:
    """Return what the workers computed in, as they report it."""
    return {client.precision for s in history for client in s.clients}


def _estimates(rounds: Sequence[Measured]) -> dict[str, Estimate]:
    """Return estimates of the whole run: at theta_0, the mean over rounds, or the largest of a
    round.
    """

    def every(kind: str, name: str) -> list[Estimate]:
        return [Estimate(**r[kind][name]) for _, r in rounds if name in r[kind]]

    at_first = rounds[0][1]["estimates"]
    found = {name: Estimate(**at_first[name]) for name in ("F", "Fn", "gradient")}
    found["sigma1"] = pooled(every("squares", "sigma1"), SKETCH).root()
    clients = {client for _, r in rounds for client in r["distances"]}
    of_each = [pooled(every("distances", client), SKETCH) for client in sorted(clients, key=int)]
    found["sigma2"] = largest(of_each, pooled(every("squares", "sigma2"), SKETCH)).root()
    if seen := every("estimates", "L"):
        found["L"] = max(seen, key=lambda estimate: estimate.value)
    if seen := every("estimates", "L_secant"):
        found["L_secant"] = max(seen, key=lambda estimate: (_sure(estimate), estimate.value))
    return found


def _L(found: Mapping[str, Estimate]) -> float:
    """Return the largest curvature seen, of secants only what their noise leaves.

    Where theta has hardly moved, a secant is nothing but the gradients' noise over a tiny way.
    """
    if "L" not in found:
        return found["L_secant"].value
    return max(found["L"].value, _sure(found["L_secant"]) if "L_secant" in found else 0.0)


def _sure(found: Estimate) -> float:
    """Return the lower end of an interval; the value where nothing is known of its noise."""
    ends = found.limits()
    return found.value if ends is None else ends[0]


def _unresolved(found: Mapping[str, Estimate], training: Training, scale: float) -> list[str]:
    """Say that sigma_2 is lost in noise, where it is: its term is then lost too, and not 0."""
    ends = found["sigma2"].limits()
    if ends is None or ends[0] > 0 or ends[1] <= 0:
        return []
    return [
        f"sigma_2 cannot be told from 0 by so many minibatches: sigma_2 ||theta_R - theta_0|| may "
        f"be up to {ends[1] * scale * training.drift:.4g} nats. More diagnostic rounds "
        "(theory.every) narrow that."
    ]


def _ends(found: Mapping[str, Estimate], scale: float) -> list[tuple[str, float, float]]:
    """Return arguments of the bound with the ends of their intervals, on the scale of F."""
    names = {"sigma1": "sigma1", "sigma2": "sigma2", "F0": "F", "Fn0": "Fn"}
    known = [(name, found[key].limits()) for name, key in names.items()]
    return [
        (name, max(ends[0], 0.0) * scale, ends[1] * scale)
        for name, ends in known
        if ends is not None
    ]


def _why_not(config: Config, history: Sequence[RoundSummary], rounds: Sequence[Measured]) -> str:
    if config.theory.every == 0:
        return "theory.every is 0"
    if config.privacy.clip is not None:
        return "under privacy no gradient leaves a client unclipped, so nothing is measured"
    if config.secure.aggregation:
        return "under secure aggregation no gradient leaves a client, so nothing is measured"
    if config.round.mode != "synchronous":
        return f"{config.round.mode} rounds are outside the theorem"
    if history and (lost := history[-1].round - len(history)):
        return f"metrics.jsonl has lost {lost} of the rounds, whose Gamma and w^2 are not known"
    if not rounds or rounds[0][0] != 1:
        return "no worker with the whole network answered in the first round"
    names = {name for _, r in rounds for name in r["estimates"]}
    if "sigma2" not in names:
        return "sigma2 needs two workers with the whole network in one round"
    if not names & {"L", "L_secant"}:
        return "L was not measured"
    return "" if history else "no round has ended"


def _training(
    setup: Setup,
    history: Sequence[RoundSummary],
    found: Mapping[str, Estimate],
    ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    S: int,
) -> Training:
    """What Lemmas 4.6 and 4.7 read, on the scale of the simple loss.

    Parameters
    ----------
    ends
        theta_0 and theta_R.
    """
    config, (start, theta) = setup.config, ends
    square, _ = difference(dict(theta), dict(start), {})
    return Training(
        N=config.clients,
        S=S,
        R=len(history),
        eta=max(s.eta for s in history),
        L=_L(found),
        sigma1=found["sigma1"].value,
        sigma2=found["sigma2"].value,
        w2=max(s.w2_max for s in history),
        gamma_star=min(s.gamma for s in history),
        F0=found["F"].value,
        Fn0=found["Fn"].value,
        drift=math.sqrt(square),
        optimizer=config.local.optimizer,
        full_participation=all(len(s.clients) == config.clients for s in history),
    )


def _stated(
    bound: Callable[[Training], Bound],
    training: Training,
    ends: Sequence[tuple[str, float, float]],
) -> dict[str, Any]:
    """Return a bound for JSON, null for infinity, with the interval that `ends` imply.

    One argument at a time is taken to either end; the changes add up as independent errors do.
    """
    here = bound(training)
    below = above = 0.0
    for name, *both in ends:
        moved: list[dict[str, Any]] = [{name: end} for end in both]
        totals = [bound(replace(training, **change)).total for change in moved]
        below = math.hypot(below, here.total - min(*totals, here.total))
        above = math.hypot(above, max(*totals, here.total) - here.total)
    return {
        "total": _finite(here.total),
        "low": _finite(here.total - below),
        "high": _finite(here.total + above),
        "terms": {name: _finite(value) for name, value in here.terms().items()},
    }


def _lemma_4_6(rounds: Sequence[Measured], training: Training, scale: float) -> dict[str, Any]:
    """Return ||grad F||^2 as it was measured, beside the lemma's right side.

    F was last measured at theta_r, r = `rounds`, where the last diagnostic round began: the right
    side is that of r rounds, and bounds the mean over theta_0, ..., theta_{r-1}. The left side is
    [round, ||grad F||^2, half its interval]: an unbiased estimate, which noise can bring below 0.
    """
    left = []
    for number, r in rounds:
        square = Estimate(**r["squares"]["gradient"]).scaled(scale**2)
        left.append([number, square.value, square.error])
    last, at_last = rounds[-1]
    if last == 1:  # F is known at theta_0 alone
        return {"rounds": 0, "left": left, "right": None, "terms": {}}
    F_r = at_last["estimates"]["F"]["value"] * scale
    right = lemma_4_6(replace(training, R=last - 1), F_r)
    return {
        "rounds": last - 1,
        "left": left,
        "right": _finite(sum(right)),
        "terms": {name: _finite(value) for name, value in right._asdict().items()},
    }


def _over(value: float, by: float) -> float | None:
    return value / by if by else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
