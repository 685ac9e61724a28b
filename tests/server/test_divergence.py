"""Training that diverges ends with a sentence that helps; one client's loss is not the round's."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.protocol.divergence import FIRST_LOSS, exploded
from fed_diffusion.server.coordinator import BelowQuorum, Coordinator
from fed_diffusion.server.divergence import usual_mean, warn_if_worse

LIE = 9e15
BUFFERED = {"round__mode": "buffered", "wire__differences": True}
honest = st.lists(st.floats(0.05, 0.5), min_size=2, max_size=30)


@given(losses=honest, data=st.data())
def test_what_a_minority_says_of_its_loss_is_left_out_of_the_rounds_and_named(losses, data):
    places = range(len(losses))
    liars = data.draw(st.sets(st.sampled_from(places), max_size=(len(losses) - 1) // 2))
    told = {c: LIE if c in liars else loss for c, loss in enumerate(losses)}
    mean, outliers = usual_mean(told, 1, "loss")
    assert outliers == sorted(liars)
    kept = [loss for client, loss in enumerate(losses) if client not in liars]
    assert mean == pytest.approx(statistics.fmean(kept))


@given(losses=honest)
def test_without_outliers_it_is_the_plain_mean(losses):
    mean, outliers = usual_mean(dict(enumerate(losses)), 1, "loss")
    assert (mean, outliers) == (sum(losses) / len(losses), [])


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
def test_a_loss_that_is_not_finite_or_a_thousand_times_an_earlier_one_has_exploded(loss):
    assert exploded(loss, 1.0)
    assert exploded(1.0, math.nan)
    assert not exploded(0.9 * 1000, 1.0)
    assert not exploded(5.0, 1e-9)  # a client with other images than those that were learned


TOO_LARGE = [
    {"local__optimizer": "sgd", "local__eta": 1e4},
    {"local__optimizer": "adam", "local__eta": 30.0},
    {"local__optimizer": "sgd", "local__eta": 1e4} | BUFFERED,
    {"local__optimizer": "adam", "local__eta": 30.0, "data__holdout": 0.0},
]


@pytest.mark.parametrize("settings", TOO_LARGE)
def test_a_step_size_that_is_too_large_is_named_with_one_to_try(tiny, tmp_path, settings):
    config = tiny(**settings, rounds=3, model__widths=[8], evaluation__every=0)
    eta = config.local.eta
    with pytest.raises(RunStopped) as stopped:
        simulate(config, tmp_path / "run", processes=1)
    why = str(stopped.value)
    assert "round 1 diverged: of 5 clients 5 " in why
    assert f"local.eta = {eta:g}. Try a tenth of it: --set local.eta={eta / 10:g}." in why
    assert why.endswith("No round was finished: start a new run with the smaller step size.")
    assert "resume" not in why
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status == {"state": "stopped", "reason": why}


@pytest.mark.parametrize("more", [{}, BUFFERED])
@pytest.mark.parametrize(("every", "good"), [(1, 1), (5, 0)])
def test_a_checkpoint_of_a_spoiled_theta_does_not_replace_the_last_good_one(
    tiny, tmp_path, more, every, good
):
    """Clients find theta worthless before their first step: the round before has made it so."""
    settings = {"round__checkpoint_every": every, "model__widths": [8]} | more
    config = tiny(rounds=4, evaluation__every=0, **settings)
    experiment = Experiment(config, tmp_path / "run")
    coordinator, honest = experiment.coordinator, experiment.coordinator.close_round

    def spoil():
        summary = honest()
        for value in coordinator.theta.values() if summary.round == 2 else ():
            value *= 1e4
        return summary

    coordinator.close_round = spoil
    with pytest.raises(RunStopped, match="round 3 diverged") as stopped:
        run_in_process(experiment, processes=1)
    why = str(stopped.value)
    assert "Or round 2 has spoiled theta" in why
    assert "local.eta=" in why
    assert f"fed-diffusion resume {tmp_path / 'run'}" in why
    kept = experiment.run.load_checkpoint()
    assert kept.state["round"] == good
    assert all(float(value.abs().max()) < 100 for value in kept.tensors["theta"].values())
    run_in_process(Experiment.resume(tmp_path / "run"), processes=1)
    assert experiment.run.finished()
    lines = [json.loads(line) for line in experiment.run.metrics.open()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("holdout", [0.1, 0.0])
def test_training_that_undoes_itself_is_told_once_with_a_step_size_to_try(
    tiny, digits, caplog, holdout
):
    """Adam at eta = 1 stays finite: a loss of tens, from one of 0.3, and a run that ends."""
    config = tiny(local__eta=1.0, model__widths=[8], data__holdout=holdout)
    play(config, digits, {}, 1 if holdout else 3)
    told = [r.getMessage() for r in caplog.records if "makes it worse" in r.getMessage()]
    if holdout:
        (message,) = told
        assert "local.eta = 1 may be too large" in message
        assert "--set local.eta=0.1" in message
    assert len(told) <= 1


@pytest.mark.parametrize(
    ("now", "before", "worse"),
    [
        ([0.9], [], False),
        ([0.9, 0.25], [], True),
        ([0.5, 0.6], [0.3], False),
        ([0.5, 0.95], [0.3], True),
        ([0.29], [0.001], False),  # below what counts
    ],
)
def test_worse_is_three_times_the_lowest_so_far(now, before, worse, caplog):
    assert warn_if_worse(now, before, 4, 0.02) == worse
    assert ("round 4: the loss is" in caplog.text) == worse


def play(config, digits, lie, rounds):
    """Rounds in which client 2 says `lie` of its loss, or of its held-out loss."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker, summaries = Worker(config, digits), []
    for round in range(1, rounds + 1):
        for task in coordinator.tasks(round):
            update = worker.run(task)
            if task.client == 2:
                update.payload.numbers.update(lie)
            coordinator.receive(update)
        summaries.append(coordinator.close_round())
    return coordinator, summaries


