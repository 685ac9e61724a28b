"""The generation error bound of Theorem 4.11, lemma by lemma, as numbers.

Two variants. `as_proved` (the default) has what the proof in Appendix C gives in equation (18):
L^2 with the pruning error, and 10 and 5/4 with sigma_2^2. `as_printed` has the statements of
Lemmas 4.6 and 4.7: L, 40 and 5. As printed Lemma 4.6 is false (tests/theory/test_bound.py has a
counterexample). The theorem is the sum of Lemmas 4.7, 4.8, 4.5 and 4.10 times the absolute constant
that its "<~" leaves open: 1 for Girsanov, 2 after A_1 - A_3 is split, 1/2 for the prior, and a
constant of Benton et al. (2024) in Lemma 4.5.

Everything is on the scale of F (5), in nats; `to_F_scale` converts from the simple loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.theory.inputs import Data as Data
from fed_diffusion.theory.inputs import Steps as Steps
from fed_diffusion.theory.inputs import Training as Training
from fed_diffusion.theory.inputs import eta_from_F_scale as eta_from_F_scale
from fed_diffusion.theory.inputs import to_F_scale as to_F_scale

Variant = Literal["as_proved", "as_printed"]
VARIANTS: tuple[Variant, ...] = ("as_proved", "as_printed")


class Discretisation(NamedTuple):
    """The right side of Lemma 4.5: kappa^2 d K, kappa M_2, kappa d T."""

    kappa2_d_K: float
    kappa_M2: float
    kappa_d_T: float


def lemma_4_5(data: Data, steps: Steps) -> Discretisation:
    """Return the time discretisation error, up to an absolute constant."""
    kappa = steps.kappa
    return Discretisation(kappa**2 * data.d * steps.K, kappa * data.M2, kappa * data.d * steps.T)


def largest_eta(L: float, S: int, N: int, gamma_star: int) -> float:
    """Return the largest eta of Lemma 4.6, min{sqrt(Gamma* / (640 S^2 L^2 N)), 1}, on F's scale."""
    return min(math.sqrt(gamma_star / (640 * N)) / (S * L), 1.0) if L > 0 else 1.0


class GradientNorm(NamedTuple):
    """The right side of Lemma 4.6, term by term as it is printed."""

    progress: float
    variance: float
    pruning: float
    heterogeneity: float
    noise: float


def lemma_4_6(training: Training, F_R: float, variant: Variant = "as_proved") -> GradientNorm:
    """Return the bound on (1/R) sum_r E ||grad F(theta_r)||^2, given F(theta_R).

    8 (F(theta_0) - F(theta_R)) / (eta S R) + (sigma_1^2 + sigma_2^2) + 160 w^2 L^2 N / Gamma* +
    10 N sigma_2^2 / Gamma* + 16 eta L N sigma_1^2 / Gamma*^2; printed: L for L^2 and 40 for 10.
    """
    t, proved = training, _proved(variant)
    return GradientNorm(
        progress=8 * (t.F0 - F_R) / (t.eta * t.S * t.R),
        variance=t.sigma1**2 + t.sigma2**2,
        pruning=_over(160 * t.w2 * _curvature(t, variant) * t.N, t.gamma_star),
        heterogeneity=_over((10 if proved else 40) * t.N * t.sigma2**2, t.gamma_star),
        noise=_over(16 * t.eta * t.L * t.N * t.sigma1**2, t.gamma_star**2),
    )


class LocalLoss(NamedTuple):
    """The right side of Lemma 4.7, term by term.

    gap |F_n(theta_0) - F(theta_0)|, drift sigma_2 ||theta_R - theta_0||, initial F(theta_0); then
    Lemma 4.6 times eta S R / 8: pruning, heterogeneity, noise, variance.
    """

    gap: float
    drift: float
    initial: float
    pruning: float
    heterogeneity: float
    noise: float
    variance: float


def lemma_4_7(training: Training, variant: Variant = "as_proved") -> LocalLoss:
    """Return the bound on F_n(theta_R).

    |F_n(theta_0) - F(theta_0)| + sigma_2 ||theta_R - theta_0|| + F(theta_0) +
    20 eta S R w^2 L^2 N / Gamma* + (5/4) eta S R N sigma_2^2 / Gamma* +
    2 eta^2 S R L N sigma_1^2 / Gamma*^2 + eta S R (sigma_1^2 + sigma_2^2) / 8;
    printed: L for L^2 and 5 for 5/4.
    """
    t, proved = training, _proved(variant)
    travelled = t.eta * t.S * t.R
    return LocalLoss(
        gap=abs(t.Fn0 - t.F0),
        drift=t.sigma2 * t.drift,
        initial=t.F0,
        pruning=_over(20 * travelled * t.w2 * _curvature(t, variant) * t.N, t.gamma_star),
        heterogeneity=_over((1.25 if proved else 5) * travelled * t.N * t.sigma2**2, t.gamma_star),
        noise=_over(2 * t.eta * travelled * t.L * t.N * t.sigma1**2, t.gamma_star**2),
        variance=travelled * (t.sigma1**2 + t.sigma2**2) / 8,
    )


def lemma_4_8(F_n: float, C1: float) -> float:
    """Return the excess score error F_n + C_1 = sum_k gamma_k E ||A_3 - A_2||^2.

    C_1 is at most 0: C1 = 0 gives F_n alone, the conservative version.
    """
    if C1 > 0:
        raise ConfigError(f"C1 = {C1}; the constant of Lemma 4.8 is never above 0 (0: not known)")
    return F_n + C1


def lemma_4_10(data: Data, T: float) -> float:
    """Return the prior's mismatch (d + M_2) e^{-2T}; for T >= 1, KL(q_T

    N(0, I)) is at most half.
    """
    return (data.d + data.M2) * math.exp(-2 * T)


