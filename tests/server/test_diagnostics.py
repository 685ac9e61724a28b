"""Diagnostic rounds: what is asked of whom, what comes of it, and what it leaves alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.diagnostics import minibatches
from fed_diffusion.client.images import MOMENT_IMAGES
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir
from fed_diffusion.protocol.diagnostics import GRADIENTS, LOSS, M2
from fed_diffusion.protocol.wire import Packed, Payload
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.server.diagnostics import MOST_WORKERS, PRODUCTS
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.theory.bound import Data, Steps, Training, theorem_4_11
from fed_diffusion.theory.curvature import hessian_vector
from fed_diffusion.theory.sketch import Sketch


@pytest.fixture
def measured(tiny):
    """measured(**overrides) -> a configuration with a measurement in every round"""
    return lambda **overrides: tiny(**{"theory__every": 1} | overrides)


def start(config, digits):
    return Coordinator(config, parameters_of(build_network(config))), Worker(config, digits)


def updates_of(config, digits, round=1):
    coordinator, worker = start(config, digits)
    return coordinator, [worker.run(task) for task in coordinator.tasks(round)]


def changed(update, arrays=None, **numbers):
    payload = update.payload
    keys = {"loss": LOSS, "M2": M2}
    fresh = payload.numbers | {keys[key]: value for key, value in numbers.items()}
    return dataclasses.replace(update, payload=Payload(payload.arrays | (arrays or {}), fresh))


def theta_of(path):
    return RunDir(path).load_theta(ema=False)


def test_what_is_measured_changes_no_bit_of_the_run(tiny, tmp_path):
    settings = {"method": "T-FedDM-M", "model__dropout": 0.1}
    for every in (0, 1):
        simulate(tiny(theory__every=every, **settings), tmp_path / str(every), processes=1)
    without, measured = theta_of(tmp_path / "0"), theta_of(tmp_path / "1")
    assert all(torch.equal(without[name], measured[name]) for name in without)


def test_by_default_the_first_and_the_last_round_are_measured(tiny):
    default = tiny(rounds=10, theory__every=None)
    assert [r for r in range(1, 11) if default.is_diagnostic(r)] == [1, 10]
    assert tiny(rounds=10, theory__every=4).diagnostic_rounds() == [1, 4, 8, 10]
    assert tiny(rounds=10, theory__every=0).diagnostic_rounds() == []


def test_only_workers_that_hold_the_whole_network_are_asked_and_one_for_a_curvature(
    measured, digits
):
    _, updates = updates_of(measured(clients=10, method="R-FedDM-S"), digits)
    assert [u.client for u in updates if GRADIENTS in u.payload.arrays] == [0, 1, 2, 3, 4, 5]
    assert len([u for u in updates if "diagnostic.L" in u.payload.numbers]) == 1


def test_of_many_clients_the_same_few_are_asked_every_time(measured, digits):
    config = measured(clients=100, data__holdout=0.0)
    coordinator, _ = start(config, digits)
    asked = [
        [t.client for t in coordinator.tasks(r) if "diagnostic.minibatches" in t.payload.numbers]
        for r in (1, 1)
    ]
    assert len(asked[0]) == MOST_WORKERS
    assert asked[0] == asked[1]


def test_the_estimates_are_those_of_the_workers_gradients(measured, digits):
    """Recomputed from the same minibatches by autograd, unsketched."""
    config = measured(clients=3)
    coordinator, updates = updates_of(config, digits)
    for update in updates:
        assert coordinator.receive(update)
    found = coordinator.close_round().theory
    worker = Worker(config, digits)
    theta = parameters_of(build_network(config))
    losses, gradients = [], []
    for client in range(3):
        few = worker.minibatches(theta, client, 1, 2, config.local.batch)
        parameters, network, batches = few
        values = [batch.loss(network) for batch in batches]
        losses.append([float(v.detach()) for v in values])
        parts = [
            torch.autograd.grad(v, parameters, allow_unused=True, materialize_grads=True)
            for v in values
        ]
        gradients.append([torch.cat([g.reshape(-1) for g in part]).double() for part in parts])
    estimates = found["estimates"]
    assert estimates["F"]["value"] == pytest.approx(np.mean(losses), rel=1e-5)
    means = np.mean(losses, 1)
    noise = np.mean(np.var(losses, 1, ddof=1)) / 2
    kept = max(1 - noise / np.var(means, ddof=1), 0)  # James and Stein's
    shrunken = means.mean() + kept * (means - means.mean())
    assert estimates["Fn"]["value"] == pytest.approx(max(shrunken), rel=1e-5)
    sigma1 = math.sqrt(np.mean([float((a - b).square().sum()) / 2 for a, b in gradients]))
    assert estimates["sigma1"]["value"] == pytest.approx(sigma1, rel=0.15)
    one, two = (torch.stack([pair[i] for pair in gradients]).mean(0) for i in (0, 1))
    norm = math.sqrt(max(float(one @ two), 0))
    assert estimates["gradient"]["value"] == pytest.approx(norm, rel=0.25)
    trained = worker.images.of(0).train  # F_n is of these too
    sizes = [float((digits.images[i].float() / 127.5 - 1).square().sum()) for i in trained]
    assert updates[0].payload.numbers[M2] == pytest.approx(np.mean(sizes), rel=1e-5)


def test_the_curvature_is_that_of_so_many_products_and_never_above_that_of_more(measured, digits):
    """||H v|| grows with every product, towards ||H||. With attention, which has a Hessian too."""
    config = measured(clients=2, model__widths=[4], model__group=4, model__attention=[8])
    _, updates = updates_of(config, digits)
    (answered,) = [u for u in updates if "diagnostic.L" in u.payload.numbers]
    worker = Worker(config, digits)
    theta = parameters_of(build_network(config))
    few = worker.minibatches(theta, answered.client, 1, 2, config.local.batch)
    parameters, network, batches = few
    batch = next(batches)
    product = hessian_vector(parameters, lambda: batch.loss(network))
    v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(batch.loss(network), parameters)])
    norms = []
    for _ in range(20):
        v = product(v / v.norm())
        norms.append(float(v.norm()))
    assert answered.payload.numbers["diagnostic.L"] == pytest.approx(norms[PRODUCTS - 1], rel=1e-4)
    assert norms[PRODUCTS - 1] <= norms[-1] * (1 + 1e-5)


def test_the_secant_between_two_rounds_survives_a_resume(measured, tmp_path):
    config = measured(rounds=4, theory__every=2)
    simulate(config, tmp_path / "alone", processes=1)

    def stop(line):
        if line["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(Experiment(config, tmp_path / "cut"), processes=1, progress=stop)
    run_in_process(Experiment.resume(tmp_path / "cut"), processes=1)
    one, two = (RunDir(tmp_path / name).results()["theory"] for name in ("alone", "cut"))
    assert one == two
    assert one["estimates"]["L_secant"]["value"] > 0
    assert one["rounds"] == [1, 2, 4]


BAD = {
    "of another shape": ({"arrays": {GRADIENTS: Packed("float32", (2, 5), bytes(40))}}, "(2, 5)"),
    "cut off": ({"arrays": {GRADIENTS: Packed("float32", (2, 1024), bytes(40))}}, "40 bytes"),
    "of another type": ({"arrays": {GRADIENTS: Packed("int8", (2, 1024), b"")}}, "int8"),
    "not finite": (
        {"arrays": {GRADIENTS: Packed("float32", (2, 1024), b"\x00\x00\xc0\x7f" * 2048)}},
        "not finite",
    ),
    "with a loss that is none": ({"loss": float("nan")}, "not finite"),
    "with a moment out of range": ({"M2": -1.0}, "out of range"),
    "with a moment that no images have": ({"M2": 64.1}, "out of range: it is at most d = 64"),
}


@pytest.mark.parametrize("which", BAD)
def test_an_update_is_rejected_whole_whose_diagnostics_are(which, measured, digits):
    change, complaint = BAD[which]
    coordinator, updates = updates_of(measured(), digits)
    assert not coordinator.receive(changed(updates[0], **change))
    for update in updates[1:]:
        assert coordinator.receive(update)
    summary = coordinator.close_round()
    assert complaint in summary.rejected[0]["reason"]
    assert summary.theory["workers"] == len(updates) - 1


def test_what_one_worker_says_of_its_loss_does_not_make_the_bound(measured, digits):
    """The liar's update counts, as in the round's loss; what it says it measured does not."""
    coordinator, updates = updates_of(measured(), digits)
    for update in updates:
        assert coordinator.receive(changed(update, loss=9e15) if update.client == 3 else update)
    theory = coordinator.close_round().theory
    (named,) = theory["unanswered"]
    assert named["client"] == 3
    assert "a loss of 9e+15, over 10 times the median" in named["reason"]
    assert theory["workers"] == len(theory["distances"]) == 4
    honest = [u.payload.numbers[LOSS] for u in updates if u.client != 3]
    assert theory["estimates"]["F"]["value"] == pytest.approx(np.mean(honest), rel=1e-9)


def test_gradients_that_nobody_asked_for_are_refused(tiny, digits):
    coordinator, updates = updates_of(tiny(theory__every=0), digits)
    extra = {GRADIENTS: Packed("float32", (2, 1024), bytes(8192))}
    assert not coordinator.receive(changed(updates[0], arrays=extra))


def test_a_worker_that_cannot_measure_still_trains(measured, digits):
    coordinator, updates = updates_of(measured(), digits)
    payload = updates[0].payload
    arrays = {name: part for name, part in payload.arrays.items() if name != GRADIENTS}
    plain = dataclasses.replace(updates[0], payload=Payload(arrays, payload.numbers))
    assert coordinator.receive(plain)
    for update in updates[1:]:
        assert coordinator.receive(update)
    assert coordinator.close_round().theory["workers"] == len(updates) - 1


def test_under_privacy_nothing_is_measured_and_asking_for_it_is_refused(tiny):
    private = {"privacy__clip": 1.0, "wire__differences": True}
    assert not tiny(theory__every=None, **private).is_diagnostic(1)
    with pytest.raises(ConfigError, match=r"theory\.every"):
        tiny(theory__every=1, **private)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"theory__every": 0}, "theory.every is 0"),
        ({"pruning__kind": "random", "pruning__keep": 0.75}, "no worker with the whole network"),
        ({"clients": 4, "pruning__keep": [1, 0.5, 0.5, 0.5]}, "sigma2 needs two workers"),
    ],
)
def test_a_run_that_cannot_be_measured_says_why(measured, tmp_path, settings, why):
    theory = simulate(measured(**settings), tmp_path / "run", processes=1)["theory"]
    assert why in theory["why"]


def test_the_results_hold_theorem_4_11_of_what_was_measured(measured, tmp_path):
    """Every argument taken from the record by hand."""
    config = measured(clients=10, rounds=3, method="R-FedDM-S", local__optimizer="sgd")
    theory = simulate(config, tmp_path / "run", processes=1)["theory"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    first = lines[0]["theory"]
    scale, found = theory["Z_d"], theory["estimates"]

    every = [line["theory"]["estimates"] for line in lines]
    L = max(
        *(e["L"]["value"] for e in every),
        *(e["L_secant"]["ends"][0] for e in every if "L_secant" in e),
    )
    sigma1, sigma2 = sigmas_of([line["theory"] for line in lines])
    start = parameters_of(build_network(config))
    end = theta_of(tmp_path / "run")
    drift = math.sqrt(sum(float((end[n] - v).double().square().sum()) for n, v in start.items()))
    training = Training(
        N=10,
        S=3,
        R=3,
        eta=max(line["eta"] for line in lines) / scale,
        L=L * scale,
        sigma1=sigma1 * scale,
        sigma2=sigma2 * scale,
        w2=max(c["w2"] for line in lines for c in line["clients"]),
        gamma_star=min(line["gamma"] for line in lines),
        F0=first["estimates"]["F"]["value"] * scale,
        Fn0=first["estimates"]["Fn"]["value"] * scale,
        drift=drift,
    )
    steps = Steps(T=4.13, K=20, kappa=_kappa(config), needed=_kappa(config), delta=1e-3)
    for variant in ("as_proved", "as_printed"):
        bound = theorem_4_11(Data(64, first["M2"]), steps, training, variant=variant)
        assert theory["bound"][variant]["total"] == pytest.approx(bound.total, rel=1e-9)
        for name, value in bound.terms().items():
            assert theory["bound"][variant]["terms"][name] == pytest.approx(value, rel=1e-9)
    assert found["sigma1"]["value"] == pytest.approx(sigma1)
    assert found["sigma2"]["value"] == pytest.approx(sigma2)
    assert theory["w2_n_over_gamma"] == pytest.approx(training.w2 * 10 / training.gamma_star)
    assert theory["covered"] is False  # w^2 < 1 fails for random masks
    assert {c["name"]: c["holds"] for c in theory["conditions"]}["SGD"] is True
    assert "pruning" in theory["says"]


def sigmas_of(rounds):
    """Squares averaged over the rounds; sigma_2 the largest worker's, without what noise adds."""
    sigma1 = np.mean([r["squares"]["sigma1"]["value"] for r in rounds])
    clients = rounds[0]["distances"]
    values = [np.mean([r["distances"][c]["value"] for r in rounds]) for c in clients]
    errors = [[r["distances"][c]["error"] / 1.96 for r in rounds] for c in clients]
    noise = np.mean([np.sum(np.square(e)) / len(rounds) ** 2 for e in errors])
    mean = np.mean([r["squares"]["sigma2"]["value"] for r in rounds])
    kept = max(1 - noise / np.var(values, ddof=1), 0)
    largest = max(mean + kept * (v - mean) for v in values)
    return math.sqrt(sigma1), math.sqrt(max(largest, 0))


