"""Differential privacy under masks: the sum's sensitivity, the noise, the stated epsilon."""

import json
import math
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation.private import PrivateMean, drawn, epsilon, event, gaussian, spent
from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.config import ConfigError
from fed_diffusion.config.schema import PrivacyConfig
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir
from fed_diffusion.masks.mask import Block, Scattered, kept_values
from fed_diffusion.protocol.clipping import clipped
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.report.html import write_report
from fed_diffusion.server.coordinator import Coordinator
from tests.tiny import TINY

SILENT = 1e-12  # a noise multiplier that leaves the sums as they are
SHAPES = {"a": (3, 4), "b": (5,)}


def tensors(draw, scale=1.0):
    return {n: torch.from_numpy(scale * draw.normal(size=s)).float() for n, s in SHAPES.items()}


def norm(values):
    return math.sqrt(sum(float(v.double().pow(2).sum()) for v in values.values()))


def masked(values, masks):
    return {n: torch.where(masks[n].dense(), v, 0.0) for n, v in values.items()}


def private(theta, masks, clip, noise=SILENT, rate=1.0):
    settings = PrivacyConfig(clip=clip, noise_multiplier=noise)
    return PrivateMean(theta, masks, rate, settings)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6]),
    clip=st.floats(1e-2, 10),
)
def test_a_clients_difference_is_never_longer_than_the_clip_and_keeps_its_direction(
    seed, scale, clip
):
    draw = np.random.default_rng(seed)
    start = {n: torch.zeros(s) for n, s in SHAPES.items()}
    end = tensors(draw, scale)
    out = clipped(end, start, clip)
    assert norm(out) <= clip
    if norm(end) <= (1 - 1e-5) * clip:
        assert all(torch.equal(out[n], end[n]) for n in SHAPES)
    else:
        ratio = norm(out) / norm(end)
        assert norm(out) == pytest.approx(clip, rel=1e-4)
        for n in SHAPES:
            assert torch.allclose(out[n], end[n] * ratio, rtol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_difference_that_is_not_finite_becomes_zero_on_the_client(bad):
    start = tensors(np.random.default_rng(0))
    end = {n: v.clone() for n, v in start.items()}
    end["b"][2] = bad
    out = clipped(end, start, 1.0)
    assert all(bool(torch.isfinite(v).all()) for v in out.values())
    if bad != 3e38:
        assert all(torch.equal(out[n], start[n]) for n in SHAPES)


def kept(update, masks):
    """What a client sends of its update: the values that its mask keeps."""
    return kept_values(update, masks)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), clients=st.integers(1, 6), rate=st.sampled_from([1.0, 0.3]))
def test_one_client_moves_the_numerator_by_the_clip_at_most_whatever_the_masks(seed, clients, rate):
    """The sums of two runs, one with a client's difference and one without; denominators alike."""
    draw = np.random.default_rng(seed)
    theta, clip = tensors(draw), 0.5
    masks = [
        {n: Scattered(torch.from_numpy(draw.random(s) < 0.6)) for n, s in SHAPES.items()}
        for _ in range(clients)
    ]
    updates = [masked(tensors(draw, 10.0), m) for m in masks]

    def numerator(of):
        mean = private(theta, masks, clip, rate=rate)
        for n in of:
            mean.add(kept(updates[n], masks[n]), masks[n])
        new = mean.result()
        counts = {n: rate * sum(m[n].dense().double() for m in masks) for n in SHAPES}
        for n in SHAPES:  # what nobody's mask keeps, stays
            assert torch.equal(new[n][counts[n] == 0], theta[n][counts[n] == 0])
        return {n: (new[n].double() - theta[n].double()) * counts[n] for n in SHAPES}

    everyone = list(range(clients))
    for left_out in everyone:
        one, two = numerator(everyone), numerator([n for n in everyone if n != left_out])
        moved = {n: one[n] - two[n] for n in SHAPES}
        assert norm(moved) <= clip * (1 + 1e-4)


def test_without_noise_and_clip_this_is_the_masked_mean_of_equation_8():
    draw = np.random.default_rng(1)
    theta = tensors(draw)
    masks = [
        {n: Scattered(torch.from_numpy(draw.random(s) < 0.7)) for n, s in SHAPES.items()}
        for _ in range(4)
    ]
    updates = [masked(tensors(draw), m) for m in masks]
    mean = private(theta, masks, clip=1000)
    for update, mask in zip(updates, masks, strict=True):
        mean.add(kept(update, mask), mask)
    new = mean.result()
    for n in SHAPES:
        count = sum(m[n].dense().int() for m in masks)
        expected = sum(u[n].double() for u in updates) / count.clamp(min=1)
        expected = torch.where(count > 0, expected, theta[n].double())
        assert torch.allclose(new[n].double(), expected, atol=1e-6)


