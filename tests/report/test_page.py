"""The report as a person reads it: its order, its words, and what is left out of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from fed_diffusion.build import Setup
from fed_diffusion.config import Config, load_config
from fed_diffusion.data import ImageSet, partition, shares_of
from fed_diffusion.engines.local import simulate
from fed_diffusion.experiment import write_data
from fed_diffusion.report import curves, html
from fed_diffusion.report.grids import save_grid, tiles
from fed_diffusion.report.holdings import clients_of, grid_labels, real_images
from fed_diffusion.report.html import write_report
from fed_diffusion.report.markup import table
from tests.report.test_report import (
    COPIES,
    HOSTILE,
    Page,
    a_round,
    client,
    page_of,
    quality,
    write_finished,
    write_run,
)
from tests.tiny import TINY

NAMES = ["cat <1>", "dog", "newt"]
PRIVACY = {
    **{"epsilon": 2.0, "delta": 1e-5, "sigma": 0.2, "clip": 0.1, "sampling_rate": 0.5},
    **{"rounds": 6, "repeated": 0, "covers": "theta"},
}


def images_of(labels: list[int]) -> torch.Tensor:
    """One image per label, each with a value that says its place and its class."""
    values = torch.tensor([20 * label + i for i, label in enumerate(labels)], dtype=torch.uint8)
    return values[:, None, None, None].expand(-1, 1, 8, 8).contiguous()


def write_rich_run(run: Path) -> Path:
    """A finished run with all that a page can show."""
    write_finished(run, quality=quality(memorisation=COPIES), privacy=PRIVACY)
    rounds = []
    for r in range(1, 7):
        clients = [client(c, loss=(c + 2) / r, w2=1.0 + c + r) for c in range(3)]
        rejected = [{"client": 1, "reason": "a difference of norm 12, above round.max_norm = 3"}]
        sizes = {"bytes_up": 1_000_000 * r, "gamma": 1 + r % 2, "coverage": {"1": 5, "3": r}}
        more = {"clients": clients, "rejected": rejected[: r % 2], "w2_n_over_gamma": 1.0 + r}
        rounds.append(a_round(r, holdout_loss=1.5 / r, **sizes, **more))
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rounds))
    labels = [i % 3 for i in range(9)]
    for name in ("final", "real"):
        save_grid(images_of(labels), run / "samples" / f"{name}.png", labels=labels)
    held = [{"client": c, "images": 60 + c, "held_out": 6, "labels": [c, 40, 26]} for c in range(3)]
    counts = dict.fromkeys(NAMES, 66)
    facts = {"images": 198, "classes": counts, "notes": ["1 file was not read."], "clients": held}
    (run / "data.json").write_text(json.dumps(facts))
    return run


class Outline(HTMLParser):
    """Headings with their level, images with their alternative text, and what is folded."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.headings: list[tuple[int, str]] = []
        self.alts: list[str | None] = []
        self.folded: list[str] = []
        self.languages: list[str | None] = []
        self.groups: list[dict[str, str | None]] = []
        self._inside: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), ""))
        if tag == "img":
            self.alts.append(found.get("alt"))
        if tag == "html":
            self.languages.append(found.get("lang"))
        if "wide" in (found.get("class") or "").split():
            self.groups.append(found)
        if tag not in ("img", "meta", "br"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] in ("h1", "h2", "h3"):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        if "details" in self._inside:
            self.folded.append(data)


def outline_of(run: Path) -> Outline:
    return Outline(write_report(run).read_text("utf-8"))


def test_the_sections_come_in_the_order_in_which_a_person_looks(tmp_path: Path) -> None:
    outline = outline_of(write_rich_run(tmp_path))
    assert [text for level, text in outline.headings if level <= 2] == [
        *("digits", "Samples", "Quality", "Loss", "Clients"),
        *("Privacy and copies", "Bytes", "Settings", "Theory"),
    ]