@dataclass(frozen=True)
class Condition:
    """One condition of the theorem.

    Attributes
    ----------
    ratio
        At most 1 where the condition holds; else the factor by which it is missed, or infinity.
    says
        Both sides in words.
    """

    name: str
    ratio: float
    says: str

    @property
    def holds(self) -> bool:
        return self.ratio <= 1


@dataclass(frozen=True)
class Bound:
    """Theorem 4.11 as a breakdown.

    Attributes
    ----------
    local, C1, discretisation, prior
        The terms of Lemmas 4.7, 4.8, 4.5 and 4.10, before `constant`.
    infinite
        Why the theorem says nothing at all; empty where it does.
    """

    local: LocalLoss
    C1: float
    discretisation: Discretisation
    prior: float
    constant: float
    variant: Variant
    conditions: tuple[Condition, ...]
    infinite: str

    @property
    def excess(self) -> float:
        """Lemma 4.7's bound on F_n(theta_R), plus C_1; it is at least 0, like what it bounds."""
        return max(lemma_4_8(sum(self.local), self.C1), 0.0)

    @property
    def total(self) -> float:
        """The bound on KL(q_{n,delta} || p_{n,t_K}) in nats."""
        if self.infinite:
            return math.inf
        return self.constant * (self.excess + sum(self.discretisation) + self.prior)

    @property
    def covered(self) -> bool:
        """Whether every condition holds, so that the theorem vouches for the bound."""
        return all(condition.holds for condition in self.conditions)

    def terms(self) -> dict[str, float]:
        """Return every term by name; they add up to `total` unless C_1 takes them below 0."""
        parts = {**self.local._asdict(), "C1": self.C1, **self.discretisation._asdict()}
        parts["prior"] = self.prior
        return {name: self.constant * value for name, value in parts.items()}


def theorem_4_11(
    data: Data,
    steps: Steps,
    training: Training,
    *,
    C1: float = 0.0,
    constant: float = 1.0,
    variant: Variant = "as_proved",
    settings: tuple[Condition, ...] = (),
) -> Bound:
    """Return the bound on KL(q_{n,delta}

    p_{n,t_K}) for one worker.

    Parameters
    ----------
    settings
        The conditions that the numbers say nothing of (`covered.assumptions`).
    """
    lemma_4_8(0.0, C1)
    infinite = ""
    if training.gamma_star == 0:
        infinite = "Gamma* = 0: there is a coordinate that nobody trained"
    elif not training.full_participation:
        infinite = "partial participation: not every worker took part in every round"
    return Bound(
        local=lemma_4_7(training, variant),
        C1=C1,
        discretisation=lemma_4_5(data, steps),
        prior=lemma_4_10(data, steps.T),
        constant=constant,
        variant=variant,
        conditions=(*settings, *conditions(steps, training)),
        infinite=infinite,
    )


def conditions(steps: Steps, training: Training) -> tuple[Condition, ...]:
    """Return what Theorem 4.11 asks for, and by what factor each condition holds or is missed.

    Assumption 4.2 wants w^2 < 1; the proof uses w^2 and nowhere that it is below 1.
    """
    t = training
    most = largest_eta(t.L, t.S, t.N, t.gamma_star)
    return (
        Condition(
            "w^2 < 1",
            t.w2 if t.w2 != 1 else math.nextafter(1, 2),
            f"w^2 = {t.w2:.4g} (Assumption 4.2)",
        ),
        Condition("Gamma* >= 1", _over(1, t.gamma_star), f"Gamma* = {t.gamma_star} of N = {t.N}"),
        Condition(
            "full participation",
            _yes(t.full_participation),
            "every worker in every round" if t.full_participation else "some workers left out",
        ),
        Condition("SGD", _yes(t.optimizer == "sgd"), f"local optimiser {t.optimizer}"),
        Condition(
            "eta <= min{sqrt(Gamma* / (640 S^2 L^2 N)), 1}",
            _over(t.eta, most),
            f"eta = {t.eta:.4g} against {most:.4g} (Lemma 4.6, F's scale)",
        ),
        Condition("T >= 1", 1 / steps.T, f"T = {steps.T:.4g}"),
        *_enough_steps(steps),
        Condition(
            "gamma_k <= kappa min{1, u_{k+1}}",
            steps.needed / steps.kappa / (1 + 1e-9),  # kappas are compared to this tolerance
            f"the partition needs kappa = {steps.needed:.6g}, the bound has {steps.kappa:.6g}",
        ),
    )


def _enough_steps(steps: Steps) -> tuple[Condition, ...]:
    """Return Remark 4.12's condition on K, where delta is known."""
    if steps.delta is None:
        return ()
    least = math.log(1 / steps.delta)
    says = f"K = {steps.K} against {least:.4g}, delta = {steps.delta:.4g} (Remark 4.12)"
    return (Condition("K >= log(1 / delta)", least / steps.K, says),)


def yes_or_no(name: str, holds: bool, says: str) -> Condition:
    """Return a condition that is not missed by a factor."""
    return Condition(name, _yes(holds), says)


def _proved(variant: Variant) -> bool:
    if variant not in VARIANTS:
        raise ConfigError(f"variant = {variant!r}; allowed: {', '.join(VARIANTS)}")
    return variant == "as_proved"


def _curvature(training: Training, variant: Variant) -> float:
    """Return the power of L that stands beside w^2."""
    return training.L**2 if _proved(variant) else training.L


def _over(value: float, by: float) -> float:
    """Return value / by, or infinity for by = 0."""
    return value / by if by > 0 else math.inf


def _yes(holds: bool) -> float:
    return 0.0 if holds else math.inf
