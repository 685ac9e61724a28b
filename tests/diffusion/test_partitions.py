"""Partitions of time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.diffusion.partitions import (
    PARTITIONS,
    ddpm_cosine,
    ddpm_linear,
    gammas,
    kappa,
    kappa_minimal,
    loss_weights,
)

settings_of_time = st.tuples(st.floats(1.01, 5.0), st.floats(1e-4, 0.5), st.integers(0, 400)).map(
    lambda s: (s[0], s[1], s[2] + max(2, math.ceil(math.log(1 / s[1]))))
)


@pytest.mark.parametrize("name", PARTITIONS)
@given(setting=settings_of_time)
def test_every_partition_falls_from_T_to_delta_in_K_steps(name, setting):
    T, delta, K = setting
    u = PARTITIONS[name](T, delta, K)
    assert u.dtype == torch.float64
    assert len(u) == K + 1
    assert u[0] == T
    assert u[-1] == delta
    assert (gammas(u) > 0).all()


@given(setting=settings_of_time)
def test_kappa_is_the_smallest_that_satisfies_the_constraint(setting):
    u = PARTITIONS["half_half"](*setting)
    k = kappa(u)
    bound = np.minimum(1, u[1:].numpy())
    assert (gammas(u).numpy() <= k * bound * (1 + 1e-12)).all()
    assert (gammas(u).numpy() > k * bound * (1 - 1e-9)).any()


@pytest.mark.parametrize("name", [name for name in PARTITIONS if name != "kappa_minimal"])
@given(setting=settings_of_time)
def test_no_partition_has_a_smaller_kappa_than_kappa_minimal(name, setting):
    assert kappa(kappa_minimal(*setting)) <= kappa(PARTITIONS[name](*setting)) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "K", "value"),
    [
        ("half_half", 300, 0.04713),
        ("kappa_minimal", 300, 0.03385),
        ("half_half", 1000, 0.01391),
        ("kappa_minimal", 1000, 0.01007),
    ],
)
def test_kappas_match_the_checked_values(name, K, value):
    assert kappa(PARTITIONS[name](4.13, 1e-3, K)) == pytest.approx(value, abs=5e-6)


def test_ddpm_linear_is_the_schedule_of_ho_et_al():
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    levels = -0.5 * np.log(alpha_bar)
    u = ddpm_linear(float(levels[-1]), float(levels[0]), 999)
    np.testing.assert_allclose(u.numpy(), levels[::-1], rtol=1e-9)
    assert kappa(u) == pytest.approx(1.199, abs=5e-4)
    assert kappa(kappa_minimal(float(levels[-1]), float(levels[0]), 999)) == pytest.approx(
        0.0140, abs=5e-5
    )


@pytest.mark.parametrize(("schedule", "largest"), [(ddpm_linear, 5.06), (ddpm_cosine, 9.92)])
def test_a_T_above_a_schedules_range_is_refused(schedule, largest):
    schedule(largest - 0.01, 1e-3, 50)
    with pytest.raises(ValueError, match="above the schedule's range"):
        schedule(largest + 0.01, 1e-3, 50)


@pytest.mark.parametrize(
    ("T", "delta", "K"), [(0.9, 1e-3, 50), (4.0, 1.0, 50), (4.0, 1e-3, 6), (4.0, 0.0, 50)]
)
def test_kappa_minimal_refuses_what_remark_4_12_excludes(T, delta, K):
    with pytest.raises(ValueError, match=r"delta|log"):
        kappa_minimal(T, delta, K)


def test_loss_weights_are_gamma_over_sigma_squared():
    u = kappa_minimal(4.13, 1e-3, 50).numpy()
    expected = [(u[k] - u[k + 1]) / (1 - math.exp(-2 * u[k])) for k in range(50)]
    np.testing.assert_allclose(loss_weights(torch.tensor(u)).numpy(), expected, rtol=1e-9)