def test_headings_descend_by_one_and_everything_seen_has_words(tmp_path: Path) -> None:
    outline = outline_of(write_rich_run(tmp_path))
    levels = [level for level, _ in outline.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert outline.languages == ["en"]
    assert outline.alts
    assert all(outline.alts)
    assert len(set(outline.alts)) == len(outline.alts)
    for group in outline.groups:  # boxes that scroll: named, and within the keyboard's reach
        assert group["tabindex"] == "0"
        assert group["aria-label"]


def test_the_theory_is_folded_and_quality_and_privacy_are_not(tmp_path: Path) -> None:
    folded = " ".join(outline_of(write_rich_run(tmp_path)).folded)
    assert "Γ* = 2" in folded
    for words in ("Images of clients 3", "FID and KID", "Suppose that one client"):
        assert words not in folded


def test_the_title_is_what_was_trained_on(tmp_path: Path) -> None:
    settings = Config(preset="mine", clients=2).to_dict()
    settings["data"] |= {"name": "image_folder", "dir": "/somewhere/scans <of> lungs", "size": 8}
    for data, title in (
        (settings["data"], "scans <of> lungs"),
        ({"name": "my.data:retina"}, "retina"),
        ({"name": "cifar10"}, "cifar10"),
        ({}, "digits"),  # what a run without the key is on
        ([], "unknown images"),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"data": data}))
        assert outline_of(tmp_path).headings[0] == (1, title)


# --- images --------------------------------------------------------------------------------------


