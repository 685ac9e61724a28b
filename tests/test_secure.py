"""Secure aggregation on Flower's messages: the bits of a run in one process without it."""

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message
from flwr.common.constant import ErrorCode

from client_app.app import app
from fed_diffusion.experiment import Experiment
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.secure.messages import STAGE, Stage
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.secure.runs import FAST, run, same

NODES = [{"partition-id": i, "num-partitions": 5} for i in range(5)]
SETTINGS = FAST | {"method": "R-FedDM-S"}
SECURE = SETTINGS | {"secure__aggregation": True, "secure__least": 1}


class Losing(LocalGrid):
    """Loses each of some clients' messages of one exchange, and looks at all others."""

    def __init__(self, lost):
        super().__init__(NODES)
        self.lost, self.remembered, self.replies = lost, [], []

    def _push(self, message):
        stage = message.content["metrics"].get(STAGE) if "metrics" in message.content else None
        if stage is not None and self.lost.get(message.content["about"]["client"]) == stage:
            sent = f"lost {stage} {message.content['about']['client']}"
            message.metadata.__dict__["_message_id"] = sent
            gone = Error(ErrorCode.NODE_UNAVAILABLE, "its SuperNode was killed")
            self._replies[sent] = Message(gone, reply_to=message)
            return sent
        sent = super()._push(message)
        states = [str(dict(context.state)) for context in self.nodes.values()]
        self.remembered.append(sum("seal" in state for state in states))
        self.replies.append(self._replies.get(sent))
        return sent


@pytest.mark.parametrize("stage", [None, *Stage], ids=str)
def test_a_run_on_flower_ends_with_the_bits_of_a_plain_one_whoever_is_lost(tiny, tmp_path, stage):
    counted_out = () if stage in (None, Stage.OPEN) else (1, 3)
    plain = run(tiny(**SETTINGS), tmp_path / "plain", plain_without=counted_out)
    config = tiny(**SECURE)
    grid = Losing({} if stage is None else {1: stage, 3: stage})
    secure = Experiment(config, tmp_path / "secure")
    FedDiffusion(secure).run(grid)
    assert same(plain, secure)
    assert {entry["client"] for entry in secure.history[0].rejected} == set(counted_out)
    assert max(grid.remembered) >= 3
    assert all("memory" not in reply.content for reply in grid.replies if reply is not None)
    if stage is None:
        assert grid.remembered[-1] == 0  # of a round that is over nothing is left on the nodes


def test_both_engines_count_the_same_bytes(tiny, tmp_path):
    local = run(tiny(**SECURE), tmp_path / "local")
    flower = Experiment(tiny(**SECURE), tmp_path / "flower")
    FedDiffusion(flower).run(LocalGrid(NODES))
    lines = local.history[0], flower.history[0]
    assert lines[0].bytes_up == lines[1].bytes_up
    assert lines[0].bytes_down == lines[1].bytes_down


class Late(LocalGrid):
    """Loses the vectors of the first attempt, and brings one of their tasks in the second one."""

    def __init__(self):
        super().__init__(NODES)
        self.attempts, self.late, self.errors = [], None, []

    def _push(self, message):
        stage = message.content["metrics"].get(STAGE) if "metrics" in message.content else None
        if stage == Stage.KEYS and message.content["about"]["client"] == 0:
            self.attempts.append(stage)
        if stage == Stage.VECTORS and len(self.attempts) == 1:
            self.late = self.late or message
            message.metadata.__dict__["_message_id"] = "late"
            return f"lost {message.content['about']['client']}"
        if stage == Stage.VECTORS and self.late is not None:
            context = self.nodes[self.late.metadata.dst_node_id]
            before = dict(context.state)
            with pytest.raises(UpdateError) as refused:
                app(self.late, context)
            self.errors.append(str(refused.value))
            assert dict(context.state) == before
            self.late = None
        return super()._push(message)


def test_a_task_that_comes_after_its_attempt_costs_its_client_no_newer_keys(tiny, tmp_path):
    plain = run(tiny(**SETTINGS), tmp_path / "plain")
    secure, grid = Experiment(tiny(**SECURE, round__deadline_s=3), tmp_path / "secure"), Late()
    FedDiffusion(secure).run(grid)
    assert same(plain, secure)
    assert len(grid.attempts) == 2
    assert ": it knows attempt " in grid.errors[0]
    assert [client.client for client in secure.history[0].clients] == [0, 1, 2, 3, 4]


def test_clients_that_add_noise_do_so_on_flower_too(tiny, tmp_path):
    """With next to no noise the sum is the one of a run without any."""
    settings = FAST | {"method": "FedDM-F", "wire__differences": True}
    plain = run(tiny(**settings), tmp_path / "plain").coordinator.theta
    quiet = {"privacy__clip": 100.0, "privacy__noise_multiplier": 1e-8, "privacy__noise": "clients"}
    private = Experiment(tiny(**settings, **quiet, secure__aggregation=True), tmp_path / "private")
    results = FedDiffusion(private).run(LocalGrid(NODES))
    theta = private.coordinator.theta
    assert all(torch.allclose(plain[name], value, atol=5e-6) for name, value in theta.items())
    assert any(not torch.equal(plain[name], value) for name, value in theta.items())
    assert (results["privacy"]["noise"], results["privacy"]["rounds"]) == ("clients", 1)


def test_with_summed_losses_a_node_never_says_how_many_images_it_has(tiny, tmp_path):
    config, grid = tiny(**SECURE, secure__losses="summed"), Losing({})
    FedDiffusion(Experiment(config, tmp_path / "run")).run(grid)
    told = [reply.content["metrics"].keys() for reply in grid.replies]
    assert any("own-data" in numbers for numbers in told)
    assert not any({"images", "examples"} & set(numbers) for numbers in told)


class Forgetting(LocalGrid):
    """Puts nothing, or what it was an exchange ago, in the place of what a client remembers."""

    def __init__(self, old):
        super().__init__(NODES)
        self.old = old

    def _push(self, message):
        stage = message.content["metrics"].get(STAGE) if "metrics" in message.content else None
        if stage != Stage.SHARES or message.content["about"]["client"] != 1:
            return super()._push(message)
        context = self.nodes[message.metadata.dst_node_id]
        for key in list(context.state):
            context.state[key] = ConfigRecord({"bytes": self.old})
        with pytest.raises(UpdateError) as raised:
            app(message, context)
        message.metadata.__dict__["_message_id"] = "forgotten"
        reason = f"{type(raised.value)}:<'{raised.value}'>"  # as Flower's ClientApp process says it
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        self._replies["forgotten"] = Message(error, reply_to=message)
        return "forgotten"


@pytest.mark.parametrize("old", [b"", b'{"round": 1, "attempt": 1, "seal": "", "pair": ""}'])
def test_what_a_client_has_forgotten_is_not_held_against_its_node(tiny, tmp_path, old):
    experiment = Experiment(tiny(**SECURE), tmp_path / "run")
    FedDiffusion(experiment).run(Forgetting(old))
    (entry,) = experiment.history[0].rejected
    assert (entry["client"], entry["fault"]) == (1, "network")
    assert "knows nothing" in entry["reason"]
    assert len(experiment.history[0].clients) == 4
