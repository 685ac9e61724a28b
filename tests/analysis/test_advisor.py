"""The planner: Remark 4.12 where it holds, and what it says where it does not."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fed_diffusion.analysis import advisor
from fed_diffusion.config.schema import ConfigError
from fed_diffusion.diffusion import partitions
from fed_diffusion.theory.bound import Data, Steps, lemma_4_5, lemma_4_6, lemma_4_7, lemma_4_10
from tests.theory.conftest import positive, trainings
from tests.theory.test_bound import DATA, RUN

many = settings(deadline=None, max_examples=40)


@given(
    trainings(),
    st.integers(1, 5000),
    positive(1e-2, 1e4),
    positive(1e-3, 1e6),
    positive(1e-6, 0.99),
    st.integers(20, 3000),
)
@many
def test_a_plan_never_violates_its_own_constraints(training, d, M2, eps2, delta, K_max):
    plan = advisor.plan(Data(d, M2), training, eps2=eps2, delta=delta, K_max=K_max)
    u = plan.u
    gamma = partitions.gammas(u)
    assert (gamma > 0).all()
    assert (gamma <= plan.kappa * u[1:].clamp(max=1.0) * (1 + 1e-9)).all()
    assert float(u[0]) == plan.T >= 1
    assert float(u[-1]) == plan.delta == delta
    assert len(u) == plan.K + 1
    assert math.log(1 / delta) <= plan.K <= K_max
    failed = {c.name for c in plan.bound.conditions if not c.holds}
    assert failed <= {"w^2 < 1"}  # which no plan can promise


@given(trainings())
@many
def test_the_planned_eta_keeps_every_term_within_its_constant_times_F0(training):
    eta = min(advisor.eta_limits(training).values())
    local = lemma_4_7(replace(training, eta=eta))
    F0 = training.F0 * (1 + 1e-9)
    assert local.pruning <= 20 * F0
    assert local.heterogeneity <= 1.25 * F0
    assert local.variance <= F0 / 8  # N >= Gamma*
    assert local.noise <= 2 * F0


def test_the_limits_on_eta_are_the_remarks():
    t = RUN
    SRN, s1, s2 = t.S * t.R * t.N, t.sigma1**2, t.sigma2**2
    proved, printed = (list(advisor.eta_limits(t, v).values()) for v in ("as_proved", "as_printed"))
    assert printed == pytest.approx(
        [
            t.F0 * t.gamma_star / (SRN * (s1 + s2)),
            t.F0 * t.gamma_star / (SRN * t.w2 * t.L),
            math.sqrt(t.F0 * t.gamma_star**2 / (SRN * t.L * s1)),
            math.sqrt(t.gamma_star / (640 * t.S**2 * t.L**2 * t.N)),
        ]
    )
    assert proved[1] == pytest.approx(printed[1] / t.L)
    assert advisor.plan(DATA, t).eta == min(proved)


def test_a_negative_T_of_the_remark_is_explained_and_not_used():
    fresh = replace(RUN, F0=22_000.0, Fn0=22_000.0)
    plan = advisor.plan(DATA, fresh)
    at_one_nat = math.log(3072 + 775.68) / 2
    assert pytest.approx(at_one_nat) == plan.T
    assert "= -0.872 is negative" in plan.notes[0]
    assert "eps^2 = 1 nats" in plan.notes[0]


def test_a_large_target_leaves_T_at_1():
    assert advisor.plan(DATA, RUN, eps2=1e5).T == 1


def test_the_uncapped_K_is_the_remarks_and_the_cap_says_what_it_attains():
    plan = advisor.plan(DATA, RUN, eps2=1.0, delta=1e-3, K_max=1000)
    assert plan.K_wanted == pytest.approx(469_000, rel=2e-3)
    assert plan.K == 1000
    assert plan.attained == pytest.approx(plan.K_wanted / 1000, rel=1e-3)
    assert "capped at 1,000" in plan.notes[1]
    again = advisor.plan(DATA, RUN, eps2=plan.attained, delta=1e-3, K_max=1000)
    assert again.K <= 1000


@given(positive(1.0, 1e3), positive(1e-4, 0.5))
@many
def test_a_target_that_the_cap_allows_is_met_up_to_a_constant(eps2, delta):
    """Remark 4.12's proof: each of the four terms is of the order of eps^2."""
    data = Data(12, 3.0)
    assume(advisor.steps_wanted(data, advisor.horizon(data, eps2), delta, eps2) <= 5000)
    plan = advisor.plan(data, RUN, eps2=eps2, delta=delta, K_max=5000)
    terms = [*lemma_4_5(data, Steps.of(plan.u)), lemma_4_10(data, plan.T)]
    # kappa K is at most (T + log(1/delta)) (1 + kappa), and kappa is large where K is small
    assert max(terms) <= eps2 * (1 + plan.kappa) ** 2 * (1 + 1e-6)


