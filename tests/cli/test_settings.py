"""presets, settings, config show, completion, --set a=1 b=2 and --version."""

import importlib.util
import os
import subprocess
import sys

import pytest
import yaml

import fed_diffusion as fd
from fed_diffusion.cli.arguments import spread
from fed_diffusion.cli.main import main, parser
from fed_diffusion.config import build_config, presets
from fed_diffusion.config.describe import all_settings
from fed_diffusion.config.schema import Config, Section
from tests.tiny import TINY

SPREAD = {
    "several pairs": ("run d --set a=1 b.c=2 --out x", "run d --set a=1 --set b.c=2 --out x"),
    "a preset behind them": ("run --set a=1 b=2 digits", "run --set a=1 --set b=2 digits"),
    "with an equals sign": ("run d --set=a=1 b=2", "run d --set=a=1 --set b=2"),
    "one each": ("run d --set a=1 --set b=2", "run d --set a=1 --set b=2"),
    "a value that looks like a pair": ("run d --set a=b=1", "run d --set a=b=1"),
    "a pair that is none": ("run d --set a b=1", "run d --set a --set b=1"),
    "none": ("sample run --out a=b.png", "sample run --out a=b.png"),
}


@pytest.mark.parametrize("case", SPREAD)
def test_set_takes_pairs_one_after_another(case):
    typed, meant = SPREAD[case]
    assert spread(typed.split()) == meant.split()


def test_presets_are_listed_with_a_word_on_each(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == presets()
    assert all(len(line.split()) > 3 for line in lines)


def test_every_setting_is_listed_with_its_default_and_what_it_may_be():
    def names(model, prefix=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from names(field.annotation, f"{prefix}{name}.")
            else:
                yield prefix + name

    found = {one.key: one for one in all_settings()}
    assert list(found) == list(names(Config))
    assert found["local.batch"].values == "whole number, at least 1"
    assert found["local.batch"].default == "64"
    assert found["round.trim"].values == "number, above 0, below 0.5"
    assert found["wire.up"].values == "fp32 | bf16 | fp16 | int8"
    assert found["trackers"].values == "list of: csv | tensorboard | mlflow | module:attribute"
    assert found["data.dir"].values == "text or null"
    warmup = "The number of rounds over which eta rises linearly from nearly 0 to its value."
    assert found["local.warmup"].meaning == warmup


def test_settings_are_searched_by_name_and_meaning(capsys):
    assert main(["settings", "FedProx"]) == 0
    assert capsys.readouterr().out.startswith("local.prox = 0.0  (number, at least 0)\n")
    assert main(["settings", "nothing of the kind"]) == 2
    assert "no setting holds 'nothing of the kind'" in capsys.readouterr().err


def test_what_config_show_prints_is_a_preset_for_the_same_run(tmp_path, capsys):
    pairs = [f"{key}={value}" for key, value in TINY.items()]
    assert main(["config", "show", "digits", "--set", *pairs]) == 0
    said = capsys.readouterr().out
    assert build_config(yaml.safe_load(said)) == fd.load_config("digits", TINY)
    assert "# client 4: 324 images, 35 held out: 0 " in said
    assert "# network: " in said


MEANT = {
    "section": ("modle.widths=[8]", "modle is not a section. Did you mean model.widths?"),
    "its section": ("widths=[8]", "Did you mean model.widths?"),
    "another section": ("rounds.fraction=1", "Did you mean round.fraction?"),
    "both": ("locl.stps=1", "Did you mean local.steps?"),
    "name": ("local.stps=1", "local.stps is not a setting. Did you mean local.steps?"),
    "whole": ("evalution=1", "Did you mean evaluation?"),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_wrong_section_is_told_the_setting_that_is_meant(case, capsys):
    pair, words = MEANT[case]
    assert main(["run", "digits", "--set", pair]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(importlib.util.find_spec("shtab") is not None, reason="shtab is here")
def test_completion_names_the_package_that_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)  # as where it is not installed
    assert main(["completion", "bash"]) == 2
    assert "pip install 'fed-diffusion[completion]'" in " ".join(capsys.readouterr().err.split())


def test_completion_is_a_static_script_with_every_command(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("watch", "resume", "--dry-run"))


def test_the_parser_is_made_without_what_takes_long_to_import():
    code = (
        "import sys; from fed_diffusion.cli.main import parser; parser();"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'flwr', 'pydantic', 'rich', 'psutil'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_m_is_the_command_and_says_its_version(tmp_path):
    command = [sys.executable, "-m", "fed_diffusion", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.startswith(f"fed-diffusion {fd.__version__}")
    assert os.linesep in said
    assert parser().prog == "fed-diffusion"