def test_a_client_that_did_not_clip_is_clipped_by_the_server_and_nan_is_refused():
    theta = {"a": torch.zeros(4)}
    mean = private(theta, [{}], clip=2.0)
    mean.add({"a": torch.tensor([300.0, 0.0, 400.0, 0.0])})
    assert torch.allclose(mean.result()["a"], torch.tensor([1.2, 0.0, 1.6, 0.0]), rtol=1e-5)
    with pytest.raises(UpdateError, match="not finite"):
        private(theta, [{}], clip=2.0).add({"a": torch.full((4,), math.nan)})


def test_the_noise_has_the_stated_size_and_is_new_every_time():
    theta = {"a": torch.zeros(200_000)}
    clip, noise, clients, rate = 0.5, 1.3, 4, 0.5
    one, two = (
        private(theta, [{}] * clients, clip, noise, rate).result()["a"].double() for _ in range(2)
    )
    sigma = noise * clip / (rate * clients)
    assert float(one.std()) == pytest.approx(sigma, rel=0.01)
    assert abs(float(one.mean())) < 5 * sigma / math.sqrt(len(one))
    assert abs(float((one * two).mean())) < 5 * sigma**2 / math.sqrt(len(one))


def test_the_normal_values_are_normal():
    from scipy.stats import kstest

    for count in (1, 2, 7, 100_000):
        assert len(gaussian(count)) == count
    assert kstest(gaussian(100_000), "norm").pvalue > 1e-6


def test_each_client_is_drawn_with_the_stated_probability_and_alone():
    clients = list(range(2000))
    for rate in (0.1, 0.7):
        size = len(drawn(clients, rate))
        assert abs(size - 2000 * rate) < 7 * math.sqrt(2000 * rate * (1 - rate))
    assert drawn(clients, 1.0) == clients
    assert len({tuple(drawn(clients[:20], 0.5)) for _ in range(50)}) > 10


def test_rounds_are_the_events_of_the_accountants_published_example():
    """dp-accounting's own test of the Poisson-sampled Gaussian: q = 0.01, sigma = 2.5, R = 50."""
    accountant = rdp.RdpAccountant(orders=[1.5, 2.5, 5, 50, 100])
    accountant.compose(event(2.5, 0.01, 50))
    published = [6.70579741e-04, 1.08548710e-03, 2.18075656e-03, 2.38460375e-02, 1.67416308e02]
    assert np.allclose(accountant._rdp, published, rtol=1e-4)


def test_epsilon_is_the_accountants_published_value():
    """A noise multiplier that the accountant's tests name for exactly (1, 1e-6)."""
    assert epsilon(4.530877117, 1.0, 1, 1e-6) == pytest.approx(1, rel=1e-3)
    # R rounds at sqrt(R) times the noise are one round, for the Gaussian mechanism
    assert epsilon(4.530877117 * 5, 1.0, 25, 1e-6) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        {"wire__differences": False},
        {"round__mode": "buffered"},
        {"round__aggregation": "median"},
        {"round__weighting": "examples"},
        {"round__over_select": 0.5},
        {"round__norm_factor": 3.0},
        {"pruning__kind": "channels", "pruning__budget": "auto"},
        {"pruning__kind": "balanced", "pruning__level": "S", "round__fraction": 0.5},
    ],
)
def test_combinations_without_a_guarantee_are_refused(tiny, more):
    with pytest.raises(ConfigError, match=r"privacy\.clip: "):
        tiny(**({"privacy__clip": 1.0, "wire__differences": True} | more))


def test_a_round_of_nobody_is_a_round_of_noise_alone(tiny):
    config = tiny(privacy__clip=1e-3, wire__differences=True, round__fraction=1e-9)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    before = {name: value.clone() for name, value in coordinator.theta.items()}
    assert list(coordinator.tasks(1)) == []
    summary = coordinator.close_round()
    assert (summary.round, summary.clients) == (1, [])
    assert all(not torch.equal(before[n], v) for n, v in coordinator.theta.items())


@pytest.mark.parametrize("kind", ["full", "topk", "channels"])
def test_a_private_run_says_its_epsilon_and_is_not_repeated(tiny, tmp_path, kind):
    level = {} if kind == "full" else {"pruning__level": "S"}
    config = tiny(
        privacy__clip=0.1,
        privacy__noise_multiplier=2.0,
        wire__differences=True,
        pruning__kind=kind,
        round__fraction=0.8,
        evaluation__every=0,
        local__steps=1,
        **level,
    )
    results = simulate(config, tmp_path / "run", processes=1)
    privacy = results["privacy"]
    assert privacy["epsilon"] == epsilon(2.0, 0.8, 2, 1e-5)
    assert (privacy["sigma"], privacy["clip"], privacy["delta"]) == (0.2, 0.1, 1e-5)
    assert json.loads((tmp_path / "run/results.json").read_text())["privacy"] == privacy
    assert "differential privacy of clients after 2 rounds" in (
        write_report(tmp_path / "run").read_text()
    )


