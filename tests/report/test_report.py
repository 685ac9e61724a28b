"""The report page, its curves and the sample grids."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from fed_diffusion.config import Config, ConfigError
from fed_diffusion.report import curves, markup
from fed_diffusion.report.grids import BACKGROUND, grid, save_grid
from fed_diffusion.report.html import write_report
from fed_diffusion.report.records import read_record

HOSTILE = """</td></table><script src="//evil.example/x.js">alert('1')</script><b onload=x>&amp;"""
ROUNDS = 6


class Page(HTMLParser):
    """What a browser would see: text, tags, and everything it would fetch."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.texts.append(" ")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def client(number: int | str, **changes: Any) -> dict[str, Any]:
    known = {"client": number, "kind": "topk", "keep": 0.75, "loss": 0.2, "holdout_loss": 0.3}
    sizes = {"w2": 2.5, "images": 640, "seconds": 1.5, "bytes_up": 2_000_000, "bytes_down": 1}
    return {**known, **sizes, **changes}


def a_round(number: int, **changes: Any) -> dict[str, Any]:
    losses = {"loss": 1 / number, "holdout_loss": None, "dsm_objective": 800.0, "w2_max": 2.5}
    counts = {"gamma": 2, "trained": 1.0, "images": 1280, "seconds": 3.0, "eta": 1e-3}
    sizes = {"bytes_up": 4_000_000, "bytes_down": 5_000_000, "dense_bytes": 9_000_000}
    clients = {"clients": [client(0), client(1)], "rejected": []}
    return {"round": number, **losses, **counts, **sizes, **clients, **changes}


def quality(**changes: Any) -> dict[str, Any]:
    figures = {"fid": 4.25, "fid_floor": 1.5, "inception_score": [7.5, 0.25], "kid": 0.0625}
    stated = {"samples": 1000, "reference": "digits (1797 images)", "nfe": 301, "seed": 17}
    return {**figures, **stated, "extractor": "classifier(digits)", "why": None, **changes}


def write_run(
    run: Path,
    rounds: list[dict[str, Any]] | None = None,
    results: dict[str, Any] | None = None,
    config: Config | None = None,
) -> Path:
    run.mkdir(exist_ok=True)
    config = config or Config(preset="digits", method="T-FedDM-M", clients=2, rounds=ROUNDS)
    (run / "config.yaml").write_text(config.to_yaml())
    lines = [json.dumps(entry) + "\n" for entry in rounds or []]
    (run / "metrics.jsonl").write_text("".join(lines))
    if results is not None:
        (run / "results.json").write_text(json.dumps(results))
    return run


def write_finished(run: Path, **changes: Any) -> Path:
    rounds = [a_round(number) for number in range(1, ROUNDS + 1)]
    times = {"train": 90.0, "aggregate": 1.0, "evaluate": 4.0, "total": 95.0}
    named = {"preset": "digits", "method": "T-FedDM-M", "clients": 2, "rounds": ROUNDS, "seed": 0}
    found = {"parameters": 634_561, "loss": 0.125, "gamma_star": 2, "seconds": times, "rejected": 0}
    write_run(run, rounds, {**named, **found, "quality": quality(), **changes})
    images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    save_grid(images, run / "samples" / "final.png")
    for number in (2, 4):
        save_grid(images[:4], run / "samples" / f"round-{number:04d}.png")
    return run


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_report_fetches_nothing(tmp_path: Path) -> None:
    rejected = [{"client": 1, "reason": "loss is NaN"}]
    run = write_finished(tmp_path)
    write_run(run, [a_round(1, rejected=rejected), a_round(2)])
    page = page_of(run)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "srcset", "data", "action", "poster"):
            assert value.startswith("data:image/png;base64,")
        if name.endswith("href"):
            assert value.startswith("#")
        assert "://" not in value
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", source))
    assert "default-src 'none'" in source


