"""Theorem 4.11 of runs: what is covered, through which interval, and Lemma 4.6's two sides."""

import math
from dataclasses import replace

import pytest

from fed_diffusion.analysis.measured import measured, steps_taken
from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.theory.bound import Data, Steps, Training, lemma_4_6, theorem_4_11
from tests.tiny import TINY

LETTER = TINY | {
    "local.optimizer": "sgd",
    "local.state": "fresh",
    "local.eta": 1e-9,
    "local.schedule": "constant",
    "theory.every": None,
    "rounds": 3,
    "clients": 3,
}
"""A tiny run within every condition."""


def config_of(**changes):
    return load_config("digits", LETTER | {k.replace("__", "."): v for k, v in changes.items()})


def played(config):
    """The rounds of a run, and theta_R."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, load_dataset(config.data))
    history = []
    for round in range(1, config.rounds + 1):
        for task in coordinator.tasks(round):
            assert coordinator.receive(worker.run(task))
        history.append(coordinator.close_round())
    return history, coordinator.theta


@pytest.fixture(scope="module")
def run():
    config = config_of()
    return config, *played(config)


def broken(theory):
    return [c["name"] for c in theory["conditions"] if not c["holds"]]


def test_a_run_by_the_theorems_letter_is_covered(run):
    theory = measured(Setup.of(run[0]), *run[1:])
    assert broken(theory) == []
    assert theory["covered"] is True
    assert theory["images"]["run"] != theory["images"]["bound"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"round__aggregation": "median"}, ["the mean of equation (8)"]),
        ({"wire__up": "int8", "ema__decay": 0.9}, ["nothing rounded on the way"]),
        (
            {"local__steps": None, "local__epochs": 1, "round__weighting": "examples"}
            | {"data__partition": "dirichlet", "data__alpha": 0.3},
            ["equal weights", "the same S for all"],
        ),
    ],
)
def test_a_run_outside_it_is_not_covered_and_names_what_is(changes, names):
    config = config_of(rounds=1, **changes)
    theory = measured(Setup.of(config), *played(config))
    assert theory["covered"] is False
    assert broken(theory) == names


def test_a_client_that_was_left_out_once_makes_participation_partial(run):
    config, history, theta = run
    short = [*history[:-1], replace(history[-1], clients=history[-1].clients[1:])]
    theory = measured(Setup.of(config), short, theta)
    assert broken(theory) == ["full participation"]
    assert theory["bound"]["as_proved"]["total"] is None


def test_the_record_says_what_workers_computed_in_and_one_in_bf16_is_outside(run):
    config, history, theta = run
    assert {client.precision for line in history for client in line.clients} == {"fp32"}
    odd = replace(history[1].clients[0], precision="bf16")
    line = replace(history[1], clients=[odd, *history[1].clients[1:]])
    assert broken(measured(Setup.of(config), [history[0], line, history[2]], theta)) == [
        "gradients in fp32"
    ]


def test_a_round_that_the_record_has_lost_leaves_no_bound(run):
    """Its trainers and its w^2 are gone, and R would be one too few."""
    config, history, theta = run
    why = measured(Setup.of(config), [history[0], history[2]], theta)["why"]
    assert why == "metrics.jsonl has lost 1 of the rounds, whose Gamma and w^2 are not known"


def test_the_step_size_is_that_of_the_record(run):
    """It was another one before a resume with more rounds stretched the schedule."""
    config, history, theta = run
    larger = replace(history[1], eta=7 * config.local.eta)
    theory = measured(Setup.of(config), [history[0], larger, history[2]], theta)
    (condition,) = [c for c in theory["conditions"] if c["name"].startswith("eta <=")]
    assert f"eta = {7 * config.local.eta / theory['Z_d']:.4g} " in condition["says"]


def test_S_is_what_the_clients_did_whether_a_last_batch_is_filled_up_or_smaller(run):
    history = run[1]

    def of(images, **local):
        line = replace(history[0], clients=[replace(history[0].clients[0], images=images)])
        return steps_taken(config_of(local__batch=8, **local).local, [line])

    epochs = {"local__steps": None, "local__epochs": 5}
    assert of(5 * 48, **epochs) == {30}  # 41 images filled up to 48
    assert of(5 * 41, **epochs) == {30}  # 41 images as they are
    assert of(5 * 3, **epochs) == {5}
    assert of(123, local__steps=7) == {7}


def arguments(theory, history, config):
    """Lemma 4.6's arguments on the scale of F, from the record."""
    scale, found = theory["Z_d"], theory["estimates"]
    return Training(
        N=3,
        S=3,
        R=len(history),
        eta=config.local.eta / scale,
        L=max(found["L"]["value"], found["L_secant"]["ends"][0]) * scale,
        sigma1=found["sigma1"]["value"] * scale,
        sigma2=found["sigma2"]["value"] * scale,
        w2=0.0,
        gamma_star=3,
        F0=found["F"]["value"] * scale,
        Fn0=found["Fn"]["value"] * scale,
        drift=theory["drift"],
    )