def _kappa(config):
    from fed_diffusion.diffusion.partitions import PARTITIONS, kappa

    d = config.diffusion
    return kappa(PARTITIONS[d.partition](d.T, d.delta, d.K))


def test_coverage_counts_every_coordinate_once(tiny, tmp_path):
    config = tiny(clients=10, method="R-FedDM-S")
    results = simulate(config, tmp_path / "run", processes=1)
    for line in (tmp_path / "run/metrics.jsonl").open():
        summary = RoundSummary.from_dict(json.loads(line))
        assert sum(summary.coverage.values()) == results["parameters"]
        assert min(map(int, summary.coverage)) == summary.gamma


def test_sketches_of_one_seed_keep_distances():
    one, two = torch.randn(2, 5000, dtype=torch.float64)
    a, b = (Sketch(3)([part]) for part in (one, two))
    assert float((a - b).norm()) == pytest.approx(float((one - two).norm()), rel=0.12)


def test_a_worker_measures_as_many_minibatches_as_two_percent_of_its_steps_pay_for(tiny):
    def of(steps, workers=10, **settings):
        return minibatches(tiny(**settings), steps, workers)

    # 2 % of 600 steps are 12, 6 in each of two rounds; a tenth of a curvature takes 1.2 of them,
    # and a minibatch with its sketch takes 1.15
    assert of(60, rounds=10, theory__every=None) == 4
    assert of(60, workers=2, rounds=10, theory__every=None) == 2
    assert of(60, rounds=10, theory__every=1) == 2  # never fewer than tell noise from gradient
    assert of(3, rounds=2) == 2
    assert of(500, rounds=300, theory__every=None) == 32  # never more sketches than that
    assert of(500, rounds=1, theory__every=None) == 7


