"""A diagnostic that fails is named in the round's record, and the client's update counts."""

import json
import logging

import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.engines.local import simulate
from fed_diffusion.protocol.diagnostics import FAILED
from fed_diffusion.protocol.wire import Packed
from fed_diffusion.report.records import read_record
from fed_diffusion.report.theory import theory_section
from fed_diffusion.server.coordinator import Coordinator
from tests.server.test_diagnostics import changed

NET = """
import torch

class Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        if torch.is_grad_enabled():  # somebody wants to differentiate this
            raise NotImplementedError('it has no second derivative')
        return gradient

class Net(torch.nn.Module):
    '''Trains, and cannot be measured, which happens in evaluation mode and with gradients.'''
    def __init__(self, model, channels, size, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((channels, channels, 1, 1), 0.1))

    def forward(self, x, u, labels=None):
        y = torch.nn.functional.conv2d(x, self.weight)
        if not self.training and torch.is_grad_enabled():
            return self.fail(y)
        return y

class OneDerivative(Net):
    def fail(self, y):
        return Once.apply(y)

class OutOfMemory(Net):
    def fail(self, y):
        return y + torch.empty(2**59)

class NotText(Net):
    def fail(self, y):
        raise OSError('no file caf\\udce9 of memory')

class NotFinite(Net):
    def fail(self, y):
        return y * float('inf')
"""
WHY = {
    "OneDerivative": "no second derivative",
    "OutOfMemory": "memory",
    "NotText": "no file caf",
    "NotFinite": "not finite",
}


@pytest.fixture
def own(tiny, tmp_path, monkeypatch):
    (tmp_path / "unmeasurable.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, **settings: tiny(
        model__name=f"unmeasurable:{name}", theory__every=1, clients=3, **settings
    )


def played(config, digits, round=1):
    """A coordinator with every update of a round, and theta before and after it."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    updates = [worker.run(task) for task in coordinator.tasks(round)]
    assert all(coordinator.receive(update) for update in updates)
    return coordinator, updates


@pytest.mark.parametrize("name", WHY)
def test_whatever_stops_a_measurement_costs_no_update_and_is_named(own, digits, name, caplog):
    with caplog.at_level(logging.WARNING):
        coordinator, _ = played(own(name), digits)
    summary = coordinator.close_round()
    assert summary.gamma == 3
    assert summary.rejected == []
    named = summary.theory["unanswered"]
    assert len(named) == (1 if name == "OneDerivative" else 3)  # one is asked for a curvature
    assert all(WHY[name] in entry["reason"] for entry in named)
    assert f"client {named[0]['client']}, round 1: not measured" in caplog.text
    assert WHY[name] in caplog.text
    caplog.text.encode("utf-8")  # no log line that a file or another process cannot take
    # first derivatives are there where only the second one is missing
    assert summary.theory["workers"] == (3 if name == "OneDerivative" else 0)
    assert "L" not in summary.theory["estimates"]


def test_a_failed_measurement_changes_no_bit_of_training(own, digits):
    thetas = []
    for every in (0, 1):
        config = own("OutOfMemory").model_copy(
            update={"theory": own("OutOfMemory").theory.model_copy(update={"every": every})}
        )
        coordinator, _ = played(config, digits)
        coordinator.close_round()
        thetas.append(coordinator.theta)
    assert torch.equal(thetas[0]["weight"], thetas[1]["weight"])


def test_the_record_the_results_and_the_report_say_who_could_not_measure_and_why(own, tmp_path):
    theory = simulate(own("OutOfMemory"), tmp_path / "run", processes=1)["theory"]
    assert theory["why"].startswith("no worker")
    assert [(entry["round"], entry["client"]) for entry in theory["unanswered"]] == [
        (round, client) for round in (1, 2) for client in range(3)
    ]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    reason = lines[0]["theory"]["unanswered"][0]["reason"]
    assert "memory" in reason
    page = theory_section(read_record(tmp_path / "run"))
    assert "their updates count all the same" in page
    assert "memory" in page


@pytest.mark.parametrize(
    "reason",
    [Packed("float32", (1,), bytes(4)), Packed("uint8", (9000,), bytes(9000))],
    ids=["of another type", "too long"],
)
def test_a_reason_that_is_none_is_a_bad_update(own, digits, reason):
    coordinator = Coordinator(own("Net"), parameters_of(build_network(own("Net"))))
    worker = Worker(own("OutOfMemory"), digits)
    first = next(worker.run(task) for task in coordinator.tasks(1))
    assert not coordinator.receive(changed(first, arrays={FAILED: reason}))


def test_a_reason_that_nobody_asked_for_is_refused(tiny, digits):
    config = tiny(theory__every=0)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    first = worker.run(next(coordinator.tasks(1)))
    extra = {FAILED: Packed("uint8", (2,), b"no")}
    assert not coordinator.receive(changed(first, arrays=extra))


def test_what_a_worker_says_is_shown_without_its_control_characters(own, digits):
    coordinator = Coordinator(own("Net"), parameters_of(build_network(own("Net"))))
    worker = Worker(own("OutOfMemory"), digits)
    updates = [worker.run(task) for task in coordinator.tasks(1)]
    said = "no\x1b[31m\nroom \u732b".encode()
    odd = changed(updates[0], arrays={FAILED: Packed("uint8", (len(said),), said)})
    for update in (odd, *updates[1:]):
        assert coordinator.receive(update)
    (entry,) = [e for e in coordinator.close_round().theory["unanswered"] if e["client"] == 0]
    assert entry["reason"] == "no room \u732b"
