"""The strategy's rounds on a grid that counts: how many messages are out at once."""

import math

import pytest
from flwr.app import MessageType

from fed_diffusion.config import load_config
from fed_diffusion.experiment import Experiment
from fed_diffusion.server.coordinator import BelowQuorum
from server_app import exchange
from server_app.nodes import most_out
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.tiny import TINY

NODES = [{"partition-id": i, "num-partitions": 5} for i in range(5)]


class Counting(LocalGrid):
    """Answers at once, or, where `silent`, trains nobody; notes how many replies are not pulled."""

    def __init__(self, silent=False):
        super().__init__(NODES)
        self.silent, self.out, self.most_out, self.trained = silent, 0, 0, 0

    def _push(self, message):
        if message.metadata.message_type == MessageType.TRAIN:
            self.trained += 1
            self.out += 1
            self.most_out = max(self.most_out, self.out)
            if self.silent:
                return f"lost-{self.trained}"
        return super()._push(message)

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        self.out -= sum(m.metadata.message_type == MessageType.TRAIN for m in found)
        return found


def experiment(folder, **settings):
    own = {"clients": 5, "rounds": 1, "evaluation.every": 0, "evaluation.samples": 0}
    return Experiment(load_config("digits", TINY | own | settings), folder)


@pytest.mark.parametrize(("limit", "most"), [(2, 2), (math.inf, 5)])
def test_messages_wait_for_their_turn_where_they_lie_in_this_process(
    tmp_path, monkeypatch, limit, most
):
    monkeypatch.setattr(exchange, "most_out", lambda grid: limit)
    grid, run = Counting(), experiment(tmp_path / "run")
    FedDiffusion(run).run(grid)
    assert grid.most_out == most
    assert len(run.history[0].clients) == grid.trained == 5


def test_at_the_deadline_clients_whose_turn_never_came_are_named_too(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "most_out", lambda grid: 2)
    grid = Counting(silent=True)
    run = experiment(tmp_path / "run", **{"round.deadline_s": 1.0})
    exchange.Exchange(run, grid, FedDiffusion(run)._meet(grid))(1)
    assert grid.trained == 2
    rejected = run.coordinator.open.rejected
    assert sorted(entry["client"] for entry in rejected) == [0, 1, 2, 3, 4]
    assert {entry["reason"] for entry in rejected} == {"no reply within 1 s"}


class Slow(LocalGrid):
    """Its replies come when `here` says so."""

    here = False

    def pull_messages(self, message_ids):
        asked = message_ids[0] == "0"  # the opening query
        return super().pull_messages(message_ids) if self.here or asked else []


BUFFERED = {"round.mode": "buffered", "wire.differences": True}


@pytest.mark.parametrize("more", [{}, BUFFERED], ids=["synchronous", "buffered"])
def test_a_reply_behind_the_deadline_is_counted_as_late_and_thrown_away(tmp_path, more):
    grid = Slow([{}])
    run = experiment(tmp_path / "run", **{"round.deadline_s": 1.0, "clients": 2} | more)
    exchange_of = exchange.Exchange(run, grid, FedDiffusion(run)._meet(grid))
    exchange_of(1)
    rejected = [(entry["client"], entry["reason"]) for entry in run.coordinator.open.rejected]
    assert rejected == [(0, "no reply within 1 s"), (1, "no reply within 1 s")]
    with pytest.raises(BelowQuorum):
        run.close_round()
    grid.here = True
    exchange_of(1)
    summary = run.close_round()
    assert summary.late == 2
    assert [client.client for client in summary.clients] == [0, 1]


def test_supernodes_are_sent_their_messages_at_once():
    assert most_out(LocalGrid(NODES)) == math.inf


def test_flowers_own_start_is_refused_with_what_to_call(tmp_path):
    server = FedDiffusion(experiment(tmp_path / "run"))
    with pytest.raises(NotImplementedError, match=r"\.run\(grid\)"):
        server.start(grid=LocalGrid(NODES), initial_arrays=None, num_rounds=3)
