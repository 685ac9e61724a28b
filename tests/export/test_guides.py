"""The guides to pretrained networks: every block of theirs runs, with a small pipeline."""

import pytest

from fed_diffusion.cli.main import main
from fed_diffusion.engines import local
from tests.models.pipelines import save_pipeline
from tests.models.test_from_diffusers import models
from tests.test_docs import blocks, made_of_the_reader, reduced


@models
@pytest.mark.parametrize("page", ["hospital", "pipeline"])
def test_the_code_of_a_guide_runs_from_its_first_line_to_its_last(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local, "usable_cores", lambda: 1)  # in this process
    made_of_the_reader(tmp_path)
    save_pipeline(tmp_path / "pretrained", sample_size=32, in_channels=3, out_channels=3)
    found, variables = blocks(f"docs/guides/{page}.md"), {}
    assert len(found) >= 3
    for block in found:
        if block.language == "python":
            exec(compile(block.text, page, "exec"), variables)
            continue
        for words in block.commands:
            assert main(reduced(words[1:])) == 0
