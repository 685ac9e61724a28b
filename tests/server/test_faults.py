"""Dead, late and lying clients: the run ends, in good order, and nothing bad reaches theta."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError
from fed_diffusion.engines.local import Exchange
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.errors import DivergedError
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.wire import Payload
from fed_diffusion.server.coordinator import BelowQuorum, Coordinator
from fed_diffusion.server.norms import AUTO, NormLimit
from fed_diffusion.store.checkpoint import load_checkpoint

FAULTS = (
    "fine",
    "raises",
    "silent",
    "nan",
    "infinite",
    "huge",
    "wrong shape",
    "wrong name",
    "wrong recipe",
    "wrong client",
    "nothing",
    "nan loss",
    "twice",
)
ANSWERS = set(FAULTS) - {"raises", "silent"}


def spoiled(update, fault):
    """What a client with this fault sends in the place of its update."""
    numbers, arrays = dict(update.payload.numbers), dict(update.payload.arrays)
    name, first = next(iter(arrays.items()))
    values = np.frombuffer(first.data, np.float32).copy()
    if fault in ("nan", "infinite"):
        values[0] = math.nan if fault == "nan" else math.inf
    if fault == "huge":
        values *= 1e6
    arrays[name] = Packed(first.dtype, first.shape, values.tobytes())
    if fault == "wrong shape":
        arrays[name] = Packed(first.dtype, (len(values),), values.tobytes() * 2)
    if fault == "wrong name":
        arrays["other"] = arrays.pop(name)
    if fault == "wrong recipe":
        numbers["recipe.keep"] = 0.123
    if fault == "nothing":
        return Update(update.round, update.client, Payload({}, {}))
    if fault == "nan loss":
        numbers["loss"] = math.nan
    client = update.client + 1 if fault == "wrong client" else update.client
    return Update(update.round, client, Payload(arrays, numbers))


def faulty(worker, schedule, sent):
    """A runner whose clients follow the schedule (round, client) -> fault; notes bytes sent."""

    def run(tasks):
        for task in tasks:
            fault = schedule(task.round, task.client)
            sent["down"] += task.payload.nbytes
            if fault in ("raises", "silent"):
                yield task, TimeoutError("no reply within 1 s") if fault == "silent" else OSError()
                continue
            update = spoiled(worker.run(task), fault)
            for _ in range(2 if fault == "twice" else 1):
                sent["up"] += update.payload.nbytes
                yield task, update

    return run


CACHE = {}


def parts(tiny, digits):
    """One small configuration and its worker for all schedules."""
    if not CACHE:
        config = tiny(
            model__widths=[8],
            rounds=3,
            clients=4,
            local__steps=1,
            evaluation__every=0,
            round__norm_factor=100,
            round__retries=1,
        )
        CACHE["config"], CACHE["worker"] = config, Worker(config, digits)
    return CACHE["config"], CACHE["worker"]


schedules = st.dictionaries(
    st.tuples(st.integers(1, 3), st.integers(0, 3)), st.sampled_from(FAULTS), max_size=12
)


def in_good_order(examples):
    """The same property for a few schedules, and for many."""
    return settings(
        max_examples=examples,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


anything = given(schedule=schedules, always=st.sampled_from(("fine",) * 4 + ("raises", "nan")))


@anything
@in_good_order(20)
def test_every_schedule_of_faults_ends_in_good_order(tiny, digits, schedule, always):
    play_schedule(tiny, digits, schedule, always)


@pytest.mark.slow
@anything
@in_good_order(200)
def test_two_hundred_schedules_of_faults_end_in_good_order(tiny, digits, schedule, always):
    play_schedule(tiny, digits, schedule, always)


def play_schedule(tiny, digits, schedule, always):
    config, worker = parts(tiny, digits)
    sent = {"down": 0, "up": 0}
    run = faulty(worker, lambda r, c: schedule.get((r, c), always), sent)
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(config, Path(folder) / "run", digits)
        finished, why = True, None
        try:
            experiment.train(Exchange(experiment, run))
        except RunStopped as stopped:
            finished, why = False, str(stopped)
        if not finished and "diverged: of" in why:  # more than half of those asked
            last = [schedule.get((experiment.coordinator.round + 1, c), always) for c in range(4)]
            implausible = ("nan", "infinite", "nan loss", "huge")
            assert sum(fault in implausible for fault in last) >= 2
        else:
            assert finished or "fed-diffusion resume" in why
        coordinator = experiment.coordinator
        for value in coordinator.theta.values():
            assert bool(torch.isfinite(value).all())
            assert float(value.abs().max()) < 100  # a million times the weights never counted
        lines = (
            [json.loads(line) for line in experiment.run.metrics.open()]
            if (experiment.run.metrics.exists())
            else []
        )
        assert [line["round"] for line in lines] == list(range(1, coordinator.round + 1))
        assert finished == (coordinator.round == 3)
        status = json.loads((experiment.run.path / "status.json").read_text())["state"]
        assert status == ("finished" if finished else "stopped")
        if coordinator.round:
            assert load_checkpoint(experiment.run.path).state["round"] == coordinator.round
        if finished:  # every byte that was handed over stands in one line of the ledger
            assert sum(line["bytes_down"] for line in lines) == sent["down"]
            assert sum(line["bytes_up"] for line in lines) == sent["up"]


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"fine", "huge"}))
def test_a_fault_is_named_and_costs_one_update(tiny, digits, tmp_path, fault):
    config, worker = parts(tiny, digits)
    run = faulty(worker, lambda r, c: fault if c == 2 else "fine", {"down": 0, "up": 0})
    experiment = Experiment(config, tmp_path / "run", digits)
    Exchange(experiment, run)(1)
    summary = experiment.close_round()
    assert summary.rejected
    counted = {client.client for client in summary.clients}
    assert counted == ({0, 1, 2, 3} if fault == "twice" else {0, 1, 3})
    assert all(entry["reason"] for entry in summary.rejected)


def small(tiny, **overrides):
    return tiny(**({"model__widths": [8], "local__steps": 1} | overrides))


def rounds(config, digits, faults, number=3):
    """Play rounds with faults(round, client); the coordinator and the summaries."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker, summaries = Worker(config, digits), []
    for round in range(1, number + 1):
        for task in coordinator.tasks(round):
            coordinator.receive(spoiled(worker.run(task), faults(round, task.client)), node=77)
        summaries.append(coordinator.close_round())
    return coordinator, summaries


