"""The public API: what it offers, how soon it is there, and that it does what it says."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fed_diffusion as fd
from fed_diffusion.engines import local
from tests import typed_usage
from tests.tiny import TINY

SMALL = TINY | {"rounds": 2, "clients": 2, "local.steps": 1, "evaluation.every": 0}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)


def test_importing_the_package_and_reading_settings_needs_no_torch():
    code = (
        "import sys, fed_diffusion as fd\n"
        "assert 'pydantic' not in sys.modules\n"
        "config = fd.load_config('digits', {'rounds': 3})\n"
        "assert config.rounds == 3 and isinstance(config, fd.Config)\n"
        "assert not {'torch', 'flwr', 'ray'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_documented_and_listed():
    assert set(fd.__all__) <= set(dir(fd))
    for name in fd.__all__:
        found = getattr(fd, name)
        assert name == "__version__" or inspect.getdoc(found)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fd.nothing


def test_type_checkers_are_told_the_places_that_names_come_from():
    (block,) = [
        node
        for node in ast.parse(Path(fd.__file__).read_text("utf-8")).body
        if isinstance(node, ast.If)
    ]
    told = {
        alias.name: node.module.removeprefix("fed_diffusion.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fed_diffusion")
        for alias in node.names
    }
    assert told == fd._PLACES
    assert set(told) | {"load", "__version__"} == set(fd.__all__)
    assert (Path(fd.__file__).parent / "py.typed").is_file()


def test_a_run_is_started_loaded_and_sampled_as_the_typed_usage_says(tmp_path):
    lines = []
    config = fd.load_config("digits", SMALL)
    results = fd.run(config, tmp_path / "run", progress=lines.append)
    assert results == json.loads((tmp_path / "run/results.json").read_text())
    assert [line["round"] for line in lines] == [1, 2]
    assert typed_usage.images(tmp_path / "run").shape == (16, 1, 8, 8)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(tmp_path):
    class Stop(Exception):
        pass

    def stop(line):
        raise Stop

    config = fd.load_config("digits", SMALL)
    whole = fd.run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        fd.run(config, tmp_path / "run", progress=stop)
    assert fd.resume(tmp_path / "run")["loss"] == whole["loss"]
    with pytest.raises(fd.ConfigError, match="nothing to resume"):
        fd.resume(tmp_path / "run")


def test_what_cannot_be_run_is_refused_and_leaves_nothing(tmp_path):
    config = fd.load_config("digits", SMALL)
    with pytest.raises(fd.ConfigError, match=r"engine = 'ray' is unknown\. Allowed: local, flower"):
        fd.run(config, tmp_path / "run", engine="ray")
    own = {"data.name": "no_such:f", "data.size": 8, "data.channels": 1}
    config = fd.load_config("digits", SMALL | own)
    with pytest.raises(fd.ConfigError, match=r"data\.name = 'no_such:f' cannot be loaded"):
        fd.run(config, tmp_path / "run")
    assert "cannot be loaded" in typed_usage.by_hand(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
