"""The planner's mathematics: hyperparameters by Remark 4.12, and how the bound moves with them.

The remark's formulas have constants it leaves open; 1 is used. Where it contradicts itself (its T
is negative for a network that has not been trained) the plan's notes say what was used instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.diffusion.partitions import kappa_minimal
from fed_diffusion.theory.bound import (
    Bound,
    Condition,
    Data,
    Steps,
    Training,
    Variant,
    largest_eta,
    theorem_4_11,
)

REMEDIES = {
    "gap": "a fairer partition of the data: this worker's loss starts off far from the mean",
    "drift": "data that differ less between workers, or a shorter way from theta_0 (smaller eta)",
    "initial": "nothing the theorem knows: it starts from F(theta_0) and never credits training",
    "pruning": "masks that drop less norm and cover every coordinate more often, or a smaller eta",
    "heterogeneity": "a smaller eta, fewer steps, or masks that cover every coordinate more often",
    "noise": "a smaller eta, larger batches, or masks that cover every coordinate more often",
    "variance": "a smaller eta, fewer steps, or larger batches",
    "kappa2_d_K": "more steps K, with a smaller kappa",
    "kappa_M2": "more steps K, with a smaller kappa",
    "kappa_d_T": "more steps K, with a smaller kappa",
    "prior": "a larger T",
}
"""What lowers each term of `Bound.terms`."""


@dataclass(frozen=True)
class Plan:
    """A plan says what to run with, and why.

    Attributes
    ----------
    T, delta, K, kappa, u
        The proposed partition u [K + 1] (`kappa_minimal`) and its numbers.
    K_wanted
        The remark's K for the target, before the cap.
    attained
        The eps^2 in nats for which the remark would have asked for this K.
    eta
        The largest admissible step size on the scale of F; 0 where none is.
    eta_limits
        Formula -> the largest eta that it allows.
    bound
        Theorem 4.11 for the plan.
    notes
        Sentences for the reader: which formulas were used, and where the remark does not hold.
    """

    T: float
    delta: float
    K: int
    kappa: float
    u: Tensor
    K_wanted: int
    attained: float
    eta: float
    eta_limits: dict[str, float]
    bound: Bound
    notes: tuple[str, ...]


def plan(
    data: Data,
    training: Training,
    *,
    eps2: float = 1.0,
    delta: float = 1e-3,
    K_max: int = 1000,
    variant: Variant = "as_proved",
    settings: tuple[Condition, ...] = (),
) -> Plan:
    """Return T, K, kappa, the partition and the largest eta for a target of eps2 nats.

    Parameters
    ----------
    data
        d and M_2.
    training
        The probe of the fresh network on the scale of F, and N, S, R, Gamma*, w^2; its eta is
        replaced by the plan's.
    eps2
        eps^2, the target for the discretisation and the prior, in nats.
    delta
        The time to data at which sampling stops early.
    K_max
        The most steps that anyone will take.
    settings
        What the theorem asks of the run's settings (`covered.assumptions`).

    Raises
    ------
    ConfigError
        eps2 or delta is out of range, or K_max is below log(1/delta), the remark's condition.
    """
    if not 0 < eps2 < math.inf:
        raise ConfigError(f"eps2 = {eps2}; a target in nats is above 0")
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta}; it must be above 0 and below 1 (Remark 4.12)")
    fewest = max(math.ceil(math.log(1 / delta)), 1)
    if K_max < fewest:
        raise ConfigError(
            f"K_max = {K_max}; delta = {delta:g} needs at least K = {fewest}, log(1 / delta) "
            "(Remark 4.12): allow more steps or raise delta"
        )
    T = horizon(data, eps2)
    wanted = steps_wanted(data, T, delta, eps2)
    K = min(max(wanted, fewest), K_max)
    u = kappa_minimal(T, delta, K)
    steps = Steps.of(u)
    attained = (data.d + data.M2) * (T + math.log(1 / delta)) ** 2 / K
    limits = eta_limits(training, variant)
    eta = min(limits.values())
    chosen = replace(training, eta=eta) if eta > 0 else training
    bound = theorem_4_11(data, steps, chosen, variant=variant, settings=settings)
    notes = [_on_T(data, training, eps2, T), _on_K(wanted, K, K_max, attained)]
    notes += [_on_delta(delta), _on_eta(training, limits, eta), advice(bound)]
    return Plan(
        T=T,
        delta=delta,
        K=K,
        kappa=steps.kappa,
        u=u,
        K_wanted=wanted,
        attained=attained,
        eta=eta,
        eta_limits=limits,
        bound=bound,
        notes=tuple(notes),
    )


def horizon(data: Data, eps2: float) -> float:
    """Return T = max(1, 1/2 log((d + M_2) / eps^2)): then (d + M_2) e^{-2T} <= eps^2."""
    return max(1.0, math.log((data.d + data.M2) / eps2) / 2)


def steps_wanted(data: Data, T: float, delta: float, eps2: float) -> int:
    """Return Remark 4.12's K = (d + M_2) (T + log(1/delta))^2 / eps^2, rounded up."""
    return max(math.ceil((data.d + data.M2) * (T + math.log(1 / delta)) ** 2 / eps2), 1)


