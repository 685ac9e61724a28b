"""Whole runs under secure aggregation in one process: the bits of runs without it."""

import json

import numpy as np
import pytest
import torch

from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.checks import check_training
from fed_diffusion.config import ConfigError
from fed_diffusion.engines.local import Exchange
from fed_diffusion.engines.pool import task_runner
from fed_diffusion.engines.secure import SecureRunner
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.member import Members
from fed_diffusion.secure.messages import Stage
from fed_diffusion.secure.words import MEASURED
from fed_diffusion.server.secure import coordinator_of
from fed_diffusion.store.rundir import RunDir
from tests.secure.runs import FAST, run, same

INT8 = {"wire__up": "int8", "wire__differences": True}
SHARED = {"local__state": "shared", "local__optimizer": "adam", "rounds": 2}
KINDS = [
    {"method": "FedDM-F"},
    {"method": "R-FedDM-S", **INT8},
    {"method": "T-FedDM-S", "round__weighting": "examples"},
    {"pruning__kind": "channels", "pruning__level": "S"},
    {"pruning__kind": "balanced", "pruning__level": "S", "server__optimizer": "adam"},
    {"method": "R-FedDM-S", **SHARED},
    {"pruning__kind": "channels", "pruning__level": "S", "wire__state": "int4", **SHARED},
]


NAMES = ["F", "R-int8", "T-examples", "channels", "balanced", "R-shared", "channels-int4"]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_run_ends_with_the_same_bits_whether_its_sums_are_secret_or_not(tiny, tmp_path, kind):
    settings = FAST | kind
    plain = run(tiny(**settings), tmp_path / "plain")
    secure = run(tiny(secure__aggregation=True, secure__least=1, **settings), tmp_path / "secure")
    assert same(plain, secure)
    line = secure.history[0]
    assert (line.withheld, line.gamma) == (0, plain.history[0].gamma)
    assert line.coverage == plain.history[0].coverage


def lopsided(dataset, clients, draw):
    """A split: the first client has more images than all others together."""
    few = np.arange(10 * (clients - 1)).reshape(clients - 1, 10)
    return [np.arange(few.size, len(dataset)), *few]


def test_a_client_that_counts_by_its_images_counts_by_all_that_it_has_multiplied_by(tiny, tmp_path):
    """Without secrets the server would count the first client for no more than all others."""
    settings = FAST | {
        "method": "FedDM-F",
        "round__weighting": "examples",
        "data__partition": "tests.engines.test_secure:lopsided",
    }
    plain = run(tiny(**settings), tmp_path / "plain")
    config = tiny(secure__aggregation=True, secure__least=1, **settings)
    secure = run(config, tmp_path / "secure", said={0: 1757} | dict.fromkeys(range(1, 5), 10))
    assert same(plain, secure)
    assert secure.history[0].clients[0].weight > 4 * 10


def test_who_was_sent_nothing_in_an_exchange_is_known_to_be_missing(tiny, tmp_path):
    experiment = Experiment(tiny(secure__aggregation=True, **FAST), tmp_path / "run")
    coordinator, runner = experiment.coordinator, SecureRunner(experiment.setup, iter)
    exchanges = coordinator.exchanges(1)
    keys = next(exchanges)
    assert coordinator.unsent() == [0, 1, 2, 3, 4]
    for _, answer in runner(keys):
        assert coordinator.receive(answer)
    assert coordinator.unsent() == []
    first = next(next(exchanges))
    assert coordinator.unsent() == [c for c in range(5) if c != first.client]
    experiment.close()


@pytest.mark.parametrize("stage", list(Stage))
def test_clients_lost_at_any_stage_leave_the_bits_of_a_run_without_them(tiny, tmp_path, stage):
    settings = FAST | {"method": "R-FedDM-S"}
    gone = () if stage == Stage.OPEN else (1, 3)  # whoever has sent its vector counts
    plain = run(tiny(**settings), tmp_path / "plain", plain_without=gone)
    config = tiny(secure__aggregation=True, secure__least=1, **settings)
    secure = run(config, tmp_path / "secure", lost={1: stage, 3: stage})
    assert same(plain, secure)
    assert [c.client for c in secure.history[0].clients] == [c for c in range(5) if c not in gone]
    assert {entry["client"] for entry in secure.history[0].rejected} == set(gone)


