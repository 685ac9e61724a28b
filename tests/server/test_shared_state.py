"""Optimiser state that outlives the round (local.state: shared), on the server's side."""

import random
from unittest import mock

import numpy as np
import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir
from fed_diffusion.masks.mask import mask_of
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.moments import FIRST, PREFIXES, SECOND, STEPS, blank
from fed_diffusion.protocol.wire import Payload
from fed_diffusion.server.coordinator import Coordinator
from tests.guard_rails import run_on_grid

SMALL = {
    "model__widths": [16],
    "model__group": 4,
    "local__state": "shared",
    "local__steps": 2,
    "local__batch": 4,
    "clients": 4,
    "rounds": 3,
    "evaluation__every": 0,
    "evaluation__grid": 1,
    "evaluation__steps": 7,
}
KEEP = {"pruning__keep": [0.75, 0.5, 1, 1]}
GAPS = {"pruning__keep": 0.5}
KINDS = {
    "F": {},
    "T": KEEP | {"pruning__kind": "topk"},
    "R with gaps": GAPS | {"pruning__kind": "random", "pruning__scope": "all"},
    "channels rolling": KEEP | {"pruning__kind": "channels", "pruning__choice": "rolling"},
    "channels with gaps": GAPS | {"pruning__kind": "channels", "pruning__choice": "rolling"},
}
INT8 = {"wire__down": "int8", "wire__up": "int8", "wire__differences": True}
INT4 = {"wire__state": "int4"}
BUFFERED = {"wire__differences": True, "round__mode": "buffered", "round__buffer": 2}
BUFFERED |= {"round__pace": [1, 1, 2.5, 4], "rounds": 5}


@pytest.fixture(autouse=True)
def no_figures():
    """Drawing the report's figures takes a third of a small run, and says nothing of the state."""
    with mock.patch("matplotlib.figure.Figure.draw"):
        yield


def start(config, digits):
    return Coordinator(config, parameters_of(build_network(config))), Worker(config, digits)


def numbers(packed):
    return np.frombuffer(packed.data, np.float32).astype(np.float64)


def same(a, b):
    names = a.theta.keys() | a.moments.keys()
    assert names == b.theta.keys() | b.moments.keys()
    ours, theirs = a.theta | a.moments, b.theta | b.moments
    return all(torch.equal(ours[name], theirs[name]) for name in names)


@pytest.mark.parametrize("kind", ["F", "T", "R with gaps", "channels with gaps"])
def test_moments_are_the_mean_of_each_coordinates_trainers_and_stay_where_there_are_none(
    tiny, digits, kind
):
    """A brute-force oracle: coordinate by coordinate, from the raw bytes of the updates."""
    config = tiny(**SMALL | KINDS[kind] | {"rounds": 3 if "gaps" in kind else 1})
    coordinator, worker = start(config, digits)
    expected = {n: v.double().numpy().copy() for n, v in coordinator.moments.items()}
    untrained = 0
    for round in range(1, config.rounds + 1):
        sums = {n: np.zeros(v.shape) for n, v in expected.items()}
        counts = {n: np.zeros(v.shape) for n, v in expected.items()}
        for task in coordinator.tasks(round):
            flight = coordinator.flights.out[task.client]
            masks = coordinator.open.masks.of(flight.recipe, flight.bits)
            update = worker.run(task)
            for name, whole in coordinator.theta.items():
                keep = mask_of(masks, name, whole).dense().numpy()
                for prefix in (FIRST, SECOND):
                    arrived = numbers(update.payload.arrays[prefix + name])
                    sums[prefix + name][keep] += arrived
                    counts[prefix + name] += keep
                sums[STEPS + name][keep] += expected[STEPS + name][keep] + 2
                counts[STEPS + name] += keep
            assert coordinator.receive(update), coordinator.open.rejected
        coordinator.close_round()
        for name, before in expected.items():
            trained = counts[name] > 0
            untrained += int((~trained).sum())
            means = sums[name] / np.maximum(counts[name], 1)
            expected[name] = np.where(trained, means.astype(np.float32), before)
            found = coordinator.moments[name].double().numpy()
            np.testing.assert_allclose(found, expected[name], rtol=3e-7, atol=1e-44)
            np.testing.assert_array_equal(found[~trained], before[~trained])
            expected[name] = found.copy()
    assert ("gaps" in kind) == (untrained > 0)


