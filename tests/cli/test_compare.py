"""report and compare, as a user types them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fed_diffusion.cli.main import main
from tests.report.test_comparison import finished
from tests.report.test_report import a_round, write_run


def test_a_report_is_written_of_a_run_at_any_stage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [a_round(1)])
    for words in ("round 1 was its last", "1 lines of metrics.jsonl could not be read"):
        assert main(["report", str(run)]) == 0
        assert capfd.readouterr().out == f"{run / 'report.html'}\n"
        assert words in (run / "report.html").read_text()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"round": 2, "lo')  # a kill in the middle of a line
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run directory" in " ".join(capfd.readouterr().err.split())


def test_compare_prints_a_table_and_ends_with_the_page(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(finished(tmp_path / name, data=name)) for name in ("a [b]", ":b:")]
    for page in ("compare.html", "compare-2.html"):
        assert main(["compare", *runs]) == 0
        out = capfd.readouterr().out
        assert out.splitlines()[-1] == str(tmp_path / page)
        for words in ("a [b]", ":b:", "4.25", "another data", "held-out loss"):
            assert words in out
            assert words in (tmp_path / page).read_text()
    assert main(["compare", *runs, "--out", str(tmp_path / "mine.html")]) == 0
    assert main(["compare", *runs, "--out", str(tmp_path / "new" / "mine.html")]) == 0
    assert (tmp_path / "new" / "mine.html").is_file()


def test_a_comparison_that_has_no_place_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [str(finished(tmp_path / name)) for name in "ab"]
    assert main(["compare", *runs, "--out", str(tmp_path / "page.txt")]) == 2
    assert "is not a .html file" in " ".join(capfd.readouterr().err.split())
    (tmp_path / "file").touch()
    assert main(["compare", *runs, "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot be written" in " ".join(capfd.readouterr().err.split())
    shutil.rmtree(tmp_path / "b")
    assert main(["compare", *runs, "--out", str(tmp_path / "page.html")]) == 2
    assert not (tmp_path / "page.html").exists()
