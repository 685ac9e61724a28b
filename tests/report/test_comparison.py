"""Runs side by side: a figure stands there only where it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fed_diffusion.config import Config, ConfigError
from fed_diffusion.report.comparison import SHOWN, compare, free_name, overlaid, page_of
from tests.report.test_report import HOSTILE, Page, a_round, quality, write_finished, write_run


def finished(
    run: Path, data: str = "one hash", config: Config | None = None, **changes: Any
) -> Path:
    more = {"holdout_loss": 0.25, "bytes_up": 1_500_000, **changes}
    write_finished(run, **more)
    if config is not None:
        (run / "config.yaml").write_text(config.to_yaml())
    (run / "run.json").write_text(json.dumps({"id": "x", "data": data}))
    return run


def cells(first: Path, second: Path) -> dict[str, str]:
    """What stands in the second run's column."""
    return {key: row[1] for key, row in compare([first, second]).cells.items()}


JUDGED = ("inception_score", "fid", "fid_floor", "kid")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"extractor": "inception"}, "another judge"),
        ({"extractor_sha256": "c0ffee"}, "another judge"),
        ({"reference": "digits test (179 images)"}, "another reference"),
        ({"samples": 50_000}, "another number of samples"),
        ({"samples": 5, "reference": "x"}, "another reference and number of samples"),
    ],
)
def test_figures_of_another_judge_reference_or_number_are_not_shown(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    first = finished(tmp_path / "a")
    found = cells(first, finished(tmp_path / "b", quality=quality(fid=3.5, **changes)))
    assert [found[key] for key in JUDGED] == [why] * 4
    assert (found["loss"], found["megabytes_up"]) == ("0.1250", "1.5")


def test_nothing_that_depends_on_the_data_compares_with_other_data(tmp_path: Path) -> None:
    found = cells(finished(tmp_path / "a"), finished(tmp_path / "b", data="another hash"))
    for key in (*JUDGED, "loss", "holdout_loss"):
        assert found[key] == "another data"
    assert found["gamma_star"] == "2"


def test_losses_at_other_times_do_not_compare_and_quality_does(tmp_path: Path) -> None:
    config = Config(preset="digits", clients=2).to_dict()
    config["diffusion"] |= {"K": 999}
    other = finished(tmp_path / "b", config=Config(**config), quality=quality(fid=3.5))
    found = cells(finished(tmp_path / "a"), other)
    assert found["loss"] == found["holdout_loss"] == "another partition of time"
    assert found["fid"] == "3.50"
    config = Config(preset="digits", clients=2).to_dict()
    config["data"] |= {"holdout": 0.2}
    found = cells(tmp_path / "a", finished(tmp_path / "c", config=Config(**config)))
    assert (found["loss"], found["holdout_loss"]) == ("0.1250", "another part held out")


def test_of_runs_that_compare_each_has_its_own_value(tmp_path: Path) -> None:
    runs = [finished(tmp_path / n, quality=quality(fid=f)) for n, f in (("a", 4.0), ("b", 5.25))]
    assert compare(runs).cells["fid"] == ["4.00", "5.25"]
    assert compare(runs[::-1]).cells["fid"] == ["5.25", "4.00"]


def test_a_cell_without_a_value_says_why(tmp_path: Path) -> None:
    why = "evaluation.reference is none"
    none = {**dict.fromkeys(JUDGED), "why": why}
    unjudged = finished(tmp_path / "a", quality=quality(**none))
    judged = finished(tmp_path / "b")
    going_on = write_run(tmp_path / "c", [a_round(1)])
    damaged = finished(tmp_path / "d")
    (damaged / "results.json").write_text("{")
    odd = finished(tmp_path / "e", quality=7, loss=None)
    found = compare([unjudged, judged, going_on, damaged, odd]).cells
    expected = ["not finished", "results.json is damaged", "unknown"]
    assert found["fid"] == [why, "4.25", *expected]
    assert found["loss"] == ["0.1250", "0.1250", *expected[:2], "–"]


def test_the_curves_of_runs_that_compare_are_laid_over_one_another(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b", data="another hash")]
    runs += [write_run(tmp_path / "c", [a_round(r, loss=2 / r) for r in (1, 2)])]
    (runs[2] / "run.json").write_text(json.dumps({"data": "one hash"}))
    drawing, left_out = overlaid(compare(runs).records, "loss")
    assert left_out == {"b": "another data"}
    assert drawing is not None
    lines = drawing.axes[0].lines
    assert [line.get_label() for line in lines] == ["a", "c"]
    assert np.asarray(lines[1].get_ydata()).tolist() == [2, 1]
    none, left_out = overlaid(compare(runs).records, "holdout_loss")
    assert none is None
    assert set(left_out) == {"a", "b", "c"}


def test_only_the_settings_that_differ_are_listed(tmp_path: Path) -> None:
    other = finished(tmp_path / "b", config=Config(preset="mine", clients=2, seed=5, rounds=9))
    first = finished(tmp_path / "a", config=Config(clients=2, rounds=9))
    assert compare([first, other]).differing == {"seed": ["0", "5"]}


def test_the_page_of_a_comparison_obeys_nothing_and_fetches_nothing(tmp_path: Path) -> None:
    hostile = quality(why=HOSTILE, **dict.fromkeys(JUDGED))
    runs = [finished(tmp_path / "a", quality=hostile), finished(tmp_path / "<b>&", data="other")]
    (runs[1] / "config.yaml").write_text(json.dumps({"seed": HOSTILE, HOSTILE: 1}))
    page = Page(page_of(compare(runs)))
    assert not {"script", "b", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all("://" not in value for _, value in page.attributes)
    assert page.open == []
    assert HOSTILE in page.text
    assert "<b>&" in page.text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    runs = [finished(tmp_path / folder / "run") for folder in ("x", "y")]
    assert [record.name for record in compare(runs).records] == ["x/run", "y/run"]


def test_one_run_or_one_twice_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "a")
    for paths in ([run], [run, run], [run, run / "." / ".." / "a"]):
        with pytest.raises(ConfigError, match="at least two run directories, each of them once"):
            compare(paths)
    with pytest.raises(ConfigError, match="not a run directory"):
        compare([run, tmp_path])


def test_a_page_is_never_written_over_another_file(tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    names = []
    for _ in range(3):
        names.append(free_name(path).name)
        free_name(path).write_text("")
    assert names == ["compare.html", "compare-2.html", "compare-3.html"]


def test_every_figure_of_the_table_has_a_row(tmp_path: Path) -> None:
    found = compare([finished(tmp_path / "a"), finished(tmp_path / "b")])
    assert list(found.cells) == [figure.key for figure in SHOWN]
