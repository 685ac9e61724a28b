"""The report's panel of the theory, on runs that really measured it."""

import json
import math

import pytest

from fed_diffusion.config import load_config
from fed_diffusion.engines.local import simulate
from fed_diffusion.report.theory import (
    TERMS,
    _lemma,
    coverage_figure,
    gradient_figure,
    terms_figure,
    w2_figure,
)
from tests.report.test_report import page_of
from tests.tiny import TINY

MEASURED = TINY | {"clients": 10, "method": "R-FedDM-S", "theory.every": 1, "evaluation.every": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("theory") / "run"
    simulate(load_config("digits", MEASURED), path, processes=1)
    return path


def results_of(run):
    return json.loads((run / "results.json").read_text())["theory"]


def test_the_panel_says_the_bound_what_dominates_it_and_what_would_lower_it(run):
    text, theory = page_of(run).text, results_of(run)
    assert f"by {theory['bound']['as_proved']['total']:.4g} nats as proved" in text
    assert theory["says"] in text
    assert "what lowers it: masks that drop less norm" in text
    assert "Not every condition of the theorem holds" in text
    for condition in theory["conditions"]:
        assert condition["says"] in text
    for caveat in theory["caveats"]:
        assert caveat in text
    for key in ("bound", "compared_with", "run"):
        assert theory["images"][key] in text
    assert "; ".join(theory["images"]["differences"]) in text
    proved = theory["bound"]["as_proved"]
    assert f"({proved['low']:.4g} to {proved['high']:.4g} by the estimates" in text
    assert "by 6 workers that held the whole network" in text


def test_a_run_without_measurements_says_why_and_still_shows_its_masks(tmp_path):
    config = load_config("digits", MEASURED | {"theory.every": 0})
    simulate(config, tmp_path / "run", processes=1)
    page = page_of(tmp_path / "run")
    assert "The bound is not evaluated: theory.every is 0" in page.text
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert "table of worker, w² in the last round" in labels  # it hardly moves in two rounds
    assert "terms of the bound" not in labels


def test_a_bound_that_is_infinite_is_said_to_be_with_the_reason(tmp_path):
    keeps = {"method": None, "pruning.kind": "topk", "pruning.keep": [1] * 2 + [0.5] * 8}
    config = load_config("digits", MEASURED | keeps | {"round.fraction": 0.5, "seed": 4})
    theory = simulate(config, tmp_path / "run", processes=1)["theory"]
    text = page_of(tmp_path / "run").text
    if "why" in theory:
        assert theory["why"] in text
    else:
        assert theory["infinite"]
        assert f"The bound is infinite: {theory['infinite']}" in text


def test_each_bar_is_its_term_and_zeros_have_none(run):
    terms = results_of(run)["bound"]["as_proved"]["terms"]
    (axes,) = terms_figure(terms).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [terms[name] for name in terms if name in TERMS and terms[name]]


def test_the_histogram_of_trainers_is_of_the_round_of_least_gamma_and_adds_up(run):
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    (axes,) = coverage_figure(rounds).axes
    least = min(rounds, key=lambda entry: entry["gamma"])
    assert f"round {least['round']}" in axes.get_xlabel()
    assert math.fsum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
    assert min(bar.get_x() + bar.get_width() / 2 for bar in axes.patches) == least["gamma"]


def test_the_curves_go_through_what_was_recorded(run):
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    *workers, factor = w2_figure(rounds).axes[0].lines
    assert len(workers) == 4  # level S: four of ten workers are under a mask
    recorded = [c["w2"] for line in rounds for c in line["clients"] if c["client"] == 6]
    assert list(workers[0].get_ydata()) == recorded
    assert list(factor.get_ydata()) == [line["w2_n_over_gamma"] for line in rounds]
    measured, *_, allowed = gradient_figure(results_of(run)).axes[0].lines
    lemma = results_of(run)["lemma_4_6"]
    assert list(measured.get_ydata()) == [v for _, v, _ in lemma["left"]]
    assert set(allowed.get_ydata()) == {lemma["right"]}


def test_a_squared_norm_that_noise_has_brought_below_0_is_drawn_and_told_as_it_is():
    theory = {"lemma_4_6": {"rounds": 1, "left": [[1, 40.0, 9.0], [2, -0.5, 0.75]], "right": 90.0}}
    (axes,) = gradient_figure(theory).axes
    assert list(axes.lines[0].get_ydata()) == [40.0, -0.5]
    assert axes.get_ylim()[0] < -1.25
    (whiskers,) = axes.collections
    assert [[y for _, y in ends] for ends in whiskers.get_segments()] == [[31, 49], [-1.25, 0.25]]
    assert "<td>-0.5</td><td>-1.25 to 0.25</td>" in _lemma(theory)
    old = {"lemma_4_6": {"left": [[1, 40.0], [2, 0.0]], "right": 90.0}}  # of an earlier version
    assert list(gradient_figure(old).axes[0].lines[0].get_ydata()) == [40.0, 0.0]
