"""The pages in a real browser: headless Chromium, driven by playwright-core, judged by axe-core.

`make test-browser` installs the two from npm; Chromium and Node are the machine's.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fed_diffusion.report.comparison import compare, page_of
from fed_diffusion.report.html import write_report
from tests.report.test_page import write_rich_run

pytestmark = pytest.mark.browser
LOOK = Path(__file__).with_name("look.mjs")


def look(page: Path, width: int, scheme: str) -> dict:
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    shots = os.environ.get("BROWSER_SCREENSHOTS")
    shot = [str(Path(shots) / f"{page.stem}-{width}-{scheme}.png")] if shots else []
    arguments = [os.environ["BROWSER_MODULES"], chromium, str(page), str(width), scheme, *shot]
    done = subprocess.run(
        ["node", str(LOOK), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["finished", "begun", "compared"])
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = write_rich_run(folder / "run")
    if request.param == "begun":
        for name in ("results.json", "data.json", "metrics.jsonl", "samples/final.png"):
            (run / name).unlink()
    if request.param != "compared":
        return write_report(run)
    other = write_rich_run(folder / "a_run_with_a_long_name_that_nobody_could_break")
    (folder / "compared.html").write_text(page_of(compare([run, other])))
    return folder / "compared.html"


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1280, "light"), (375, "dark")])
def test_a_page_fits_its_screen_is_silent_and_accessible(page, width, scheme):
    found = look(page, width, scheme)
    assert (found["folded"], found["unfolded"]) == (0, 0)
    assert found["broken"] == 0
    assert found["said"] == []
    assert found["elsewhere"] == []
    assert found["rules"] > 10  # it did look
    assert [f for f in found["findings"] if f["impact"] in ("serious", "critical")] == []