def test_with_too_few_left_the_run_stops_and_says_how_to_go_on(tiny, tmp_path):
    config = tiny(secure__aggregation=True, **FAST)
    lost = dict.fromkeys((0, 1, 2), Stage.OPEN)
    with pytest.raises(RunStopped, match=r"shares of client 0's secrets are needed") as stopped:
        run(config, tmp_path / "run", lost=lost)
    assert "tried 3 times" in str(stopped.value)
    assert "resume" in json.loads((tmp_path / "run/status.json").read_text())["reason"]


@pytest.mark.parametrize("method", ["FedDM-F", "R-FedDM-S"])
def test_summed_losses_leave_no_client_by_itself_and_the_parameters_as_they_are(
    tiny, tmp_path, method
):
    settings = FAST | {"method": method, "data__holdout": 0.2}
    plain = run(tiny(**settings), tmp_path / "plain").history[0]
    told = []

    class Listening(SecureRunner):
        def _answer(self, task, trained=None):
            answer = super()._answer(task, trained)
            told.append(answer.payload.numbers.keys())
            return answer

    config = tiny(secure__aggregation=True, secure__losses="summed", secure__least=1, **settings)
    experiment = Experiment(config, tmp_path / "secure")
    with task_runner(config, experiment.dataset, 1) as runner:
        experiment.train(Exchange(experiment, Listening(experiment.setup, runner)))
    (line,) = experiment.history
    assert not any(numbers & {*MEASURED} for numbers in told)
    assert same_theta(tmp_path / "plain", tmp_path / "secure")
    losses = [client.loss for client in plain.clients]
    assert line.loss == pytest.approx(sum(losses) / len(losses), abs=1e-11)
    assert {client.loss for client in line.clients} == {line.clients[0].loss}
    assert line.images == plain.images
    if method == "FedDM-F":
        assert line.holdout_loss == pytest.approx(plain.holdout_loss, abs=1e-11)
    else:  # of clients with masks none has measured the same model
        assert line.holdout_loss is None


def same_theta(one, other):
    thetas = [RunDir.open(path).load_theta(ema=False) for path in (one, other)]
    return all(torch.equal(value, thetas[1][name]) for name, value in thetas[0].items())


def test_a_mean_loss_that_no_training_makes_gives_no_sum(tiny, tmp_path):
    config = tiny(secure__aggregation=True, secure__losses="summed", **FAST | {"rounds": 2})
    experiment = Experiment(config, tmp_path / "run")
    with task_runner(config, experiment.dataset, 1) as runner:

        def spoil(tasks):
            for task, outcome in runner(tasks):
                outcome.payload.numbers["loss"] *= 1 if task.round == 1 else 1e4
                yield task, outcome

        with pytest.raises(RunStopped, match="there is no sum: its training diverged"):
            experiment.train(Exchange(experiment, SecureRunner(experiment.setup, spoil)))


