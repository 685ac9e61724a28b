"""A sweep's tables and figures: what they say is what the runs' files say."""

import csv
import io
import json
import statistics

import pytest
from PIL import Image

from fed_diffusion.config import load_config
from fed_diffusion.generate import RunDir
from fed_diffusion.report.records import read_record
from fed_diffusion.sweep.figures import family
from fed_diffusion.sweep.grid import MACHINES, Run
from fed_diffusion.sweep.paper import TABLE_2
from fed_diffusion.sweep.report import rows_of, runs_csv, table_csv, tables, write_outputs

MACHINE = "Linux x86_64, 2 CPU cores, no GPU, torch 2"


def make_run(folder, preset, method, seed, *, fid=None, loss=0.5, why=None):
    """A finished run's files with chosen figures."""
    config = load_config(preset, {"method": method, "seed": seed, "rounds": 3})
    name = f"{preset}-{method}-seed{seed}"
    run = RunDir.create(folder / "runs" / name, config)
    for round in (1, 2, 3):
        run.append_metrics({"round": round, "loss": loss / round})
    quality = {"fid": fid, "fid_floor": 1.0, "kid": 0.01, "inception_score": [fid and 9.0, 0.5]}
    quality |= {"samples": 1000, "nfe": 41, "reference": "R", "extractor": "E", "why": why}
    results = {"loss": loss / 3, "holdout_loss": None, "gamma_star": 6, "bytes_up": 2_500_000}
    results |= {"seconds": {"train": 60.0}, "parameters": 1234, "quality": quality}
    run.write_results(results)
    run.write_status("finished")
    (run.path / MACHINES).write_text(MACHINE + "\n")
    Image.new("L", (20, 20), 200).save(run.path / "samples" / "final.png")
    return Run(name, method, config, run.path)


@pytest.fixture
def runs(tmp_path):
    fids = {"FedDM-F": [10.0, 12.0, 17.0], "R-FedDM-S": [20.0, 20.5, 24.0]}
    return [
        make_run(tmp_path, "cifar10", method, seed, fid=fid, loss=fid / 30)
        for method, values in fids.items()
        for seed, fid in enumerate(values)
    ]


def read(runs):
    return [(run, read_record(run.path)) for run in runs]


def test_a_row_has_the_mean_and_the_sample_deviation_over_seeds(runs):
    rows = list(csv.DictReader(io.StringIO(table_csv(rows_of(read(runs))))))
    assert [row["method"] for row in rows] == ["FedDM-F", "R-FedDM-S"]
    for row, values in zip(rows, [[10.0, 12.0, 17.0], [20.0, 20.5, 24.0]], strict=True):
        mean = sum(values) / 3
        deviation = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
        assert float(row["fid_mean"]) == pytest.approx(mean)
        assert float(row["fid_std"]) == pytest.approx(deviation)
        assert float(row["loss_mean"]) == pytest.approx(statistics.fmean(values) / 90)
        assert row["seeds"] == "0 1 2"
        assert row["holdout_loss_mean"] == ""  # no clients held anything out
    paper = TABLE_2["cifar10"]["R-FedDM-S"]
    assert (float(rows[1]["paper_is"]), float(rows[1]["paper_fid"])) == paper == (3.60, 111.21)


def test_the_markdown_has_the_same_figures_beside_the_papers(runs):
    lines = "\n".join(tables(rows_of(read(runs))))
    assert "| FedDM-F | 9.00 ± 0.00 | 13.00 ± 3.61 | 1.00 ± 0.00 |" in lines
    assert "| 6 | 2.5 ± 0.0 | 60 | 4.59 | 73.73 |" in lines


def test_of_a_single_seed_no_deviation_is_claimed(runs):
    line = next(li for li in tables(rows_of(read(runs[:1]))) if li.startswith("| FedDM-F"))
    assert "±" not in line
    assert "| 10.00 |" in line


def test_every_finished_run_has_a_line_of_its_own(runs):
    lines = list(csv.DictReader(io.StringIO(runs_csv(read(runs)))))
    assert [line["run"] for line in lines] == [run.name for run in runs]
    assert [float(line["fid"]) for line in lines] == [10.0, 12.0, 17.0, 20.0, 20.5, 24.0]


def test_the_report_says_how_its_figures_were_made_and_holds_its_images(runs, tmp_path):
    (runs[-1].path / "status.json").unlink()  # one is still going on
    report = tmp_path / "docs" / "table.md"
    write_outputs(runs, tmp_path, "fed-diffusion sweep mine.yaml", report)
    text = report.read_text()
    assert "    fed-diffusion sweep mine.yaml\n" in text
    assert "5 of 6 runs are finished" in text
    assert (
        "10 clients (iid), 3 rounds of 5 local epochs at batch 128, adam with eta = 0.0001" in text
    )
    assert "1000 generated images of 41 network evaluations against R, extractor E" in text
    assert "The paper does not say how many samples" in text
    assert f"Machine: {MACHINE}." in text
    for name in ("table-loss", "table-samples"):
        assert f"({name}.png)" in text
        with Image.open(report.with_name(f"{name}.png")) as image:
            assert min(image.size) > 200
    for name in ("table.md", "table.csv", "runs.csv", "loss.png", "samples.png"):
        assert (tmp_path / name).is_file()
    assert list((tmp_path / "locks").iterdir()) == []


