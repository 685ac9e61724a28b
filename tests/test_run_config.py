"""The strings of Flower's run config and node config are read with the rules of --set."""

import json

import pytest
from flwr.app import ConfigRecord, RecordDict

from client_app import work
from fed_diffusion.config import ConfigError, load_config
from server_app.app import config_of
from tests.tiny import TINY

EMPTY = dict.fromkeys(["method", "rounds", "clients", "seed", "data-dir", "set"], "")


def read(**given):
    return config_of(EMPTY | {"preset": "digits"} | given)


def test_text_is_taken_as_typed_and_numbers_are_decimal():
    config = read(**{"data-dir": "/x/set #2", "seed": "010", "rounds": 3, "clients": "2"})
    assert (config.data.dir, config.seed) == ("/x/set #2", 10)
    assert (config.rounds, config.clients) == (3, 2)
    assert read(**{"data-dir": "/2024"}).data.dir == "/2024"


def test_set_is_split_as_a_shell_does():
    config = read(set="'data.dir=/my images/:100:' local.eta=1e-2 'model.widths=[8, 16]'")
    assert (config.data.dir, config.local.eta) == ("/my images/:100:", 0.01)
    assert config.model.widths == (8, 16)


REFUSED = {
    "quotes without end": ({"set": "'rounds=3"}, "set = .*No closing quotation"),
    "true for a number": ({"rounds": True}, "rounds = True is not allowed: true and false"),
    "a number for a path": ({"data-dir": 2024}, "data.dir = 2024 is not allowed"),
    "a key twice": ({"rounds": 3, "set": "rounds=4"}, "rounds is given twice"),
    "a key twice in set": ({"set": "rounds=4 rounds=4"}, "rounds is given twice"),
    "a section beside its key": (
        {"data-dir": "/x", "set": "data={}"},
        "data.dir and data are given",
    ),
    "a method and a contradiction": (
        {"method": "FedDM-prox", "set": "local.prox=1e-1"},
        "local.prox = 0.1 contradicts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        read(**given)
    assert read(method="FedDM-prox", set="local.prox=1e-2").local.prox == 0.01


def hello(**node):
    own = {"pruning.kind": "topk", "pruning.budget": "node", "evaluation.every": 0}
    config = json.dumps(load_config("digits", TINY | own).to_dict())
    about = ConfigRecord({"round": 0, "client": 0, "config": config})
    return work.hello(RecordDict({"about": about}), node)


def test_a_node_that_says_its_numbers_as_text_is_understood():
    node = {"partition-id": "01", "num-partitions": "2", "keep": "5e-1"}
    numbers = hello(**node)["metrics"]
    assert (numbers["partition-id"], numbers["num-partitions"], numbers["keep"]) == (1, 2, 0.5)


@pytest.mark.parametrize("key", ["partition-id", "num-partitions", "keep"])
@pytest.mark.parametrize("value", ["half", True, "nan"])
def test_a_node_whose_numbers_are_none_says_so(key, value):
    refused = hello(**{key: value})["about"]["refused"]
    assert f"{key} = {value!r} in the node config is not a number" in refused