def test_a_client_that_keeps_sending_nonsense_is_left_out(tiny, digits):
    config = small(tiny, round__ban_after=2)
    coordinator, summaries = rounds(
        config, digits, lambda r, c: "nan" if c == 1 else "fine", number=4
    )
    assert [len(summary.rejected) for summary in summaries] == [1, 1, 0, 0]
    assert [summary.banned for summary in summaries] == [[], [1], [1], [1]]
    assert summaries[0].rejected[0]["node"] == "77"
    assert 1 not in coordinator.participants(5)


def test_an_update_far_beyond_the_others_is_refused(tiny, digits):
    config = small(tiny, round__norm_factor=20)
    _, summaries = rounds(
        config, digits, lambda r, c: "huge" if (r, c) == (2, 3) else "fine", number=2
    )
    assert not summaries[0].rejected
    (refused,) = summaries[1].rejected
    assert refused["client"] == 3
    assert "20 times the median of recent updates" in refused["reason"]


@pytest.mark.parametrize("round_of_the_lie", [1, 2])
def test_by_default_one_finite_lie_does_not_move_theta(tiny, digits, round_of_the_lie):
    """A value of 1.6e6 made theta 3.2e5, with five clients."""

    def lie(round, client):
        return "huge" if (round, client) == (round_of_the_lie, 3) else "fine"

    coordinator, summaries = rounds(small(tiny), digits, lie, number=2)
    honest, _ = rounds(small(tiny), digits, lambda r, c: "fine", number=2)
    (refused,) = summaries[round_of_the_lie - 1].rejected
    assert (refused["client"], refused["fault"]) == (3, "node")
    assert "above 100 times" in refused["reason"]
    for name, value in coordinator.theta.items():
        assert float((value - honest.theta[name]).abs().max()) < 0.1


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("eta", [1e-4, 1e-2])
def test_the_default_limit_never_refuses_an_honest_first_round(tiny, digits, steps, eta):
    config = small(tiny, local__steps=steps, local__eta=eta, clients=2)
    _, (summary,) = rounds(config, digits, lambda r, c: "fine", number=1)
    assert summary.rejected == []


def test_the_default_limit_lets_clients_begin_at_a_theta_of_zeros():
    zero, one = {"w": torch.zeros(100)}, {"w": torch.full((100,), 0.5)}
    limit = NormLimit(None, AUTO)
    assert limit.check(one, zero, {}) == pytest.approx(0.5)
    with pytest.raises(DivergedError, match="100 times theta's own"):
        limit.check({"w": torch.full((100,), 1.5)}, zero, {})
    limit.learn([1e-9])
    small_step = {"w": torch.full((100,), 1.001)}
    assert limit.check(small_step, {"w": torch.ones(100)}, {}) == pytest.approx(1e-3, rel=1e-3)


def test_a_norm_beyond_the_stated_one_is_refused(tiny, digits):
    config = small(tiny, round__max_norm=1e-9, round__quorum=1)
    with pytest.raises(BelowQuorum, match=r"its difference has norm .* above 1e-09"):
        rounds(config, digits, lambda r, c: "fine", number=1)


@pytest.mark.parametrize(
    ("quorum", "fraction", "needed"), [(0.5, 1.0, 3), (2, 1.0, 2), (1.0, 1.0, 5), (0.5, 0.4, 1)]
)
def test_the_quorum_is_a_count_or_a_part_of_those_wanted(tiny, quorum, fraction, needed):
    config = tiny(round__quorum=quorum, round__fraction=fraction)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    assert coordinator.quorum() == needed