def test_the_report_of_a_finished_run_has_every_section(tmp_path: Path) -> None:
    page = page_of(write_finished(tmp_path))
    assert page.tags.count("svg") == 1  # Γ and bytes are the same in every round
    assert page.tags.count("img") == 3
    for words in (
        *("digits T-FedDM-M", "Loss", "Γ and coverage", "a round)", "round by round"),
        *("Quality", "Clients", "Rejected updates None.", "All settings"),
    ):
        assert words in page.text
    assert "not finished" not in page.text


def test_every_tag_is_closed(tmp_path: Path) -> None:
    assert page_of(write_finished(tmp_path)).open == []


def test_all_that_a_figure_depends_on_stands_beside_it(tmp_path: Path) -> None:
    text = page_of(write_finished(tmp_path)).text
    for value in ("4.25", "1.5", "7.5 ± 0.25", "0.0625", "1,000", "17", "301"):
        assert value in text
    assert "classifier(digits)" in text
    assert "digits (1797 images)" in text


def test_in_the_place_of_figures_that_could_not_be_had_is_the_reason(tmp_path: Path) -> None:
    none = dict.fromkeys(("fid", "fid_floor", "inception_score", "kid"))
    why = "the weights <b>could not</b> be downloaded"
    text = page_of(write_finished(tmp_path, quality=quality(**none, why=why))).text
    assert f"No figures: {why}" in text
    assert "FID" not in text


def test_intervals_and_the_weights_hash_stand_beside_the_figures(tmp_path: Path) -> None:
    intervals = {"fid": [3.75, 4.5], "kid": None, "how": "jackknife <b>"}
    new = {"precision": 0.625, "recall": 0.375, "extractor_sha256": "c0ffee"}
    text = page_of(write_finished(tmp_path, quality=quality(intervals=intervals, **new))).text
    for words in ("3.75 to 4.5", "0.625", "0.375", "c0ffee", "jackknife <b>"):
        assert words in text


def test_each_further_judge_has_a_table_of_its_own_or_the_reason_why_not(tmp_path: Path) -> None:
    sees = {"fid": 0.4375, "kid": 0.125, "why": None, "extractor": "resnet56_cifar10(64 features)"}
    sees |= {"extractor_sha256": "4bfd9763", "intervals": {"fid": [0.375, 0.5]}}
    others = {"resnet56_cifar10": sees, "my:<b>Judge</b>": {"fid": None, "why": "it is blind"}}
    first = quality(others=others, extractor_because="Inception's weights are not there")
    page = page_of(write_finished(tmp_path, quality=first))
    for words in ("4.25", "0.4375", "0.375 to 0.5", "resnet56_cifar10(64 features)", "4bfd9763"):
        assert words in page.text
    assert "By my:<b>Judge</b>" in page.text
    assert "No figures: it is blind" in page.text
    assert "Why this extractor: Inception's weights are not there." in page.text
    assert page.open == []


COPIES = {
    "why": None,
    **{"tau": 12.5, "closer": 0.25, "expected": 0.0125, "p_value": 0.0, "median_ratio": 0.5},
    "copied": [3],
    "clients": [{"client": 3, "images": 61, "share": 0.875, "held_out_share": 0.1, "closer": 0.25}],
}


def test_copies_are_shown_with_the_client_they_are_of(tmp_path: Path) -> None:
    text = page_of(write_finished(tmp_path, quality=quality(memorisation=COPIES))).text
    assert "Images of clients 3 are copied." in text
    for value in ("12.5 grey levels", "0.0125", "0.875", "61"):
        assert value in text


def test_no_copies_no_warning_and_none_looked_for_has_the_reason(tmp_path: Path) -> None:
    harmless = quality(memorisation={**COPIES, "copied": []})
    assert "are copied" not in page_of(write_finished(tmp_path, quality=harmless)).text
    unknown = quality(memorisation={"why": "no <b>images</b>"})
    assert "no <b>images</b>" in page_of(write_finished(tmp_path, quality=unknown)).text


