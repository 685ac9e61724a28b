"""Nodes that restart, lie about who they are, and send what they like: what becomes of a run."""

import json
import time
import unicodedata

import pytest
from flwr.app import Error, Message, MessageType, MetricRecord

from fed_diffusion.common.text import MOST
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.deploy.certificates import make_node_key
from fed_diffusion.experiment import Experiment, RunStopped
from server_app import exchange, nodes
from server_app.admitted import LIST, Admitted
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.tiny import TINY


def node(partition, of=3, **more):
    return {"partition-id": partition, "num-partitions": of, "warm-seconds": 0, **more}


def experiment(folder, **settings):
    own = {"clients": 3, "rounds": 1, "evaluation.every": 0, "local.steps": 1, "local.batch": 2}
    return Experiment(load_config("digits", TINY | own | settings), folder / "run")


def meet(grid, folder, **settings):
    return FedDiffusion(experiment(folder, **settings))._meet(grid)


def run(grid, folder, **settings):
    """The lines of metrics.jsonl."""
    made = experiment(folder, **settings)
    FedDiffusion(made).run(grid)
    return lines_of(folder)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def hosts(met, clients=3):
    found = [met.host_of(client) for client in range(clients)]
    return [host and host.node for host in found]


class Lying(LocalGrid):
    """What a node replies to a training message is what `lie(message, reply)` makes of it."""

    def __init__(self, configs, lies):
        super().__init__(configs)
        self.lies = lies

    def _push(self, message):
        message_id = super()._push(message)
        lie = self.lies.get(message.metadata.dst_node_id)
        if lie and message.metadata.message_type == MessageType.TRAIN:
            self._replies[message_id] = lie(message, self._replies[message_id])
        return message_id


def fails(code, reason="it is broken"):
    return lambda message, reply: Message(Error(code, reason), reply_to=message)


# --- who is there -------------------------------------------------------------------------------


def test_a_refused_node_that_is_mended_and_restarted_at_once_is_asked_again(tmp_path):
    grid = LocalGrid([node(0), node(1), node(2, **{"data-dir": "/nowhere"})])
    met = meet(grid, tmp_path)
    assert hosts(met) == [100, 101, None]
    ((client, refused, reason),) = met.refusals(range(3))
    assert (client, refused) == (2, 102)
    assert "/nowhere" in reason
    met.refresh()
    assert hosts(met) == [100, 101, None]  # not before it has had the time
    grid.restart(102, **{"data-dir": ""})
    met.refresh()
    assert hosts(met) == [100, 101, 102]
    assert met.refused() == []


def test_a_refused_node_that_is_put_right_while_it_runs_is_asked_again_after_a_while(
    tmp_path, monkeypatch
):
    grid = LocalGrid([node(0), node(1), node(2, **{"data-dir": "/nowhere"})])
    met = meet(grid, tmp_path)
    grid.nodes[102].node_config["data-dir"] = ""
    met.refresh()
    assert hosts(met) == [100, 101, None]
    now = time.monotonic() + nodes.AGAIN_S
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now)
    met.refresh()
    assert hosts(met) == [100, 101, 102]


def test_a_node_that_comes_back_as_another_partition_has_its_new_role(tmp_path):
    grid = LocalGrid([node(0), node(1)])
    met = meet(grid, tmp_path)
    assert hosts(met) == [100, 101, None]
    grid.restart(101, **{"partition-id": 2})
    met.refresh()
    assert hosts(met) == [100, None, 101]


def test_a_round_does_not_wait_for_what_a_restarted_node_was_working_on(tmp_path, monkeypatch):
    class Restarting(LocalGrid):
        def _push(self, message):
            message_id = super()._push(message)
            lost = message.metadata.dst_node_id == 102
            if lost and message.metadata.message_type == MessageType.TRAIN:
                del self._replies[message_id]
                self.restart(102)
            return message_id

    monkeypatch.setattr(exchange, "LIVES_S", 0.0)
    began = time.monotonic()
    (line,) = run(Restarting([node(0), node(1), node(2)]), tmp_path)
    assert time.monotonic() - began < 60  # the deadline is an hour
    (entry,) = line["rejected"]
    assert (entry["client"], entry["node"], entry["fault"]) == (2, "102", "network")
    assert "was started again" in entry["reason"]


# --- who is who ---------------------------------------------------------------------------------


def test_a_node_that_says_it_is_everybody_gets_no_ones_task_and_is_named(tmp_path):
    grid = LocalGrid([node(0), node(1), node(2), node(0, 1)])
    (line,) = run(grid, tmp_path)
    assert [(c["client"], c["node"]) for c in line["clients"]] == [
        (0, "100"),
        (1, "101"),
        (2, "102"),
    ]
    (refused,) = line["refused"]
    assert refused["node"] == "103"
    assert "hosts client 0" in refused["reason"]