def test_a_grid_gives_its_images_and_labels_back_and_another_png_gives_none(tmp_path: Path) -> None:
    for shape, scale in (((7, 1, 8, 8), None), ((5, 3, 6, 9), 3), ((1, 1, 90, 90), None)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        labels = list(range(len(images)))
        path = save_grid(images, tmp_path / "grid.png", scale=scale, labels=labels)
        found = tiles(path)
        assert found is not None
        assert torch.equal(found[0], images)
        assert found[1] == labels
    whole = path.read_bytes()
    save_grid(images, path)
    assert tiles(path) is None
    path.write_bytes(whole[: len(whole) // 2])
    assert tiles(path) is None


def test_each_class_has_its_generated_images_beside_its_real_ones_by_name(tmp_path: Path) -> None:
    alts = outline_of(write_rich_run(tmp_path)).alts
    expected = [
        f"{kind} images of class {name}" for name in NAMES for kind in ("generated", "real")
    ]
    assert alts[:6] == expected


def test_real_images_are_of_the_grids_classes_and_only_real(tmp_path: Path) -> None:
    dataset = ImageSet(images_of([2, 0, 1, 0, 2, 2]), torch.tensor([2, 0, 1, 0, 2, 2]))
    assert grid_labels(20, None) is None
    assert grid_labels(20, 10) == [i % 10 for i in range(20)]
    images, labels = real_images(dataset, 20, 10)
    assert labels == [0, 1, 2, 0, 2]
    assert torch.equal(images, dataset.images[[1, 2, 0, 3, 4]])
    unlabelled, none = real_images(replace(dataset, labels=None), 20, 10)
    assert none is None
    assert torch.equal(unlabelled, dataset.images)


def test_no_real_image_is_written_under_differential_privacy(tmp_path: Path) -> None:
    dataset = ImageSet(images_of([0, 1, 0, 1]), torch.tensor([0, 1, 0, 1]))
    (tmp_path / "samples").mkdir()
    private = {"privacy.clip": 1.0, "wire.differences": True, "clients": 2}
    write_data(tmp_path, dataset, Setup.of(load_config("digits", TINY | private)))
    assert list((tmp_path / "samples").iterdir()) == []
    assert (tmp_path / "data.json").is_file()
    write_data(tmp_path, dataset, Setup.of(load_config("digits", TINY | {"clients": 2})))
    assert (tmp_path / "samples/real.png").is_file()


def test_a_run_that_goes_on_shows_its_newest_images(tmp_path: Path) -> None:
    run = write_rich_run(tmp_path)
    for name in ("results.json", "samples/final.png"):
        (run / name).unlink()
    text = page_of(run).text
    assert "Drawn after round 4; the final images are drawn at the end." in text
    assert "not finished: round 6 was its last" in text


# --- clients -------------------------------------------------------------------------------------


def test_the_clients_sizes_and_labels_are_those_that_they_train_on(digits: ImageSet) -> None:
    config = load_config("digits", TINY | {"data.partition": "dirichlet"})
    labels = digits.labels
    assert labels is not None
    split = config.data, config.clients, config.seed
    found_of = clients_of(digits, shares_of(digits, *split), by_folder=False)
    for found, indices in zip(found_of, partition(digits, *split), strict=True):
        assert found["images"] + found["held_out"] == len(indices)
        assert found["held_out"] == math.floor(0.1 * len(indices))
        assert found["labels"] == [int((labels[indices] == c).sum()) for c in range(10)]


def test_a_clients_row_is_over_all_its_rounds(tmp_path: Path) -> None:
    rounds = [
        a_round(1, clients=[client(0, seconds=1.0, loss=0.5), client(1, keep=0.5)]),
        a_round(2, clients=[client(0, seconds=4.0, loss=0.25)]),
    ]
    text = page_of(write_run(tmp_path, rounds)).text
    assert "0 0.75 2 0.25 0.3 2.5 s 4 MB 2 B" in text
    assert "1 0.5 1 0.2 0.3 1.5 s 2 MB 1 B" in text
    assert "The same for every client: mask topk." in text


def test_the_loss_of_each_client_is_a_curve_and_of_many_a_range() -> None:
    few = [a_round(r, clients=[client(c, loss=c + 1 / r) for c in range(3)]) for r in (1, 2)]
    lines = curves.loss_figure(few).axes[0].lines
    assert [np.asarray(line.get_ydata()).tolist() for line in lines[1:]] == [
        [c + 1, c + 0.5] for c in range(3)
    ]
    many = [a_round(r, clients=[client(c, loss=c + 1) for c in range(50)]) for r in (1, 2)]
    axes = curves.loss_figure(many).axes[0]
    assert len(axes.lines) == 1
    assert axes.collections[0].get_datalim(axes.transData).intervaly.tolist() == [1, 50]


# --- nothing empty, nothing constant -------------------------------------------------------------


def test_a_chart_of_a_constant_is_no_chart() -> None:
    def drawn(*values: list[float], bottom: float | None = None) -> bool:
        figure = Figure()
        axes = figure.add_subplot()
        for line in values:
            axes.plot(range(len(line)), line)
        axes.set_ylim(bottom=bottom)
        return curves.varies(figure)

    assert drawn([1, 2])
    assert drawn([5, 5], [1, 1.5])
    assert not drawn([5, 5], [3, 3])
    assert not drawn([5])
    assert not drawn([math.nan, 1])
    assert not drawn([1000, 1001], bottom=0)  # from 0 on nobody sees it
    assert not drawn()
    rounds = [a_round(1, rejected=[{}]), a_round(2)]
    assert curves.varies(curves.rejected_figure(rounds))
    assert not curves.varies(curves.rejected_figure(rounds[1:]))


def test_a_table_has_no_column_without_values_and_is_none_without_any() -> None:
    shown = table(("client", "loss", "keep"), [("0", "–", "1"), ("1", "–", "0.5")])
    assert Page(shown).text == "client keep 0 1 1 0.5"
    assert table(("client", "loss"), [("0", "–")]) == ""
    assert table(("client", "loss"), []) == ""


def test_no_page_has_a_table_without_rows(tmp_path: Path) -> None:
    runs = [write_rich_run(tmp_path / "rich"), write_finished(tmp_path / "plain")]
    runs += [write_run(tmp_path / "begun"), write_run(tmp_path / "bare", [{"round": 1}])]
    for run in runs:
        source = write_report(run).read_text("utf-8")
        assert "<tbody></tbody>" not in source
        assert "<section></section>" not in source


# --- words ---------------------------------------------------------------------------------------


def test_epsilon_is_explained_as_a_factor(tmp_path: Path) -> None:
    text = page_of(write_finished(tmp_path, privacy=PRIVACY)).text
    assert f"a factor of at most {math.exp(2):.4g} (ε = 2)" in text
    assert "(2, 1e-05)-differential privacy of clients after 6 rounds" in text
    huge = page_of(write_finished(tmp_path, privacy=PRIVACY | {"epsilon": 800.0})).text
    assert "at most more than a million" not in huge
    assert "a factor that may exceed a million (ε = 800)" in huge
    assert (
        "not finite" in page_of(write_finished(tmp_path, privacy=PRIVACY | {"epsilon": None})).text
    )


def test_without_privacy_the_page_says_that_nothing_is_promised(tmp_path: Path) -> None:
    text = page_of(write_finished(tmp_path)).text
    assert "There is no formal guarantee" in text
    assert "A client sends no image to the server. It sends the network as it trained it" in text


def test_copies_are_told_as_shares_of_images(tmp_path: Path) -> None:
    text = page_of(write_finished(tmp_path, quality=quality(memorisation=COPIES))).text
    assert "25 % of the generated images are nearly the same as a training image" in text
    assert "Of real images that no client trained on it would be 1.2 %" in text
    harmless = quality(memorisation=COPIES | {"copied": []})
    text = page_of(write_finished(tmp_path, quality=harmless)).text
    assert "No client's training images were found" in text


# --- partial and damaged records -----------------------------------------------------------------


def test_every_stage_of_a_real_run_has_a_page(tmp_path: Path) -> None:
    """After each round, as a second process sees it, and at the end."""
    run, seen = tmp_path / "run", []

    def watch(line: dict[str, Any]) -> None:
        text = page_of(run).text
        seen.append(f"round {line['round']} was its last when" in text)
        assert "damaged" not in text
        assert "1,797 images in all" in text

    simulate(load_config("digits", TINY), run, processes=1, progress=watch)
    text = page_of(run).text
    assert seen == [True, True]
    assert "not finished" not in text
    assert "damaged" not in text
    assert "Real" in text


ODD: tuple[Any, ...] = (None, 7, [1], {"a": {}}, HOSTILE)


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_page_survives_any_value_in_any_place_of_its_files(tmp_path: Path, odd: Any) -> None:
    run = write_rich_run(tmp_path)
    for name in ("results.json", "data.json", "run.json", "status.json", "budgets.json"):
        path = run / name
        known = json.loads(path.read_text()) if path.is_file() else {"data": 1, "state": 1, "0": 1}
        path.write_text(json.dumps(dict.fromkeys(known, odd)))
    page = page_of(run)
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("h2") >= 7
    results = json.loads((write_rich_run(tmp_path) / "results.json").read_text())
    for key in ("quality", "privacy"):
        results[key] = dict.fromkeys(results[key], odd)
    results["theory"] = dict.fromkeys(("bound", "estimates", "lemma_4_6", "conditions"), odd)
    (run / "results.json").write_text(json.dumps(results))
    assert page_of(run).tags.count("h2") >= 7


def test_a_damaged_part_costs_its_section_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_rich_run(tmp_path)
    (run / "samples" / "round-0002.png").unlink()
    (run / "samples" / "round-0002.png").mkdir()  # it cannot be read as a file
    text = page_of(run).text
    assert (
        "Samples This part of the record is damaged and cannot be shown: IsADirectoryError" in text
    )
    assert "Images of clients 3 are copied" in text
    assert "leaves out Samples" in caplog.text
    assert html.trained_on(html.read_record(run)) == "digits"


def test_the_gap_of_an_adapter_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    gaps = [{"absolute": 0.5 * r, "relative": 0.01 * r} for r in range(1, 4)]
    rounds = [a_round(r + 1, adapter_gap=gap) for r, gap in enumerate(gaps)]
    page = write_report(write_run(tmp_path, rounds)).read_text("utf-8")
    assert "In round 3" in page
    assert "was 1.5 from the mean of their products, which is 3 %" in page
    assert "gap of the adapter per round" in page
    assert "mean of their products" not in write_report(write_rich_run(tmp_path)).read_text("utf-8")
