"""Theorem 4.11 and its lemmas, each formula written out again from the paper's text."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.theory.bound import (
    VARIANTS,
    Data,
    Steps,
    Training,
    eta_from_F_scale,
    largest_eta,
    lemma_4_5,
    lemma_4_6,
    lemma_4_7,
    lemma_4_8,
    lemma_4_10,
    theorem_4_11,
    to_F_scale,
)
from tests.theory.conftest import positive, trainings

DATA = Data(d=3072, M2=775.68)
RUN = Training(
    N=10, S=5, R=300, eta=1e-6, L=30.0, sigma1=2.0, sigma2=0.5, w2=0.3, gamma_star=6,
    F0=900.0, Fn0=950.0, drift=4.0,
)  # fmt: skip


def steps(T=4.13, K=300, kappa=0.05):
    return Steps(T, K, kappa, kappa)


def rolled_out_equation_18(t):
    """The right side of (18), the line before `Let`, beside F(theta_0), without grad F."""
    eta, S, R, N, L, G = t.eta, t.S, t.R, t.N, t.L, t.gamma_star
    s1, s2 = t.sigma1**2, t.sigma2**2
    return {
        "local steps": 80 * eta**3 * S**3 * L**2 * N * R * (s1 + s2) / G,
        "pruning": 20 * eta * L**2 * S * t.w2 * N * R / G,
        "heterogeneity": 5 * eta * S * N * R * s2 / (4 * G),
        "noise": 2 * eta**2 * S * L * N * R * s1 / G**2,
    }


@given(trainings())
@settings(deadline=None)
def test_lemma_4_7_as_proved_is_equation_18_with_its_learning_rate(t):
    local, proof = lemma_4_7(t), rolled_out_equation_18(t)
    for name in ("pruning", "heterogeneity", "noise"):
        assert getattr(local, name) == pytest.approx(proof[name], rel=1e-12)
    assert local.gap == abs(t.Fn0 - t.F0)
    assert local.drift == t.sigma2 * t.drift
    assert local.initial == t.F0
    # at the largest eta, 80 eta^2 S^2 L^2 N / Gamma* = 1/8: the local steps' term as it is stated
    edge = replace(t, eta=math.sqrt(t.gamma_star / (640 * t.S**2 * t.L**2 * t.N)))
    assert lemma_4_7(edge).variance == pytest.approx(
        rolled_out_equation_18(edge)["local steps"], rel=1e-9
    )


@given(trainings())
@settings(deadline=None)
def test_lemma_4_7_as_printed(t):
    eta, S, R, N, L, G = t.eta, t.S, t.R, t.N, t.L, t.gamma_star
    s1, s2 = t.sigma1**2, t.sigma2**2
    want = (
        abs(t.Fn0 - t.F0)
        + t.sigma2 * t.drift
        + t.F0
        + 20 * eta * S * R * t.w2 * L * N / G
        + 5 * eta * S * R * N * s2 / G
        + 2 * eta**2 * S * R * L * N * s1 / G**2
        + eta * S * R * (s1 + s2) / 8
    )
    assert sum(lemma_4_7(t, "as_printed")) == pytest.approx(want, rel=1e-12)


@given(trainings(), positive())
@settings(deadline=None)
def test_lemma_4_6_as_printed(t, F_R):
    eta, S, R, N, L, G = t.eta, t.S, t.R, t.N, t.L, t.gamma_star
    s1, s2 = t.sigma1**2, t.sigma2**2
    want = (
        8 * (t.F0 - F_R) / (eta * S * R)
        + (s1 + s2)
        + 160 * t.w2 * L * N / G
        + 40 * N * s2 / G
        + 16 * eta * L * N * s1 / G**2
    )
    terms = lemma_4_6(t, F_R, "as_printed")
    assert sum(terms) == pytest.approx(want, rel=1e-9, abs=1e-9 * sum(map(abs, terms)))


@given(trainings(), positive())
@settings(deadline=None)
def test_lemma_4_6_as_proved_is_equation_18_divided_by_eta_S_R_over_8(t, F_R):
    bound, proof = lemma_4_6(t, F_R), rolled_out_equation_18(t)
    share = t.eta * t.S * t.R / 8
    for name in ("pruning", "heterogeneity", "noise"):
        assert getattr(bound, name) == pytest.approx(proof[name] / share, rel=1e-9)
    assert bound.progress == pytest.approx((t.F0 - F_R) / share, rel=1e-9)
    assert bound.variance == pytest.approx(t.sigma1**2 + t.sigma2**2)


@given(trainings())
@settings(deadline=None)
def test_the_learning_rate_condition_makes_the_proofs_steps_hold(t):
    eta = largest_eta(t.L, t.S, t.N, t.gamma_star)
    assert eta <= 1
    assert eta * t.S * t.L <= 1 / 8
    assert 80 * eta**2 * t.S**2 * t.L**2 * t.N / t.gamma_star <= 1 / 8 * (1 + 1e-12)


def pruned_descent(L, R):
    """Two workers with one F, a quadratic that couples two coordinates, and disjoint masks."""
    H, best = torch.full((2, 2), L / 2, dtype=torch.float64), torch.tensor([0.5, 0.5]).double()

    def F(theta):
        return float((theta - best) @ H @ (theta - best)) / 2

    t = Training(
        N=2, S=1, R=R, eta=largest_eta(L, 1, 2, 1), L=L, sigma1=0.0, sigma2=0.0, w2=0.0,
        gamma_star=1, F0=0.0, Fn0=0.0, drift=0.0,
    )  # fmt: skip
    theta, w2, squares = best.clone(), 0.0, 0.0
    for _ in range(R):
        squares += float((H @ (theta - best)).square().sum())
        w2 = max(w2, float(theta.square().max()))
        locals_ = [theta * mask for mask in torch.eye(2, dtype=torch.float64)]
        stepped = [x - t.eta * (H @ (x - best)) for x in locals_]
        theta = torch.stack([stepped[0][0], stepped[1][1]])
    return squares / R, F(theta), replace(t, w2=w2)


def test_lemma_4_6_as_printed_is_false_and_as_proved_holds():
    left, F_R, t = pruned_descent(L=1e4, R=3000)
    assert t.w2 < 1  # Assumption 4.2 holds
    assert float(torch.linalg.eigvalsh(torch.full((2, 2), 5e3)).max()) == pytest.approx(1e4)
    printed, proved = (sum(lemma_4_6(t, F_R, v)) for v in ("as_printed", "as_proved"))
    assert left == pytest.approx(4.8e7, rel=0.01)
    assert printed == pytest.approx(8.1e5, rel=0.01)
    assert proved == pytest.approx(3.2e10, rel=0.01)
    assert printed < left < proved


@given(st.integers(1, 5000), positive(), positive(1, 10), st.integers(1, 4000), positive())
@settings(deadline=None)
def test_lemmas_4_5_and_4_10(d, M2, T, K, kappa):
    data = Data(d, M2)
    want = kappa**2 * d * K + kappa * M2 + kappa * d * T
    assert sum(lemma_4_5(data, steps(T, K, kappa))) == pytest.approx(want, rel=1e-12)
    assert lemma_4_10(data, T) == pytest.approx((d + M2) * math.exp(-2 * T), rel=1e-12)


@pytest.mark.parametrize(("name", "nats"), [("half_half", 2.68e3), ("kappa_minimal", 1.51e3)])
def test_the_discretisation_and_prior_terms_have_their_checked_values(name, nats):
    of = Steps.of(PARTITIONS[name](4.13, 1e-3, 300))
    assert sum(lemma_4_5(DATA, of)) + lemma_4_10(DATA, of.T) == pytest.approx(nats, rel=0.01)


@given(trainings(), st.sampled_from(VARIANTS), positive(0.1, 10))
@settings(deadline=None)
def test_the_theorem_is_the_sum_of_its_lemmas_times_the_constant(t, variant, constant):
    bound = theorem_4_11(DATA, steps(), t, C1=-0.1, constant=constant, variant=variant)
    want = (
        max(lemma_4_8(sum(lemma_4_7(t, variant)), -0.1), 0)
        + sum(lemma_4_5(DATA, steps()))
        + lemma_4_10(DATA, 4.13)
    )
    assert bound.total == pytest.approx(constant * want, rel=1e-12)
    if bound.excess > 0:
        assert sum(bound.terms().values()) == pytest.approx(bound.total, rel=1e-9)


@given(trainings())
@settings(deadline=None)
def test_the_printed_theorem_is_the_lemmas_without_their_constants(t):
    eta, S, R, N, L, G = t.eta, t.S, t.R, t.N, t.L, t.gamma_star
    both = t.sigma1**2 + t.sigma2**2
    training = (
        eta * S * R * t.w2 * L * N / G
        + eta * S * R * N * both / G
        + eta**2 * S * R * L * N * t.sigma1**2 / G**2
    )
    ours = lemma_4_7(t, "as_printed")
    assert sum(ours[3:]) <= 20 * training * (1 + 1e-12)


@given(trainings(), st.sampled_from(VARIANTS), positive(1, 100), st.data())
@settings(deadline=None)
def test_the_theorem_grows_with_kappa_eta_w2_and_1_over_gamma(t, variant, factor, data):
    def total(training, kappa=0.05):
        return theorem_4_11(DATA, steps(kappa=kappa), training, variant=variant).total

    before = total(t)
    assert total(t, kappa=0.05 * factor) >= before
    assert total(replace(t, eta=t.eta * factor)) >= before
    assert total(replace(t, w2=t.w2 * factor)) >= before
    fewer = data.draw(st.integers(1, t.gamma_star))
    assert total(replace(t, gamma_star=fewer)) >= before


def test_nobody_training_a_coordinate_makes_the_bound_infinite_and_says_so():
    bound = theorem_4_11(DATA, steps(), replace(RUN, gamma_star=0, w2=0.0, sigma2=0.0))
    assert bound.total == math.inf
    assert "Gamma* = 0" in bound.infinite
    assert not bound.covered


def test_partial_participation_makes_the_bound_infinite_and_says_so():
    bound = theorem_4_11(DATA, steps(), replace(RUN, full_participation=False))
    assert bound.total == math.inf
    assert "partial participation" in bound.infinite
    assert math.isfinite(sum(bound.terms().values()))


def test_a_run_within_every_condition_is_covered():
    bound = theorem_4_11(DATA, steps(), RUN)
    assert [c.name for c in bound.conditions if not c.holds] == []
    assert bound.covered


@pytest.mark.parametrize(
    ("change", "name", "ratio"),
    [
        ({"w2": 761.0}, "w^2 < 1", 761),
        ({"w2": 1.0}, "w^2 < 1", 1),
        ({"optimizer": "adam"}, "SGD", math.inf),
        ({"full_participation": False}, "full participation", math.inf),
        ({"gamma_star": 0}, "Gamma* >= 1", math.inf),
        ({"eta": 1e-2}, "eta <=", 1e-2 * 5 * 30 * math.sqrt(640 * 10 / 6)),
        ({"eta": 3.0, "L": 1e-9}, "eta <=", 3.0),
    ],
)
def test_a_condition_that_fails_says_by_how_much(change, name, ratio):
    bound = theorem_4_11(DATA, steps(), replace(RUN, **change))
    (failed,) = [c for c in bound.conditions if c.name.startswith(name)]
    assert not failed.holds
    assert failed.ratio == pytest.approx(ratio)


def test_a_kappa_below_the_partitions_own_and_a_short_T_are_reported():
    u = PARTITIONS["geometric"](4.0, 1e-2, 50)
    own = Steps.of(u)
    assert theorem_4_11(DATA, own, RUN).covered
    failed = theorem_4_11(DATA, Steps.of(u, own.kappa / 2), RUN).conditions[-1]
    assert not failed.holds
    assert failed.ratio == pytest.approx(2)
    short = [c for c in theorem_4_11(DATA, steps(T=0.5), RUN).conditions if not c.holds]
    assert [(c.name, c.ratio) for c in short] == [("T >= 1", 2.0)]


@given(trainings(), positive(1, 1e4), st.integers(1, 5000))
@settings(deadline=None)
def test_as_proved_every_term_scales_with_the_loss_and_as_printed_pruning_does_not(t, Z, d):
    """eta L, eta grad and theta are the same on both scales."""
    on_F = to_F_scale(t, Z, d)
    assert list(lemma_4_7(on_F)) == pytest.approx([Z * d * x for x in lemma_4_7(t)], rel=1e-9)
    printed = [lemma_4_7(x, "as_printed").pruning for x in (on_F, t)]
    assert printed[0] == pytest.approx(printed[1], rel=1e-9)
    assert eta_from_F_scale(on_F.eta, Z, d) == pytest.approx(t.eta, rel=1e-12)


def test_excess_is_F_plus_a_constant_that_is_never_positive():
    assert lemma_4_8(6000.0, -5576.0) == 424.0
    assert lemma_4_8(6000.0, 0.0) == 6000.0
    with pytest.raises(ConfigError, match="C1 = 1"):
        lemma_4_8(6000.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma_star": 11}, "gamma_star = 11"),
        ({"eta": 0.0}, "eta = 0.0"),
        ({"w2": float("nan")}, "w2 = nan"),
        ({"S": 0}, "S = 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(RUN, **change)
    with pytest.raises(ConfigError, match="variant = 'printed'"):
        lemma_4_7(RUN, "printed")