def test_two_nodes_with_one_partition_are_said_in_every_round_and_the_spare_one_takes_over(
    tmp_path, monkeypatch
):
    grid = LocalGrid([node(0), node(1), node(1)])
    lines = run(grid, tmp_path, rounds=2)
    for line in lines:
        assert [entry["node"] for entry in line["refused"]] == ["102"]
        assert "each node has a partition-id of its own" in line["refused"][0]["reason"]
    (tmp_path / "again").mkdir()
    met = meet(grid, tmp_path / "again")
    grid.online.remove(101)
    met.refresh()
    now = time.monotonic() + nodes.AGAIN_S
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now)
    met.refresh()
    assert hosts(met) == [100, 102, None]
    grid.online.add(101)
    met.refresh()
    assert hosts(met) == [100, 102, None]
    assert [entry["node"] for entry in met.refused()] == ["101"]


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A grid of nodes with keys, of which the server has a list; a liar is there first."""
    keys = [make_node_key()[1] for _ in range(4)]
    entries = {
        f"node-{i + 1}": {"key": key.decode(), "partition-id": i, "num-partitions": 3}
        for i, key in enumerate(keys[:3])
    }
    path = tmp_path / "nodes.json"
    path.write_text(json.dumps(entries))
    monkeypatch.setenv(LIST, str(path))
    grid = LocalGrid([node(0, 1), node(1), node(2), node(0)])
    grid.keys = dict(zip(sorted(grid.nodes), [keys[0], keys[1], keys[2], keys[3]], strict=True))
    return grid, path


def test_a_key_hosts_the_client_that_the_servers_list_gives_it_and_no_other(listed, tmp_path):
    grid, _ = listed
    met = meet(grid, tmp_path)
    assert hosts(met) == [None, 101, 102]
    reasons = {entry["node"]: entry["reason"] for entry in met.refused()}
    assert "num-partitions=1" in reasons["100"]
    assert "num-partitions=3 for node-1" in reasons["100"]
    assert "its key is not in the server's nodes.json" in reasons["103"]
    grid.restart(100, **{"num-partitions": 3})
    met.refresh()
    assert hosts(met) == [100, 101, 102]


def test_a_list_that_is_mended_while_a_run_goes_on_counts_from_then_on(
    listed, tmp_path, monkeypatch
):
    grid, path = listed
    met = meet(grid, tmp_path)
    entries = json.loads(path.read_text())
    entries["node-1"]["key"] = grid.keys[103].decode()  # its machine has a new key
    later = time.monotonic()
    for text, found in (("{", [None, 101, 102]), (json.dumps(entries), [103, 101, 102])):
        path.write_text(text)
        later += nodes.AGAIN_S
        monkeypatch.setattr(nodes.time, "monotonic", lambda now=later: now)
        met.refresh()
        assert hosts(met) == found
    assert [entry["node"] for entry in met.refused()] == ["100"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no file"),
        ("[]", "no JSON object"),
        ('{"a": {"partition-id": 0, "num-partitions": 1}}', "must be of the form"),
        ('{"a": {"key": "k", "partition-id": 3, "num-partitions": 3}}', "partition-id is 3 of 3"),
        ('{"a": {"key": "k", "partition-id": "0", "num-partitions": 3}}', "must be of the form"),
        (
            '{"a": {"key": "k", "partition-id": 0, "num-partitions": 2},'
            ' "b": {"key": "k", "partition-id": 1, "num-partitions": 2}}',
            "lists a key twice",
        ),
    ],
)
def test_a_list_of_nodes_that_cannot_be_read_is_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.setenv(LIST, str(tmp_path / "nodes.json"))
    if text is not None:
        (tmp_path / "nodes.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        Admitted.of_environment()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("partition-id", 5, "partition-id=5 num-partitions=3"),
        ("num-partitions", -1, "num-partitions=-1"),
        ("num-partitions", float("nan"), "not a finite number"),
        ("images", float("inf"), "not a finite number"),
        ("own-data", [1], "not a finite number"),
    ],
)
def test_numbers_that_no_node_can_mean_are_refused(tmp_path, key, value, words):
    class Odd(LocalGrid):
        def _push(self, message):
            message_id = super()._push(message)
            if message.metadata.dst_node_id == 101:
                found = self._replies[message_id].content["metrics"]
                found[key] = value
            return message_id

    met = meet(Odd([node(0), node(1)]), tmp_path)
    assert hosts(met) == [100, None, None]
    assert words in met.refused()[0]["reason"]


def test_of_what_a_node_says_only_what_is_asked_for_is_written_down(tmp_path):
    class Chatty(LocalGrid):
        def _push(self, message):
            message_id = super()._push(message)
            if message.metadata.message_type == MessageType.QUERY:
                self._replies[message_id].content["metrics"]["x" * 10**6] = 1.0
            return message_id

    made = experiment(tmp_path, **{"pruning.kind": "channels", "pruning.budget": "node"})
    FedDiffusion(made).run(Chatty([node(i, keep=1.0) for i in range(3)]))
    assert (tmp_path / "run/budgets.json").stat().st_size < 1000


# --- whose fault it is --------------------------------------------------------------------------


def no_message(message, reply):
    return Message(reply.content.__class__(), reply_to=message)


def for_another(message, reply):
    reply.content["about"]["client"] = 0
    return reply


LIES = {
    "its ClientApp raises": (fails(2), "node"),
    "its process dies": (fails(8), "node"),
    "what it sends is no message": (no_message, "node"),
    "it answers for another": (for_another, "node"),
    "its reply is lost": (fails(4), "network"),
    "it is away": (fails(5), "network"),
}


@pytest.mark.parametrize("name", LIES)
def test_what_is_the_nodes_fault_counts_against_it_and_what_is_not_does_not(name, tmp_path):
    lie, fault = LIES[name]
    grid = Lying([node(0), node(1), node(2)], {102: lie})
    lines = run(grid, tmp_path, rounds=3, **{"round.ban_after": 2})
    entries = [entry for line in lines for entry in line["rejected"]]
    assert {(e["client"], e["node"], e["fault"]) for e in entries} == {(2, "102", fault)}
    assert [line["banned"] for line in lines] == ([[], [2], [2]] if fault == "node" else [[]] * 3)
    assert len(entries) == (2 if fault == "node" else 3)


def test_where_every_clientapp_raises_nobody_is_banned_and_the_run_can_go_on(tmp_path):
    grid = Lying([node(0), node(1), node(2)], dict.fromkeys((100, 101, 102), fails(2)))
    settings = {"round.ban_after": 1}
    made = experiment(tmp_path, **settings)
    with pytest.raises(RunStopped, match="it is broken"):
        FedDiffusion(made).run(grid)
    grid.lies = {}
    FedDiffusion(Experiment.resume(tmp_path / "run")).run(grid)
    assert len(lines_of(tmp_path)[0]["clients"]) == 3


def test_no_node_of_a_deployment_can_end_a_run_with_the_words_of_a_dead_ray_actor(tmp_path):
    lie = fails(0, f"ray: {exchange.DEAD_ACTOR}")
    (line,) = run(Lying([node(0), node(1), node(2)], {101: lie}), tmp_path)
    assert [client["client"] for client in line["clients"]] == [0, 2]


def test_a_client_weighs_no_more_than_its_node_said_when_it_joined(tmp_path):
    def boasts(message, reply):
        reply.content["metrics"]["examples"] = 1_000_000
        return reply

    grid = Lying([node(0), node(1), node(2)], {102: boasts})
    (line,) = run(grid, tmp_path, **{"round.weighting": "examples"})
    (entry,) = line["rejected"]
    assert (entry["client"], entry["fault"]) == (2, "node")
    assert "trained on 1000000 images, but its node had 1797 when it joined" in entry["reason"]


@pytest.mark.parametrize("said", [None, -1_000_000, 0], ids=["nothing", "less than none", "none"])
def test_where_images_are_weights_a_node_has_to_say_how_many_it_has(tmp_path, said):
    class Vague(LocalGrid):
        def _push(self, message):
            message_id = super()._push(message)
            if message.metadata.dst_node_id == 102:
                found = self._replies[message_id].content["metrics"]
                del found["images"]
                if said is not None:
                    found["images"] = said
            return message_id

    nodes = [node(0), node(1), node(2)]
    met = meet(Vague(nodes), tmp_path, **{"round.weighting": "examples"})
    assert hosts(met) == [100, 101, None]
    assert "does not say how many images" in met.refused()[0]["reason"]


# --- texts --------------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07 \x1b[2J\u202e\x9b31m\nINFO : round 3/3 " + "x" * 5_000_000


def evil_numbers(message, reply):
    reply.content["metrics"] = MetricRecord({EVIL: [0.5]} | dict(reply.content["metrics"]))
    return reply


def evil_index(message, reply):
    reply.content["about"]["index"] = EVIL
    return reply


def evil_name(message, reply):
    index = json.loads(reply.content["about"]["index"])
    index[0][0] = EVIL[:1000]
    reply.content["about"]["index"] = json.dumps(index)
    return reply


def test_whatever_nodes_write_a_record_a_log_and_a_page_show_short_plain_lines(tmp_path, caplog):
    lies = {101: fails(2, EVIL), 102: evil_numbers, 103: evil_index, 104: evil_name}
    grid = Lying([node(i, 6) for i in range(6)], lies)
    grid.nodes[105].node_config["data-dir"] = "/" + EVIL[:200].replace("/", "")
    run(grid, tmp_path, clients=6, **{"round.quorum": 1})
    (line,) = lines_of(tmp_path)
    assert [client["client"] for client in line["clients"]] == [0]
    assert {entry["client"] for entry in line["rejected"]} == {1, 2, 3, 4, 5}
    texts = [entry["reason"] for entry in line["rejected"] + line["refused"]]
    texts += [record.getMessage() for record in caplog.records]
    for text in texts:
        assert len(text) < MOST + 200
        assert not {unicodedata.category(c) for c in text} & {"Cc", "Cf"}
    assert (tmp_path / "run/metrics.jsonl").stat().st_size < 30_000
    assert "\x1b" not in (tmp_path / "run/report.html").read_text()