def test_a_client_whose_values_are_out_of_range_says_so_and_costs_its_own_update(tiny, tmp_path):
    config = tiny(secure__aggregation=True, **FAST)
    experiment = Experiment(config, tmp_path / "run")
    with task_runner(config, experiment.dataset, 1) as runner:

        def spoil(tasks):
            for task, outcome in runner(tasks):
                if task.client == 2:
                    first = next(iter(outcome.payload.arrays.values()))
                    object.__setattr__(first, "data", b"\x00\x00\x80\x7f" * (len(first.data) // 4))
                yield task, outcome

        experiment.train(Exchange(experiment, SecureRunner(experiment.setup, spoil)))
    (entry,) = experiment.history[0].rejected
    assert entry["client"] == 2
    assert "not finite" in entry["reason"]
    assert len(experiment.history[0].clients) == 4


LIES = {
    m.SEALED_SHARES: (Stage.SHARES, 2, [0, 1, 3, 4], "got shares of no use"),
    m.HASHES: (Stage.SHARES, 2, [0, 1, 3, 4], "got shares of no use"),
    m.KEYS: (Stage.KEYS, 1, [0, 1, 3, 4], "public keys are of no use"),
    m.VECTOR: (Stage.VECTORS, 1, [0, 1, 3, 4], "its vector has"),
    m.OPENED: (Stage.OPEN, 1, [0, 1, 2, 3, 4], "are not those it was given"),
}
"""What a client spoils -> its exchange, and the tries, who counts and the reason that follow."""


@pytest.mark.parametrize("part", LIES)
def test_a_client_that_sends_what_is_of_no_use_is_named_and_costs_one_more_try_at_most(
    tiny, tmp_path, part
):
    where, due, counted, reason = LIES[part]
    config = tiny(secure__aggregation=True, **FAST)
    experiment, tries = Experiment(config, tmp_path / "run"), []

    class Spoiling(SecureRunner):
        def _answer(self, task, trained=None):
            answer = super()._answer(task, trained)
            stage = m.stage_of(task)
            tries.append(stage) if (task.client, stage) == (0, Stage.KEYS) else None
            if (task.client, stage) == (2, where):
                parts = answer.payload.arrays
                one, size = parts[m.PREFIX + part], len(parts[m.PREFIX + part].data)
                size -= 8 if part == m.VECTOR else 0
                parts[m.PREFIX + part] = Packed(one.dtype, (size,), bytes(size))
            return answer

    with task_runner(config, experiment.dataset, 1) as runner:
        experiment.train(Exchange(experiment, Spoiling(experiment.setup, runner)))
    assert len(tries) == due
    summary = experiment.history[0]
    assert [client.client for client in summary.clients] == counted
    (entry,) = summary.rejected
    assert (entry["client"], entry["fault"]) == (2, "node")
    assert reason in entry["reason"]


REFUSED = {
    "round.mode": {"round__mode": "buffered", "wire__differences": True},
    "round.aggregation": {"round__aggregation": "median"},
    "round.over_select": {"round__over_select": 0.5},
    "round.max_norm": {"round__max_norm": 1.0},
    "round.norm_factor": {"round__norm_factor": 10},
    "round.weighting": {"round__weighting": "examples", "secure__losses": "summed"},
    "local.epochs": {
        "local__epochs": 1,
        "local__steps": None,
        "secure__losses": "summed",
        **SHARED,
    },
    "privacy.noise": {"privacy__clip": 1.0, "wire__differences": True},
    "theory.every": {"theory__every": 1},
    "wire.down": {"wire__down": "bf16", "wire__differences": True},
    "round.fraction": {"round__fraction": 0.2},
    "secure.least": {"secure__least": 6},
    "secure.neighbours": {"secure__neighbours": 2, "method": "R-FedDM-S"},
    "neighbours: 3": {"secure__neighbours": 3},
    "secure.neighbours: 6 are more": {"secure__neighbours": 6, "pruning__kind": "full"},
    "secure.neighbours: 4 cannot": {
        "secure__neighbours": 4,
        "pruning__kind": "topk",
        "pruning__keep": [1, 1, 1, 1, 0.5],
    },
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_secret_sums_cannot_have_is_refused_with_the_key_and_the_reason(tiny, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as refused:
        tiny(secure__aggregation=True, **REFUSED[key])
    assert "secure" in str(refused.value)
    assert len(str(refused.value)) > 80


def test_settings_of_secret_sums_are_refused_where_nothing_is_summed_in_secret(tiny):
    for name, value in (("least", 5), ("neighbours", 4), ("threshold", 0.7), ("losses", "summed")):
        with pytest.raises(ConfigError, match=rf"{name}: {value} changes nothing") as refused:
            tiny(**{f"secure__{name}": value})
        assert "set secure.aggregation to true" in str(refused.value)


@pytest.mark.parametrize("kind", ["full", "random", "topk"])
def test_neighbours_can_be_chosen_where_every_client_keeps_the_whole_network(tiny, kind):
    config = tiny(secure__aggregation=True, secure__neighbours=4, pruning__kind=kind)
    assert config.secure.neighbours == 4


def test_a_baseline_that_leaves_too_few_clients_for_a_sum_is_refused_before_training(tiny):
    settings = {"pruning__kind": "channels", "pruning__baseline": "exclusive"}
    config = tiny(secure__aggregation=True, pruning__keep=[1, 1, 0.5, 0.5, 0.5], **settings)
    with pytest.raises(ConfigError, match=r"'exclusive' leaves 2 that train, and a sum needs 3"):
        check_training(config)
    check_training(tiny(secure__aggregation=True, pruning__keep=[1, 1, 1, 0.5, 0.5], **settings))


def test_clients_that_remember_an_attempt_take_the_first_one_after_their_run_was_resumed(tiny):
    setup, memory = Setup.of(tiny(secure__aggregation=True, **FAST)), None
    theta = parameters_of(build_network(setup.config))
    for _ in range(2):  # processes of the server
        coordinator = coordinator_of(setup, theta)
        for _ in range(3):
            task = next(next(coordinator.exchanges(1)))
            _, memory = Members.of(setup).answer(task, memory)
    assert task.client == 0