DRIVER = """
import os, signal, sys
from fed_diffusion.config import load_config
from fed_diffusion.engines.local import simulate
from fed_diffusion.client.worker import Worker

train, calls = Worker._train, []

def dying(*arguments):
    calls.append(1)
    if len(calls) == 8:  # in the second round of five clients
        os.kill(os.getpid(), signal.SIGKILL)
    return train(*arguments)

Worker._train = dying
simulate(load_config("digits", eval(sys.argv[2])), sys.argv[1], processes=1)
"""


def test_rounds_that_are_repeated_after_a_kill_are_in_epsilon(tmp_path):
    """Checkpoints are rare, so both rounds come again: 5 were sent where the model took 3."""
    path = tmp_path / "run"
    private_run = {"privacy.clip": 0.1, "wire.differences": True, "model.widths": [8], "rounds": 3}
    private_run |= {"round.checkpoint_every": 5, "local.steps": 1, "evaluation.every": 0}
    killed = subprocess.run([sys.executable, "-c", DRIVER, str(path), repr(TINY | private_run)])
    assert killed.returncode == -signal.SIGKILL
    assert RunDir(path).opened(0) == 2
    results = run_in_process(Experiment.resume(path), processes=1)
    stated = results["privacy"]
    assert (stated["rounds"], stated["repeated"]) == (5, 2)
    assert stated["epsilon"] == epsilon(1.0, 1.0, 5, 1e-5) > epsilon(1.0, 1.0, 3, 1e-5)
    assert "after 5 rounds (2 of them opened again" in write_report(path).read_text()


def test_a_round_is_on_record_before_the_first_client_is_sent_anything(tiny, tmp_path):
    experiment = Experiment(tiny(privacy__clip=1.0, wire__differences=True), tmp_path / "run")
    next(iter(experiment.tasks(1)))
    assert experiment.run.opened(0) == 1
    next(iter(experiment.tasks(1)))  # tried again, below its quorum say
    assert experiment.run.opened(1) == 2
    (experiment.run.path / "privacy.jsonl").open("a").write('{"rou')  # cut off by a crash
    assert experiment.run.opened(1) == 3
    assert experiment.run.opened(4) == 6  # rounds that the ledger lacks were opened at least once


def test_what_is_not_covered_is_named(tiny):
    covers = spent(PrivacyConfig(clip=1.0), 1.0, 1)["covers"]
    for name in ("generated images", "loss, holdout_loss", "FID", "memorisation", "budgets.json"):
        assert name in covers
    for name in ("metrics.jsonl", "numbers of images", "took part", "report.html", "state.json"):
        assert name in covers


@given(seed=st.integers(0, 10**6), clients=st.integers(1, 9), rate=st.sampled_from([1.0, 0.3]))
@settings(max_examples=20)
def test_denominators_are_counted_one_mask_at_a_time_and_to_the_bit(seed, clients, rate):
    draw, theta = np.random.default_rng(seed), {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    seen, expected = [], {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}

    def masks():
        for _ in range(clients):
            drawn = {n: torch.from_numpy(draw.random(s) < 0.6) for n, s in SHAPES.items()}
            kept = {n: Scattered(bools) for n, bools in drawn.items()}
            if draw.random() < 0.3:
                kept["a"] = Block((3, 4), (((0, 1), (2, 3)), ((1, 3),)))
            for name in [name for name in kept if draw.random() < 0.3]:
                del kept[name]
            for name, count in expected.items():
                mask = kept.get(name)
                dense = None if mask is None else mask.dense()
                count += 1 if dense is None else dense
            if "b" in kept:
                seen.append(weakref.ref(drawn["b"]))
            yield kept
            del kept, mask, dense, drawn
            assert sum(mask() is not None for mask in seen) <= 1  # the one that is being counted

    mean = private(theta, masks(), clip=5, rate=rate)
    mean.add({name: torch.ones_like(value) for name, value in theta.items()})
    for name, moved in mean.result().items():
        below = rate * expected[name]
        step = torch.where(below > 0, 1 / below.clamp(min=1e-9), 0.0)
        assert torch.equal(moved, step.float())


def test_a_run_without_privacy_says_nothing_of_it(tiny, tmp_path):
    results = simulate(tiny(rounds=1, evaluation__every=0), tmp_path / "run", processes=1)
    assert "privacy" not in results