def end_of(config, path):
    """The coordinator at the end of a run, from its checkpoint."""
    held = RunDir(path).load_checkpoint()
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    coordinator.restore(held.tensors, held.state["coordinator"])
    assert coordinator.round == config.rounds
    assert any(bool(value.any()) for value in coordinator.moments.values())
    return coordinator


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        pytest.param("F", {}, marks=pytest.mark.slow),
        pytest.param("T", INT8, marks=pytest.mark.slow),
        ("R with gaps", INT4),
        ("channels rolling", INT8 | INT4),
    ],
    ids=["F", "T int8", "R with gaps int4", "channels rolling int8 int4"],
)
def test_flower_and_a_run_in_process_end_with_the_same_state(tiny, tmp_path, kind, wire):
    config = tiny(**SMALL | KINDS[kind] | wire | {"flower__supernodes": 2, "rounds": 2})
    simulate(config, tmp_path / "local", processes=1)
    run_on_grid(config, tmp_path / "flower")
    assert same(end_of(config, tmp_path / "local"), end_of(config, tmp_path / "flower"))
    bytes_of = [RunDir(tmp_path / name).results()["bytes_up"] for name in ("local", "flower")]
    assert bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("R with gaps", BUFFERED | INT4),
        pytest.param("channels rolling", {}, marks=pytest.mark.slow),
    ],
    ids=["R with gaps buffered int4", "channels rolling"],
)
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_was_left_alone(
    tiny, tmp_path, kind, mode
):
    config = tiny(**SMALL | KINDS[kind] | mode)
    simulate(config, tmp_path / "alone", processes=1)

    def stop(line):
        if line["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "stopped", processes=1, progress=stop)
    run_in_process(Experiment.resume(tmp_path / "stopped"), processes=1)
    assert same(end_of(config, tmp_path / "alone"), end_of(config, tmp_path / "stopped"))


@pytest.mark.parametrize("kind", ["R with gaps", "channels rolling"])
def test_the_order_of_arrival_does_not_matter(tiny, digits, kind):
    config = tiny(**SMALL | KINDS[kind] | INT8 | INT4 | {"rounds": 2})
    one, worker = start(config, digits)
    other, _ = start(config, digits)
    for round in (1, 2):
        updates = [worker.run(task) for task in one.tasks(round)]
        assert len(list(other.tasks(round))) == len(updates)
        assert all(one.receive(update) for update in updates)
        random.Random(round).shuffle(updates)
        assert all(other.receive(update) for update in updates)
        one.close_round()
        other.close_round()
    assert same(one, other)


def test_a_buffer_of_all_clients_is_the_synchronous_round(tiny, digits):
    settings = SMALL | KINDS["R with gaps"] | {"wire__differences": True, "rounds": 2}
    ends = []
    for mode in ("synchronous", "buffered"):
        coordinator, worker = start(tiny(**settings, round__mode=mode), digits)
        for round in (1, 2):
            assert all(coordinator.receive(worker.run(t)) for t in coordinator.tasks(round))
            coordinator.close_round()
        ends.append(coordinator)
    assert same(*ends)


def test_stale_moments_are_damped_as_stale_values_are(tiny, digits):
    """The moments go the part 1 / (1 + s)^a of the way to those that arrive, as do the counts."""
    config = tiny(**SMALL | BUFFERED | {"round__buffer": 1, "clients": 2, "round__pace": None})
    coordinator, worker = start(config, digits)
    tasks = {task.client: task for task in coordinator.tasks(1)}
    assert coordinator.receive(worker.run(tasks[0]))
    coordinator.close_round()
    before = {name: value.double() for name, value in coordinator.moments.items()}
    list(coordinator.tasks(2))
    late = worker.run(tasks[1])
    assert coordinator.receive(late)
    assert coordinator.close_round().staleness == 1
    for name, whole in coordinator.theta.items():
        for prefix in PREFIXES:
            if prefix == STEPS:
                arrived = torch.full(whole.shape, 2.0, dtype=torch.float64)
            else:
                raw = numbers(late.payload.arrays[prefix + name])
                arrived = torch.from_numpy(raw).view(whole.shape)
            was = before[prefix + name]
            expected = was + (arrived - was) * 2**-0.5
            found = coordinator.moments[prefix + name].double()
            ulps = 3e-7 * float(torch.maximum(was.abs(), arrived.abs()).max())
            torch.testing.assert_close(found, expected, rtol=0, atol=ulps)


def changed(update, name, packed):
    arrays = dict(update.payload.arrays)
    if packed is None:
        del arrays[name]
    else:
        arrays[name] = packed
    return Update(update.round, update.client, Payload(arrays, update.payload.numbers))


def with_first(packed, value):
    data = np.frombuffer(packed.data, np.float32).copy()
    data[0] = value
    return Packed(packed.dtype, packed.shape, data.tobytes())


def test_moments_are_checked_on_arrival_and_a_bad_update_adds_nothing(tiny, digits):
    config = tiny(**SMALL, round__ban_after=0)
    coordinator, worker = start(config, digits)
    first, *others = [worker.run(task) for task in coordinator.tasks(1)]
    m, v = (prefix + next(iter(coordinator.theta)) for prefix in (FIRST, SECOND))
    arrays = first.payload.arrays
    bad = {
        "negative": (v, with_first(arrays[v], -1e-12)),
        "values that are not finite": (v, with_first(arrays[v], float("nan"))),
        "holds values that are not finite": (m, with_first(arrays[m], float("inf"))),
        "beyond": (m, with_first(arrays[m], 1e30)),
        "missing": (v, None),
        "not float32": (v, Packed("float32", (1,), bytes(4))),
        "sent as bfloat16": (m, Packed("bfloat16", arrays[m].shape, arrays[m].data)),
        "names differ": (STEPS + m.removeprefix(FIRST), arrays[m]),
    }
    sent = coordinator.flights.out[first.client]
    for reason, (name, packed) in bad.items():
        coordinator.flights.out[first.client] = sent
        assert not coordinator.receive(changed(first, name, packed))
        assert reason in coordinator.open.rejected[-1]["reason"]
    coordinator.flights.out[first.client] = sent
    assert all(coordinator.receive(update) for update in (first, *others))
    coordinator.close_round()
    clean, worker = start(config, digits)
    for task in clean.tasks(1):
        assert clean.receive(worker.run(task))
    clean.close_round()
    assert same(coordinator, clean)


def test_a_client_that_sends_moments_where_none_are_shared_is_refused(tiny, digits):
    coordinator, worker = start(tiny(**SMALL | {"local__state": "fresh"}), digits)
    update = worker.run(next(coordinator.tasks(1)))
    name = next(iter(coordinator.theta))
    odd = changed(update, FIRST + name, update.payload.arrays[name])
    assert not coordinator.receive(odd)
    assert "names differ" in coordinator.open.rejected[-1]["reason"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"local__optimizer": "sgd"}, "keeps no state"),
        ({"privacy__clip": 1.0, "wire__differences": True}, "the clients' moments are not clipped"),
        ({"round__aggregation": "median"}, "round.aggregation to mean"),
    ],
)
def test_a_shared_state_is_refused_where_it_cannot_be_had(tiny, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        tiny(**{"local__state": "shared"} | settings)


@pytest.mark.parametrize("preset", ["digits", "digits-quick", "digits-unequal"])
def test_a_fresh_state_as_in_the_paper_is_one_word_away(preset):
    config = load_config(preset, {"local.state": "fresh"})
    assert not blank({"w": torch.zeros(2)}, config.local)


def test_moments_in_four_bits_cost_less_than_a_quarter_of_what_travels_anyway(tiny, digits):
    sizes = {}
    for state, form in (("fresh", "fp32"), ("shared", "fp32"), ("shared", "int4")):
        wide = {"model__widths": [32], "model__group": 8, "clients": 1, "wire__state": form}
        coordinator, worker = start(tiny(**SMALL | wide | {"local__state": state}), digits)
        (task,) = coordinator.tasks(1)
        assert coordinator.receive(worker.run(task))
        coordinator.close_round()
        (task,) = coordinator.tasks(2)
        sizes[state, form] = task.payload.nbytes + worker.run(task).payload.nbytes
    fresh = sizes["fresh", "fp32"]
    assert 2.99 * fresh < sizes["shared", "fp32"] < 3.01 * fresh
    assert sizes["shared", "int4"] < 1.25 * fresh