def eta_limits(training: Training, variant: Variant = "as_proved") -> dict[str, float]:
    """Return every upper limit on eta, by formula, on the scale of F; 0 where Gamma* = 0.

    Remark 4.12's three keep a term of Theorem 4.11 within F(theta_0), up to the lemmas' constants;
    as proved, the pruning term has L^2.
    """
    t = training
    work, F0, G = t.S * t.R * t.N, t.F0, t.gamma_star
    L, power = (t.L**2, "L^2") if variant == "as_proved" else (t.L, "L")
    return {
        "Remark 4.12: F(theta_0) Gamma* / (S R N (sigma_1^2 + sigma_2^2))": _limit(
            F0 * G, work * (t.sigma1**2 + t.sigma2**2)
        ),
        f"Remark 4.12: F(theta_0) Gamma* / (S R N w^2 {power})": _limit(F0 * G, work * t.w2 * L),
        "Remark 4.12: sqrt(F(theta_0) Gamma*^2 / (S R N L sigma_1^2))": math.sqrt(
            _limit(F0 * G**2, work * t.L * t.sigma1**2)
        ),
        "Lemma 4.6: min{sqrt(Gamma* / (640 S^2 L^2 N)), 1}": (
            largest_eta(t.L, t.S, t.N, G) if G else 0.0
        ),
    }


def advice(bound: Bound) -> str:
    """Return what the bound's largest term is, and what would lower it."""
    if bound.infinite:
        return f"The bound is infinite: {bound.infinite}."
    terms = {name: value for name, value in bound.terms().items() if name != "C1"}
    name = max(terms, key=lambda key: terms[key])
    return (
        f"The largest term is {name}, {terms[name]:.4g} of {bound.total:.4g} nats; "
        f"what lowers it: {REMEDIES[name]}."
    )


@dataclass(frozen=True)
class Row:
    """The bound for one value of an argument."""

    value: float
    bound: Bound


def by_keep(
    data: Data, steps: Steps, training: Training, theta_norm2: float, keeps: Iterable[float]
) -> list[Row]:
    """Return the bound by keep ratio p, with w^2 = (1 - p) ||theta||^2 and an unchanged Gamma*.

    That w^2 is a random mask's mean; top-k masks drop less.
    """
    return [
        Row(p, theorem_4_11(data, steps, replace(training, w2=(1 - p) * theta_norm2)))
        for p in keeps
    ]


def by_workers(data: Data, steps: Steps, training: Training, counts: Iterable[int]) -> list[Row]:
    """Return the bound by N, the same share of the workers (rounded down) covering each
    coordinate.
    """
    share = training.gamma_star / training.N
    return [
        Row(
            n,
            theorem_4_11(
                data, steps, replace(training, N=n, gamma_star=math.floor(share * n + 1e-9))
            ),
        )
        for n in counts
    ]


def by_gamma(data: Data, steps: Steps, training: Training, gammas: Iterable[int]) -> list[Row]:
    """Return the bound by Gamma*, all else unchanged."""
    return [
        Row(gamma, theorem_4_11(data, steps, replace(training, gamma_star=gamma)))
        for gamma in gammas
    ]


def by_steps(
    data: Data, T: float, delta: float, training: Training, counts: Iterable[int]
) -> list[Row]:
    """Return the bound by K, each with the smallest kappa of so many steps."""
    return [
        Row(K, theorem_4_11(data, Steps.of(kappa_minimal(T, delta, K)), training)) for K in counts
    ]


def _on_T(data: Data, training: Training, eps2: float, T: float) -> str:
    used = f"T = max(1, 1/2 log((d + M2) / eps^2)) = {T:.4g} with eps^2 = {eps2:g} nats"
    if training.F0 == 0:
        return f"{used}; the remark's T, with F(theta_0) = 0 for eps^2, would be infinite."
    remark = math.log((data.d + data.M2) / training.F0) / 2
    says = f"Remark 4.12's T = 1/2 log((d + M2) / F(theta_0)) = {remark:.3g}"
    if remark >= 1:
        return f"{used}. {says} aims at F(theta_0) = {training.F0:.4g} nats only."
    why = "negative" if remark < 0 else "below 1"
    return (
        f"{used}. {says} is {why}, against the remark's own T >= 1: F(theta_0) = "
        f"{training.F0:.4g} nats of a network not yet trained is not small beside d + M2 = "
        f"{data.d + data.M2:.4g}."
    )


def _on_K(wanted: int, K: int, K_max: int, attained: float) -> str:
    says = f"Remark 4.12's K = (d + M2) (T + log(1/delta))^2 / eps^2 with constant 1 is {wanted:,}"
    if wanted <= K_max:
        return f"{says}; K = {K:,}."
    return f"{says}; capped at {K_max:,}, which attains eps^2 = {attained:.4g} nats."


def _on_delta(delta: float) -> str:
    return (
        f"delta = {delta:g} leaves noise of standard deviation "
        f"{math.sqrt(-math.expm1(-2 * delta)):.3g} in the samples (early stopping)."
    )


def _on_eta(training: Training, limits: dict[str, float], eta: float) -> str:
    if training.gamma_star == 0:
        return "No eta is admissible: Gamma* = 0, there is a coordinate that nobody trains."
    formula = min(limits, key=lambda key: limits[key])
    text = f"eta <= {eta:.4g} on the scale of F, by {formula}."
    if training.optimizer != "sgd":
        text += f" That is for plain SGD; {training.optimizer} is not covered."
    return text


def _limit(value: float, by: float) -> float:
    """Return value / by, without a limit for by = 0."""
    return value / by if by > 0 else math.inf
