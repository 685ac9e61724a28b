"""The notebook: its cells run in order, on one core, and nothing of a run is stored in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(TOUR.read_text("utf-8"))["cells"]


def test_no_outputs_are_stored(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_cells_run_in_order_on_one_core_in_under_a_minute(cells, tmp_path):
    script = tmp_path / "tour.py"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script.write_text("\n\n".join(code), "utf-8")
    before = os.times()
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ
        | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        | {"OMP_NUM_THREADS": "1"},
        preexec_fn=one_core,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    after = os.times()
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 60
    report = Path(done.stdout.splitlines()[-1])
    assert report.is_file()
    assert "FID" in done.stdout


def one_core():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