def test_answers_of_different_numbers_of_minibatches_are_put_together(measured, digits):
    config = measured(clients=3)
    coordinator, updates = updates_of(config, digits)
    more = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1)).numpy()
    arrays = {GRADIENTS: Packed("float32", (5, 1024), more.tobytes())}
    for update in (changed(updates[0], arrays=arrays), *updates[1:]):
        assert coordinator.receive(update)
    found = coordinator.close_round().theory
    assert found["minibatches"] == 2
    parts = [np.frombuffer(u.payload.arrays[GRADIENTS].data, "<f4") for u in updates[1:]]
    groups = [more.astype(float), *(part.reshape(2, 1024).astype(float) for part in parts)]
    spread = [np.var(group, axis=0, ddof=1).sum() for group in groups]
    assert found["squares"]["sigma1"]["value"] == pytest.approx(np.mean(spread))
    mean = np.mean([group.mean(0) for group in groups], axis=0)
    noise = sum(s / len(group) for s, group in zip(spread, groups, strict=True)) / 9
    assert found["squares"]["gradient"]["value"] == pytest.approx(mean @ mean - noise)


def test_the_second_moment_of_many_images_is_looked_at_in_parts(tiny, digits):
    worker = Worker(tiny(clients=1, data__holdout=0.0), digits)
    pixels = digits.images.double() / 127.5 - 1
    assert len(digits.images) > MOMENT_IMAGES
    expected = float(pixels.square().sum((1, 2, 3)).mean())
    assert worker.images.second_moment(0) == pytest.approx(expected, rel=1e-12)