def test_no_eta_is_admissible_where_nobody_trains_a_coordinate():
    plan = advisor.plan(DATA, replace(RUN, gamma_star=0))
    assert plan.eta == 0
    assert plan.bound.total == math.inf
    assert "Gamma* = 0" in plan.notes[3]
    assert "infinite" in plan.notes[4]


def test_adam_is_said_not_to_be_covered():
    assert "adam is not covered" in advisor.plan(DATA, replace(RUN, optimizer="adam")).notes[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps2": 0.0}, "eps2 = 0.0"),
        ({"eps2": math.inf}, "eps2 = inf"),
        ({"delta": 1.0}, "delta = 1.0"),
        ({"delta": 1e-3, "K_max": 6}, "K_max = 6.*at least K = 7"),
    ],
)
def test_a_target_that_no_plan_can_meet_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        advisor.plan(DATA, RUN, **change)


def test_the_advice_names_the_largest_term():
    dominated = {
        "pruning": {"w2": 1e9},
        "drift": {"drift": 1e9},
        "initial": {"F0": 1e9, "Fn0": 1e9},
    }
    for name, change in dominated.items():
        assert f"largest term is {name}" in advisor.plan(DATA, replace(RUN, **change)).notes[4]
    terms = advisor.plan(DATA, RUN).bound.terms().keys() - {"C1"}
    assert terms == advisor.REMEDIES.keys()


def totals(rows):
    return [row.bound.total for row in rows]


def test_the_tables_move_the_way_the_theorem_does():
    steps = Steps.of(partitions.kappa_minimal(4.13, 1e-3, 100))
    keeps = advisor.by_keep(DATA, steps, RUN, 800.0, (1.0, 0.75, 0.5, 0.25))
    assert keeps[0].bound.local.pruning == 0
    assert totals(keeps) == sorted(totals(keeps))
    gammas = advisor.by_gamma(DATA, steps, RUN, (10, 6, 2, 1, 0))
    assert totals(gammas) == sorted(totals(gammas))
    assert totals(gammas)[-1] == math.inf
    counts = advisor.by_steps(DATA, 4.13, 1e-3, RUN, (50, 100, 300))
    assert totals(counts) == sorted(totals(counts), reverse=True)
    workers = advisor.by_workers(DATA, steps, RUN, (5, 10, 100))
    assert [row.bound.conditions[1].says for row in workers] == [
        f"Gamma* = {gamma} of N = {n}" for gamma, n in ((3, 5), (6, 10), (60, 100))
    ]
    pruning = [row.bound.local.pruning for row in workers]
    assert pruning == pytest.approx([pruning[0]] * 3)  # N / Gamma* is what counts


def test_lemma_4_6_at_the_planned_eta_has_its_variance_term_covered():
    """The condition on eta is what turns 640 eta^2 S^2 L^2 N / Gamma* into at most 1."""
    eta = advisor.plan(DATA, RUN).eta
    assert 640 * (eta * RUN.S * RUN.L) ** 2 * RUN.N / RUN.gamma_star <= 1 + 1e-9
    assert lemma_4_6(replace(RUN, eta=eta), 0.0).variance == RUN.sigma1**2 + RUN.sigma2**2