def test_hostile_strings_are_shown_not_obeyed(tmp_path: Path) -> None:
    run = write_finished(tmp_path, preset=HOSTILE, quality=quality(extractor=HOSTILE, why=HOSTILE))
    attacker = client(HOSTILE, kind=HOSTILE, loss=HOSTILE, keep=HOSTILE)
    rejected = [{"client": HOSTILE, "reason": HOSTILE}]
    (run / "metrics.jsonl").write_text(
        json.dumps(a_round(1, clients=[attacker], rejected=rejected))
    )
    settings = {HOSTILE: HOSTILE, "data": {"dir": HOSTILE}, "clients": 2, "seed": HOSTILE}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    page = page_of(run)
    assert not {"script", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.open == []
    assert page.text.count(HOSTILE) >= 10


def test_names_that_no_file_can_hold_or_that_turn_a_page_around_are_questions_on_it(
    tmp_path: Path,
) -> None:
    """A class folder in Latin-1, one that writes backwards, and one that clears a terminal."""
    names = ["caf\udce9", "evil\u202egnp.exe", "\x1b[2Jgone"]
    run = write_finished(tmp_path)
    facts = {"images": 3, "classes": dict.fromkeys(names, 1), "notes": names}
    (run / "data.json").write_text(json.dumps(facts))
    page = page_of(run)
    for name in ("caf?", "evil?gnp.exe", "?[2Jgone"):
        assert page.text.count(name) >= 2


@given(st.text())
def test_no_text_becomes_markup(text: str) -> None:
    shown = Page(f"<p>{markup.number(text)}{markup.plain(text)}</p>")
    assert shown.tags == ["p"]


def test_a_stopped_run_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    run = write_run(tmp_path, [a_round(1), a_round(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "los')
    text = page_of(run).text
    assert "not finished: round 2 was its last" in text
    assert "1 lines of metrics.jsonl could not be read" in text
    assert "0.2 0.3 1.5 s 4 MB 2 B" in text  # a client's last losses, mean time and traffic


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    page = page_of(tmp_path)
    assert "no round was its last" in page.text
    assert page.open == []


def test_a_round_that_was_repeated_after_resuming_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, [a_round(1), a_round(2, loss=0.5), a_round(2, loss=0.25)])
    assert [entry["loss"] for entry in read_record(run).rounds] == [1.0, 0.25]


def test_values_that_are_missing_null_or_nan_are_dashes(tmp_path: Path) -> None:
    bare = {"round": 1, "clients": [{"client": 3}, client(4, loss=math.nan)]}
    gone = a_round(2, loss=math.nan, gamma=None, bytes_up=None, clients=None, rejected=None)
    page = page_of(write_run(tmp_path, [gone, bare]))
    assert "nan" not in page.text.lower()
    assert page_of(write_run(tmp_path, [bare])).open == []


def test_a_coordinate_that_nobody_trained_is_said_to_be_outside_the_theorem(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path, [a_round(1, gamma=0, trained=0.875)])).text
    assert "Γ* = 0" in text
    assert "outside Theorem 4.11" in text
    assert "87.5 % of the coordinates had a trainer; the others kept their values" in text


def test_a_thousand_clients_do_not_make_a_thousand_rows(tmp_path: Path) -> None:
    one = page_of(write_run(tmp_path, [a_round(1, clients=[client(0)])])).tags.count("tr")
    clients = [client(number) for number in range(1000)]
    page = page_of(write_run(tmp_path, [a_round(1, clients=clients)]))
    assert "and 800 more in metrics.jsonl" in page.text
    assert page.tags.count("tr") <= one + 200


def test_long_timelines_keep_their_first_and_last_grid() -> None:
    shown = markup.spread(list(range(300)), 12)
    assert (len(shown), shown[0], shown[-1]) == (12, 0, 299)


def test_the_grids_are_in_the_page_byte_for_byte(tmp_path: Path) -> None:
    run = write_finished(tmp_path)
    sources = [value for name, value in page_of(run).attributes if name == "src"]
    images = [base64.b64decode(value.removeprefix("data:image/png;base64,")) for value in sources]
    files = ("final.png", "round-0002.png", "round-0004.png")
    assert images == [(run / "samples" / name).read_bytes() for name in files]


def test_the_same_run_gives_the_same_report_and_nothing_else(tmp_path: Path) -> None:
    run = write_finished(tmp_path)
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(str(run)).read_bytes() == first
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run directory: it has no config\.yaml"):
        write_report(tmp_path)


def drawn(figure: Figure) -> list[list[float]]:
    return [np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines]


def test_the_curves_go_through_the_recorded_values() -> None:
    rounds = [a_round(number, gamma=number, holdout_loss=0.5) for number in range(1, 5)]
    clients = [[0.2] * 4] * 2
    assert drawn(curves.loss_figure(rounds)) == [[1, 1 / 2, 1 / 3, 1 / 4], [0.5] * 4, *clients]
    n_line, gamma = drawn(curves.gamma_figure(rounds, clients=7))
    assert set(n_line) == {7}
    assert gamma == [1, 2, 3, 4]
    megabytes = [values[0] for values in drawn(curves.bytes_figure(rounds))]
    assert megabytes == pytest.approx([9, 4, 5])


def test_a_held_out_loss_measured_now_and_then_is_one_curve() -> None:
    rounds = [a_round(n, holdout_loss=None if n % 5 else 1.0) for n in range(1, 101)]
    held_out = curves.loss_figure(rounds).axes[0].lines[1]
    assert np.asarray(held_out.get_xdata()).tolist() == list(range(5, 101, 5))


def test_bars_count_the_rejected_updates_of_each_round() -> None:
    rounds = [a_round(1, rejected=[{}, {}]), a_round(2), a_round(3, rejected=[{}])]
    bars = curves.rejected_figure(rounds).axes[0].patches
    assert [bar.get_extents().height > 0 for bar in bars] == [True, False, True]
    assert bars[0].get_extents().height == pytest.approx(2 * bars[2].get_extents().height)


@pytest.mark.parametrize("rounds", [[], [{}], [a_round(1)], [{"round": 4, "loss": None}]])
def test_curves_of_nothing_or_of_one_round_can_be_drawn(rounds: list[dict[str, Any]]) -> None:
    for figure in (
        curves.loss_figure(rounds),
        curves.gamma_figure(rounds, 10),
        curves.bytes_figure(rounds),
        curves.rejected_figure(rounds),
    ):
        assert curves.to_svg(figure, "label").startswith("<svg")


def test_svg_takes_on_the_pages_colour_and_names_no_namespace() -> None:
    svg = curves.to_svg(curves.loss_figure([a_round(1)]), 'a "label"')
    assert "currentColor" in svg
    assert "xmlns" not in svg
    assert "://" not in svg
    assert 'aria-label="a &quot;label&quot;"' in svg


def test_digits_are_enlarged_six_times_pixel_by_pixel(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    path = save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    with Image.open(path) as file:
        page = np.asarray(file)
    assert page.shape == (2 * 50 + 2, 3 * 50 + 2)
    for i in range(6):
        top, left = 2 + i // 3 * 50, 2 + i % 3 * 50
        shown = page[top : top + 48, left : left + 48]
        assert (shown == images[i, 0].numpy().repeat(6, 0).repeat(6, 1)).all()
    assert (page[:2] == BACKGROUND).all()
    assert (page[50:52] == BACKGROUND).all()
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(("side", "scale"), [(8, 6), (16, 3), (28, 2), (32, 2), (64, 1), (256, 1)])
def test_the_smaller_the_images_the_more_they_are_enlarged(side: int, scale: int) -> None:
    page = grid(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    assert page.shape == (side * scale + 4, side * scale + 4, 3)


def test_a_grid_is_as_square_as_it_gets_and_its_empty_places_are_background() -> None:
    page = grid(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), scale=1)
    assert page.shape == (2 * 10 + 2, 3 * 10 + 2)
    assert (page[12:, 22:] == BACKGROUND).all()


def test_colours_stay_in_their_channels() -> None:
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 200
    assert grid(red, scale=2)[5, 5].tolist() == [200, 0, 0]


def test_float_images_are_refused_by_a_grid() -> None:
    with pytest.raises(TypeError, match="uint8"):
        grid(torch.rand(4, 1, 8, 8))


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (4, 8, 8), (4, 2, 8, 8)])
def test_a_grid_of_something_else_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a grid takes"):
        grid(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("setting", [{"columns": 0}, {"scale": 0}])
def test_a_grid_without_columns_or_pixels_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), **setting)