def judged(run, **others):
    """The run with figures of further judges."""
    results = run.results()
    results["quality"]["others"] = {
        name.replace("__", "."): {"fid": fid, "fid_floor": 0.5, "inception_score": [8.0, 0.1]}
        | {"extractor": f"{name}(sha256 c0ffee)", "why": None if fid else "it is blind"}
        for name, fid in others.items()
    }
    RunDir(run.path).write_results(results)
    return run


def test_each_further_judge_has_columns_named_after_it(runs, tmp_path):
    fids = [1.0, 3.0, 5.0, 2.0, 2.5, 3.0]
    for run, fid in zip(runs, fids, strict=True):
        judged(run, resnet56_cifar10=fid)
    rows = rows_of(read(runs))
    head, _, first, *_ = tables(rows)[2:]
    assert "| FID floor | KID |" in head
    assert head.endswith(
        "| seconds | IS by resnet56_cifar10 | FID by resnet56_cifar10 | FID floor by "
        "resnet56_cifar10 | paper IS | paper FID |"
    )
    assert first.endswith("| 8.00 ± 0.00 | 3.00 ± 2.00 | 0.50 ± 0.00 | 4.59 | 73.73 |")
    table = list(csv.DictReader(io.StringIO(table_csv(rows))))
    assert [float(row["fid_resnet56_cifar10_mean"]) for row in table] == [3.0, 2.5]
    each = list(csv.DictReader(io.StringIO(runs_csv(read(runs)))))
    assert [float(line["fid_resnet56_cifar10"]) for line in each] == fids
    write_outputs(runs, tmp_path, "fed-diffusion sweep mine.yaml")
    text = (tmp_path / "table.md").read_text()
    assert "Also by resnet56_cifar10, extractor resnet56_cifar10(sha256 c0ffee)." in text


def test_a_run_that_a_further_judge_has_not_seen_leaves_its_cells_empty(runs):
    judged(runs[0], resnet56_cifar10=None)
    assert tables(rows_of(read(runs)))[4].endswith("| – | – | – | 4.59 | 73.73 |")
    plain = [run for run in runs if run is not runs[0]]
    assert "resnet56_cifar10" not in "".join(tables(rows_of(read(plain))))


def test_runs_of_two_judges_are_not_compared_without_a_word(runs, tmp_path):
    results = runs[1].results()
    results["quality"]["extractor"] = "another"
    RunDir(runs[1].path).write_results(results)
    write_outputs(runs, tmp_path, "fed-diffusion sweep mine.yaml")
    text = (tmp_path / "table.md").read_text()
    assert "NOT ALL RUNS HAVE THE SAME JUDGE: E; another." in text


def test_where_quality_could_not_be_measured_the_report_says_why(tmp_path):
    run = make_run(tmp_path, "digits", "FedDM-F", 0, why="the weights could not be downloaded")
    write_outputs([run], tmp_path, "fed-diffusion sweep mine.yaml")
    text = (tmp_path / "table.md").read_text()
    assert "| FedDM-F | – | – |" in text
    assert "since the weights could not be downloaded" in text
    assert "paper" not in text.split("## How")[1]  # it has no digits


def test_without_a_finished_run_nothing_is_written(runs, tmp_path):
    for run in runs:
        (run.path / "status.json").write_text(json.dumps({"state": "stopped"}))
    assert write_outputs(runs, tmp_path, "fed-diffusion sweep mine.yaml") is None
    assert not list(tmp_path.glob("*.md"))


def test_level_f_and_baselines_belong_beside_every_family():
    methods = ["R-FedDM-S", "T-FedDM-M-literal", "FedDM-F", "FedDM-S-exclusive"]
    assert [family(method) for method in methods] == ["R", "T", None, None]


@pytest.mark.parametrize(
    "damage", ["{", "{}", '{"quality": []}', '{"quality": {"fid": 1}, "loss": "much"}']
)
def test_a_run_with_damaged_files_costs_its_own_row_and_no_more(damage, runs, tmp_path, caplog):
    (runs[0].path / "results.json").write_text(damage)
    (runs[1].path / "status.json").write_text("")
    with (runs[2].path / "metrics.jsonl").open("r+") as file:
        file.write("damaged")  # the first round
    table = write_outputs(runs, tmp_path, "command")
    assert "| FedDM-F |" in table
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert rows["FedDM-F"]["seeds"] == "2"
    assert rows["R-FedDM-S"]["seeds"] == "0 1 2"
    for path in (runs[0].path / "results.json", runs[1].path / "status.json"):
        assert str(path) in caplog.text
