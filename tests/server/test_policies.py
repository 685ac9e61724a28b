"""Round policies: those of the user's own, and a round that is tried again in either mode."""

import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError
from fed_diffusion.engines.local import Exchange, run_in_process
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.server.coordinator import BelowQuorum, Coordinator
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid

SMALL = {"model__widths": [8], "evaluation__every": 0, "wire__differences": True, "clients": 4}
BUFFERED = {"round__mode": "buffered", "round__buffer": 2, "round__staleness": 2.0}


class Pairs:
    """Any two updates move theta, and a stale one counts (1 + s)^-2: as `buffered` can be set."""

    overlapping = True

    def __init__(self, config):
        pass

    def target(self, eligible):
        return 2

    def quorum(self, eligible):
        return 2

    def ask(self, round, free, eligible):
        return list(free)

    def weight(self, staleness):
        return (1 + staleness) ** -2.0


def end_of(experiment):
    coordinator = experiment.coordinator
    lines = [line.to_dict() | {"seconds": 0, "clients": 0} for line in experiment.history]
    return coordinator.theta | {f"ema.{n}": v for n, v in coordinator.ema.items()}, lines


def same(one, two):
    return one[1] == two[1] and all(torch.equal(one[0][name], two[0][name]) for name in one[0])


def test_an_overlapping_policy_of_the_users_own_runs_in_both_engines_to_the_same_bits(
    tiny, tmp_path
):
    own = tiny(**SMALL, rounds=5, round__mode=f"{__name__}:Pairs")
    runs = [Experiment(own, tmp_path / "own"), Experiment(own, tmp_path / "flower")]
    runs += [Experiment(tiny(**SMALL, rounds=5, **BUFFERED), tmp_path / "built-in")]
    run_in_process(runs[0], processes=1)
    nodes = [{"partition-id": n, "num-partitions": 4} for n in range(4)]
    FedDiffusion(runs[1]).run(LocalGrid(nodes))
    run_in_process(runs[2], processes=1)
    ends = [end_of(run) for run in runs]
    assert max(line["staleness"] for line in ends[0][1]) == 1
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_a_round_that_is_tried_again_asks_again_whom_it_has_asked(tiny, tmp_path, digits, mode):
    """One failure of one client costs an attempt, and not the run."""
    config = tiny(**SMALL, rounds=2, round__mode=mode, round__quorum=1.0, round__retries=1)
    worker, failed = Worker(config, digits), []

    def run(tasks):
        for task in tasks:
            if task.client == 2 and not failed:
                failed.append(task.round)
                yield task, OSError("the disk is full")
            else:
                yield task, worker.run(task)

    experiment = Experiment(config, tmp_path / "run", digits)
    experiment.train(Exchange(experiment, run))
    first, second = experiment.history
    assert [entry["client"] for entry in first.rejected] == [2]
    assert [[c.client for c in line.clients] for line in (first, second)] == [[0, 1, 2, 3]] * 2
    assert first.bytes_down == 2 * second.bytes_down


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_where_everybody_is_banned_no_round_is_closed(tiny, mode):
    config = tiny(**SMALL, round__mode=mode)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    coordinator.participation.strikes = dict.fromkeys(range(4), 3)
    assert list(coordinator.tasks(1)) == []
    assert not coordinator.enough()
    with pytest.raises(BelowQuorum, match="No reply came"):
        coordinator.close_round()


def test_a_policy_that_asks_clients_who_are_not_free_ends_the_run_by_name(tiny, tmp_path):
    config = tiny(**SMALL, rounds=3, round__mode=f"{__name__}:Fickle")
    with pytest.raises(ValueError, match=r"asks clients \[99\], which are not free"):
        run_in_process(Experiment(config, tmp_path / "run"), processes=1)
    resumed = Experiment.resume(tmp_path / "run")
    assert resumed.coordinator.round == 1
    resumed.close()


class Fickle(Pairs):
    overlapping = False

    def ask(self, round, free, eligible):
        return list(free) if round == 1 else [99]


def test_privacy_takes_no_policy_whose_guarantee_is_not_known(tiny):
    with pytest.raises(ConfigError, match=r"it needs round\.mode = synchronous"):
        tiny(**SMALL, round__mode=f"{__name__}:Pairs", privacy__clip=0.1)


def test_a_run_of_which_nobody_answers_stops(tiny, tmp_path):
    config = tiny(**SMALL, rounds=2, **BUFFERED)
    experiment = Experiment(config, tmp_path / "run")

    def run(tasks):
        for task in tasks:
            yield task, TimeoutError("no reply within 1 s")

    with pytest.raises(RunStopped, match="It was tried 3 times"):
        experiment.train(Exchange(experiment, run))