def test_lemma_4_6_is_of_as_many_rounds_as_F_is_known_of(run):
    """F was last measured at theta_2, where round 3 began: two rounds lie before it."""
    config, history, theta = run
    theory = measured(Setup.of(config), history, theta)
    t = arguments(theory, history, config)
    F_2 = history[-1].theory["estimates"]["F"]["value"] * theory["Z_d"]
    want = lemma_4_6(replace(t, R=2), F_2)
    assert theory["lemma_4_6"]["rounds"] == 2
    assert theory["lemma_4_6"]["right"] == pytest.approx(sum(want), rel=1e-9)
    progress = 8 * (t.F0 - F_2) / (t.eta * 3 * 2)  # noise makes it what it is, below 0 too
    assert theory["lemma_4_6"]["terms"]["progress"] == pytest.approx(progress, rel=1e-9)
    once = measured(Setup.of(config), history[:1], theta)["lemma_4_6"]
    assert (once["rounds"], once["right"]) == (0, None)


def test_lemma_4_6s_left_side_is_the_unbiased_square_even_below_0(run):
    config, history, theta = run
    square = {"value": -0.25, "error": 0.5, "lower": False, "ends": None}
    last = dict(history[-1].theory)
    last["squares"] = last["squares"] | {"gradient": square}
    theory = measured(Setup.of(config), [*history[:-1], replace(history[-1], theory=last)], theta)
    scale = theory["Z_d"] ** 2
    number, value, error = theory["lemma_4_6"]["left"][-1]
    assert (number, value, error) == (3, pytest.approx(-0.25 * scale), pytest.approx(0.5 * scale))
    first = history[0].theory["squares"]["gradient"]["value"] * scale
    assert theory["lemma_4_6"]["left"][0][:2] == [1, pytest.approx(first)]


def test_the_bounds_interval_is_that_of_its_estimates(run):
    config, history, theta = run
    theory = measured(Setup.of(config), history, theta)
    scale, t = theory["Z_d"], arguments(theory, history, config)
    d = config.diffusion
    steps = Steps.of(PARTITIONS[d.partition](d.T, d.delta, d.K))
    for variant, stated in theory["bound"].items():

        def total(steps=steps, variant=variant, **change):
            data = Data(64, theory["M2"])
            return theorem_4_11(data, steps, replace(t, **change), variant=variant).total

        below = above = 0.0
        for name, key in (("sigma1",) * 2, ("sigma2",) * 2, ("F0", "F"), ("Fn0", "Fn")):
            ends = theory["estimates"][key]["ends"]
            if ends is None:
                value, error = (theory["estimates"][key][part] for part in ("value", "error"))
                ends = value - error, value + error
            totals = [total(**{name: max(end, 0) * scale}) for end in ends]
            below = math.hypot(below, total() - min(*totals, total()))
            above = math.hypot(above, max(*totals, total()) - total())
        assert stated["low"] == pytest.approx(total() - below, rel=1e-9)
        assert stated["high"] == pytest.approx(total() + above, rel=1e-9)
        assert stated["low"] < stated["total"] < stated["high"]


def test_sigma_2_is_pooled_before_the_root_and_one_noisy_round_does_not_make_it(run):
    """Ten rounds of pure noise about 0: the largest of their roots would be 1."""
    config, history, theta = run
    noisy = []
    for i in range(10):
        square = {"value": (-1.0) ** i, "error": 2.0, "lower": True}
        parts = {"distances": dict.fromkeys("012", square)}
        parts["squares"] = history[0].theory["squares"] | {"sigma2": square}
        noisy.append(replace(history[0], round=i + 1, theory=history[0].theory | parts))
    found = measured(Setup.of(config), noisy, theta)["estimates"]["sigma2"]
    assert found["value"] == 0
    # the mean of ten has 2 / sqrt(10); for the largest of three, Bonferroni's is 1.22 times wider
    assert list(found["ends"]) == [
        0,
        pytest.approx(math.sqrt(1.2214 * 2 / math.sqrt(10)), rel=1e-3),
    ]


def test_a_secant_over_a_tiny_way_is_noise_and_makes_no_L(run):
    """With eta = 1e-9 theta hardly moves: the secant may be far above any curvature, or 0."""
    config, history, theta = run
    theory = measured(Setup.of(config), history, theta)
    found = theory["estimates"]
    secant = found["L_secant"]
    assert secant["value"] + secant["error"] > 100 * found["L"]["value"]
    (condition,) = [c for c in theory["conditions"] if c["name"].startswith("eta <=")]
    assert condition["ratio"] < 1


def test_a_sigma_2_that_is_lost_in_noise_says_how_large_its_term_may_be(run):
    config, history, theta = run
    for value, said in ((-0.01, True), (0.9, False)):
        square = {"value": value, "error": 0.25, "lower": True}
        parts = {"distances": dict.fromkeys("012", square)}
        parts["squares"] = history[0].theory["squares"] | {"sigma2": square}
        line = replace(history[0], theory=history[0].theory | parts)
        found = measured(Setup.of(config), [line], theta)
        (high,) = found["estimates"]["sigma2"]["ends"][1:]
        most = f"up to {high * found['Z_d'] * found['drift']:.4g} nats"
        assert any(most in caveat for caveat in found["caveats"]) == said
