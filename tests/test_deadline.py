"""How long a round waits: a function of what came and what did not, and what a run makes of it."""

import time

import pytest
from flwr.app import MessageType
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from fed_diffusion.config import ConfigError, load_config
from server_app import exchange
from server_app.deadline import Deadline
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


def test_a_message_that_is_lost_costs_its_round_minutes_and_not_an_hour(tmp_path, monkeypatch):
    """The clock stands still but for waits, which are a hundred times as long on it."""
    now = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds):
            now[0] += 100 * seconds

    monkeypatch.setattr(exchange, "time", Clock)
    made = experiment(tmp_path, rounds=4)
    FedDiffusion(made).run(Forgetful([node(0), node(1), node(2)], {"2", "3"}))
    lines = lines_of(tmp_path)
    reasons = [[entry["reason"] for entry in line["rejected"]] for line in lines]
    assert reasons == [[], ["no reply within 300 s"], ["no reply within 600 s"], []]
    assert 900 <= now[0] < HOUR
    assert all(entry["fault"] == "network" for line in lines for entry in line["rejected"])


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