def test_what_each_machine_can_carry_is_shown_with_what_limits_it(tmp_path: Path) -> None:
    run = write_finished(tmp_path)
    assert "Budgets" not in page_of(run).text
    measured = {"keep": 0.5, "budget.limit": 1, "budget.memory_mb": 812.0}
    measured |= {"budget.memory_cap_mb": 900.0, "budget.seconds": 12.0, "budget.seconds_cap": 48.0}
    said: dict[str, Any] = {"keep": 0.25, "partition-id": 1}
    (run / "budgets.json").write_text(json.dumps({"0": measured, "1": said}))
    text = page_of(run).text
    assert "0 0.5 memory 812 900 12 s 48 s" in text
    assert "1 0.25 said by its node" in text


def test_the_bounds_factor_is_stated_where_it_is_known(tmp_path: Path) -> None:
    rounds = [a_round(1, w2_n_over_gamma=12.5), a_round(2, w2_n_over_gamma=None)]
    assert (
        "w² N / Γ, as it stands in the bound, was at most 12.5"
        in page_of(write_run(tmp_path, rounds)).text
    )
    assert "as it stands in the bound" not in page_of(write_run(tmp_path, [a_round(1)])).text


# --- damaged runs -------------------------------------------------------------------------------

NUMBERS = ("loss", "holdout_loss", "gamma", "trained", "w2_max", "bytes_up", "seconds", "images")
WRONG: tuple[Any, ...] = ("much", [], {}, True)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_line_with_a_value_of_another_kind_is_left_out_and_counted(
    tmp_path: Path, wrong: Any
) -> None:
    damaged = [a_round(number + 2, **{key: wrong}) for number, key in enumerate(NUMBERS)]
    damaged += [a_round(20, clients=[client(0, w2=wrong)]), a_round(21, rejected=7)]
    damaged += [a_round(24, coverage={"many": 1}), a_round(25, coverage={"2": wrong})]
    damaged += [a_round(22, clients=["nobody"]), a_round(23, round=wrong)]
    run = write_run(tmp_path, [a_round(1), *damaged, a_round(30)])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"round": 31}\n[1, 2]\n"text"\n' + b"[" * 100_000 + b"\n")
    record = read_record(run)
    assert [entry["round"] for entry in record.rounds] == [1, 30]
    assert record.unreadable == len(damaged) + 4
    assert f"{len(damaged) + 4} lines of metrics.jsonl could not be read" in page_of(run).text


@pytest.mark.parametrize("content", [b"", b'{"loss": ', b"[]", b"\xff\xfe", b"null"])
def test_damaged_results_are_said_to_be_damaged_and_the_rest_is_shown(
    tmp_path: Path, content: bytes
) -> None:
    run = write_finished(tmp_path)
    for name in ("results.json", "budgets.json"):
        (run / name).write_bytes(content)
    text = page_of(run).text
    assert "results.json is damaged and could not be read" in text
    assert "budgets.json is damaged" in text
    assert "not finished" not in text
    assert "After round 6" in text


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"\x00"])
def test_a_configuration_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, content: bytes
) -> None:
    run = write_finished(tmp_path)
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        write_report(run)
