"""How long a round waits: a function of what came and what did not, and what a run makes of it."""

import time

import pytest
from flwr.app import MessageType
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.protocol.messages import Task
from fed_diffusion.protocol.wire import Payload
from fed_diffusion.secure.messages import STAGE, Stage
from server_app import exchange
from server_app.deadline import Deadline
from server_app.exchange import Sent, Turns
from server_app.replies import Bounded, Unfinished
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.test_nodes import experiment, lines_of, node

HOUR = 3600.0


def test_a_number_of_seconds_stays_what_it_is_whatever_comes():
    given = Deadline(40.0)
    given.came(0, 1000.0)
    given.missed(1)
    assert given.seconds([0, 1]) == 40.0


def test_auto_is_an_hour_until_the_first_update_has_come():
    auto = Deadline("auto")
    auto.missed(0)
    assert auto.seconds([0, 1]) == HOUR


@pytest.mark.parametrize(
    ("slowest", "expected"), [(1.0, 300.0), (29.0, 300.0), (31.0, 310.0), (400.0, HOUR)]
)
def test_auto_is_ten_times_the_slowest_update_within_five_minutes_and_an_hour(slowest, expected):
    auto = Deadline("auto")
    for seconds in (0.5, slowest, 0.7):
        auto.came(0, seconds)
    assert auto.seconds([0, 1]) == expected


@pytest.mark.parametrize(
    ("slowest", "expected"),
    [(40.0, [400.0, 800.0, 1600.0, 3200.0, 400.0, 400.0]), (200.0, [2000.0, *[HOUR] * 3, 2000.0])],
)
def test_who_did_not_come_gets_twice_as_long_three_times_and_others_do_not(slowest, expected):
    auto = Deadline("auto")
    auto.came(0, slowest)
    found = []
    for _ in expected:
        found.append(auto.seconds([0, 1]))
        assert auto.seconds([0]) == expected[0]
        auto.missed(1)
    assert found == expected


def test_who_came_after_it_was_missed_has_three_chances_again():
    auto = Deadline("auto")
    auto.came(0, 40.0)
    for _ in range(4):
        auto.missed(1)
    auto.came(1, 41.0)
    assert auto.seconds([0, 1]) == 410.0
    auto.missed(1)
    assert auto.seconds([0, 1]) == 820.0


def test_auto_is_the_default_and_other_words_and_truth_values_are_refused():
    assert load_config("digits").round.deadline_s == "auto"
    assert load_config("digits", {"round.deadline_s": 7}).round.deadline_s == 7.0
    for odd in ("soon", True, 0, -1):
        with pytest.raises(ConfigError, match=r"round\.deadline_s"):
            load_config("digits", {"round.deadline_s": odd})


class Forgetful(LocalGrid):
    """What node 102 replies in these rounds is lost, and nobody says so."""

    def __init__(self, configs, rounds):
        super().__init__(configs)
        self._rounds = rounds

    def _push(self, message):
        message_id = super()._push(message)
        lost = message.metadata.dst_node_id == 102 and message.metadata.group_id in self._rounds
        if lost and message.metadata.message_type == MessageType.TRAIN:
            del self._replies[message_id]
        return message_id


@pytest.fixture
def now(monkeypatch):
    """The time, which stands still but for waits, and these are a hundred times as long."""
    now = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds):
            now[0] += 100 * seconds

    monkeypatch.setattr(exchange, "time", Clock)
    return now


def test_a_message_that_is_lost_costs_its_round_minutes_and_not_an_hour(tmp_path, now):
    made = experiment(tmp_path, rounds=4)
    FedDiffusion(made).run(Forgetful([node(0), node(1), node(2)], {"2", "3"}))
    lines = lines_of(tmp_path)
    reasons = [[entry["reason"] for entry in line["rejected"]] for line in lines]
    assert reasons == [[], ["no reply within 300 s"], ["no reply within 600 s"], []]
    assert 900 <= now[0] < HOUR
    assert all(entry["fault"] == "network" for line in lines for entry in line["rejected"])


class Secretive(LocalGrid):
    """Node 102 answers all but what it trained, from the second round on."""

    def _push(self, message):
        message_id = super()._push(message)
        about = message.content.get("metrics")
        vector = about is not None and about.get(STAGE) == Stage.VECTORS
        if vector and message.metadata.dst_node_id == 102 and message.metadata.group_id != "1":
            del self._replies[message_id]
        return message_id


def test_small_exchanges_of_secure_aggregation_are_no_updates_for_the_deadline(tmp_path, now):
    secure = {"secure.aggregation": True, "secure.least": 1, "clients": 5}
    made = experiment(tmp_path, rounds=6, **secure)
    FedDiffusion(made).run(Secretive([node(i, 5) for i in range(5)]))
    reasons = [[entry["reason"] for entry in line["rejected"]] for line in lines_of(tmp_path)]
    waits = [300, 600, 1200, 2400, 300]
    assert reasons == [[], *([f"no reply within {seconds} s"] for seconds in waits)]


def test_a_node_that_works_keeps_no_other_nodes_tasks_back(tmp_path):
    met = FedDiffusion(experiment(tmp_path, clients=4))._meet(LocalGrid([node(0, 2), node(1, 2)]))
    turns, tasks = Turns(met, remember=True), iter([Task(1, c, Payload({}, {})) for c in range(4)])
    out = []

    def take():
        task = turns.take(tasks, out)
        if task is not None:
            out.append(Sent(task.client, met.host_of(task.client), 0.0, 1.0, 1))
        return task and task.client

    assert [take(), take(), take()] == [0, 1, None]
    del out[1]  # node 101 has answered, and node 100 never does
    assert [take(), take()] == [3, None]
    del out[0]
    assert take() == 2


def test_a_reply_that_is_begun_and_never_ended_is_waited_for_until_its_deadline_only():
    """Flower would wait three minutes for every object, and this process with it."""

    class Stalled:
        def PullObject(self, request):
            return PullObjectResponse(object_found=True, object_available=False)

    client, began = Bounded(Stalled()), time.monotonic()
    client.allow(100, began + 0.5)
    with pytest.raises(Unfinished, match="not ended in time"):
        pull_objects(["object"], make_pull_object_fn_protobuf(client.PullObject, Node(), 1))
    assert 0.5 < time.monotonic() - began < 60