def test_a_client_that_claims_an_absurd_loss_is_named_first_and_refused_later(tiny, digits, caplog):
    config = tiny(model__widths=[8], local__steps=1, round__ban_after=2)
    coordinator, summaries = play(config, digits, {"loss": LIE}, 4)
    first, *later = summaries
    assert first.outliers == [2]
    assert first.loss == pytest.approx(
        statistics.fmean(c.loss for c in first.clients if c.client != 2)
    )
    assert "client 2 reports a loss of 9e+15" in caplog.text
    for summary in later[:2]:
        (refused,) = summary.rejected
        assert (refused["client"], summary.outliers) == (2, [])
        assert "its loss is 9e+15, and the lowest of a round was" in refused["reason"]
    assert later[2].banned == [2]
    assert max(coordinator.ledger.losses) < 10


def test_under_privacy_no_clients_loss_decides_whether_another_counts(tiny, digits):
    private = {"privacy__clip": 0.1, "wire__differences": True, "model__widths": [8]}
    _, summaries = play(tiny(**private, local__steps=1), digits, {"loss": LIE}, 2)
    for summary in summaries:
        assert (summary.rejected, summary.outliers) == ([], [2])


def test_a_held_out_loss_cannot_be_owned_either(tiny, digits):
    config = tiny(model__widths=[8], local__steps=1)
    _, (summary,) = play(config, digits, {"holdout_loss": LIE}, 1)
    assert summary.outliers == [2]
    rest = [c.holdout_loss for c in summary.clients if c.client != 2]
    assert summary.holdout_loss == pytest.approx(statistics.fmean(rest))


@pytest.mark.parametrize("lie", [{FIRST_LOSS: [1.0, 2.0]}, {"loss": [1.0]}, {"loss": 1e300}])
def test_a_lie_about_diverging_costs_one_update_and_no_more(tiny, digits, lie):
    config = tiny(model__widths=[8], local__steps=1)
    _, (summary,) = play(config, digits, lie, 1)
    assert [entry["client"] for entry in summary.rejected] == [2]
    assert len(summary.clients) == 4


def test_one_liar_among_clients_that_are_away_is_no_divergence(tiny, digits):
    config = tiny(model__widths=[8], local__steps=1)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    for task in coordinator.tasks(1):
        if task.client > 2:
            coordinator.reject(task.client, "no reply within 1 s")
            continue
        update = worker.run(task)
        if task.client == 2:
            update.payload.numbers["loss"] = math.nan
        coordinator.receive(update)
    with pytest.raises(BelowQuorum, match="2 update counted, and 3 are needed"):
        coordinator.close_round()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_honest_unequal_clients_are_no_outliers_and_do_not_diverge(tiny, digits, prediction):
    unequal = {"data__partition": "dirichlet", "data__alpha": 0.1, "model__widths": [8]}
    config = tiny(**unequal, model__prediction=prediction, local__eta=3e-3)
    _, summaries = play(config, digits, {}, 4)
    assert [s.outliers for s in summaries] == [[]] * 4
    assert [s.rejected for s in summaries] == [[]] * 4