def test_an_attempt_that_failed_stays_in_the_ledger(tiny, digits):
    config = small(tiny)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    for attempt in (1, 2):
        sizes = [0, 0]
        for task in coordinator.tasks(1):
            sizes[0] += task.payload.nbytes
            if attempt == 1 and task.client:
                coordinator.reject(task.client, "no reply")
                continue
            update = worker.run(task)
            sizes[1] += update.payload.nbytes
            coordinator.receive(update)
        if attempt == 1:
            first = sizes
            with pytest.raises(BelowQuorum, match="1 update counted, and 3 are needed"):
                coordinator.close_round()
    summary = coordinator.close_round()
    assert summary.bytes_down == first[0] + sizes[0]
    assert summary.bytes_up == first[1] + sizes[1]
    assert len(summary.rejected) == 4
    assert len(summary.clients) == 5


def test_a_round_with_spare_clients_closes_when_enough_are_in(tiny, digits):
    config = small(tiny, clients=5, round__fraction=0.6, round__over_select=0.5)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    tasks = list(coordinator.tasks(1))
    assert (coordinator.target(), len(tasks)) == (3, 5)
    for task in tasks[:3]:
        assert not coordinator.enough()
        coordinator.receive(worker.run(task))
    assert coordinator.enough()
    assert len(coordinator.close_round().clients) == 3


def test_clients_that_cannot_be_reached_are_not_asked_and_are_named(tiny, digits):
    config = small(tiny)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    for task in coordinator.tasks(1, {0, 2, 4}):
        coordinator.receive(worker.run(task))
    summary = coordinator.close_round()
    assert [client.client for client in summary.clients] == [0, 2, 4]
    assert summary.absent == [1, 3]


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_robust_averages_withstand_a_liar_that_the_mean_does_not(tiny, digits, aggregation):
    def end(aggregation, fault):
        limits = {"round__norm_factor": None, "local__eta": 1e-4}
        config = small(tiny, round__aggregation=aggregation, round__trim=0.25, **limits)
        coordinator, _ = rounds(config, digits, lambda r, c: fault if c == 0 else "fine", 1)
        return torch.cat([value.flatten() for value in coordinator.theta.values()])

    honest = end("mean", "fine")
    assert float((end(aggregation, "huge") - honest).abs().max()) < 1e-2
    assert float((end("mean", "huge") - honest).abs().max()) > 1e3


def test_robust_averages_and_weights_do_not_go_together(tiny):
    with pytest.raises(ConfigError, match="knows no weights"):
        tiny(round__aggregation="median", round__weighting="examples")


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_clients_with_the_most_examples_that_there_can_be_count_in_every_round(tiny, digits, mode):
    """Weights of 2^24 in a run of five; buffered rounds weigh the same."""
    more = {"round__mode": "buffered", "round__buffer": 5} if mode == "buffered" else {}
    config = small(tiny, round__weighting="examples", wire__differences=True, rounds=3, **more)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    for round in (1, 2, 3):
        for task in coordinator.tasks(round):
            update = worker.run(task)
            update.payload.numbers["examples"] = 2**24 - task.client
            assert coordinator.receive(update)
        assert coordinator.close_round().gamma == 5
    assert coordinator.participation.strikes == {}


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_more_examples_than_there_is_room_for_are_a_fault_of_nobody(tiny, digits, weighting):
    """Where they are no weight they are no matter; else the reason says what to do."""
    config = small(tiny, round__weighting=weighting, round__ban_after=1)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    for task in coordinator.tasks(1):
        update = worker.run(task)
        if task.client == 0:
            update.payload.numbers["examples"] = 2**24 + 1
        assert coordinator.receive(update) == (task.client > 0 or weighting == "uniform")
    summary = coordinator.close_round()
    assert (coordinator.participation.strikes, summary.banned) == ({}, [])
    reasons = [entry["reason"] for entry in summary.rejected]
    assert len(reasons) == (weighting == "examples")
    assert all("16777217 images" in why and "use uniform" in why for why in reasons)


def test_a_limit_of_the_servers_bans_nobody(tiny, digits):
    """Values that one client alone could send, beyond the share of one among five."""
    config = small(tiny, round__ban_after=1, round__norm_factor=None)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    for task in coordinator.tasks(1):
        update = worker.run(task)
        name, packed = next(iter(update.payload.arrays.items()))
        if task.client < 2:
            values = np.full(packed.shape, 3e6 if task.client else math.nan, np.float32)
            update.payload.arrays[name] = Packed(packed.dtype, packed.shape, values.tobytes())
        assert coordinator.receive(update) == (task.client > 1)
    summary = coordinator.close_round()
    assert {entry["client"] for entry in summary.rejected} == {0, 1}
    assert summary.banned == [0]


def test_a_round_without_any_reachable_client_is_below_its_quorum(tiny):
    config = small(tiny)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    assert list(coordinator.tasks(1, set())) == []
    with pytest.raises(BelowQuorum, match="No reply came"):
        coordinator.close_round()
