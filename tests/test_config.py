"""The configuration: what is refused, and how the message helps."""

import pytest
import yaml

from fed_diffusion.config import (
    ConfigError,
    build_config,
    load_config,
    method_name,
    parse_pairs,
    presets,
)
from fed_diffusion.models.build import skeleton


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_survives_being_written_and_read(name):
    config = load_config(name)
    assert build_config(yaml.safe_load(config.to_yaml())) == config


EPOCHS = {"cifar10": 5, "svhn": 2, "fashion_mnist": 2}


@pytest.mark.parametrize("name", EPOCHS)
@pytest.mark.parametrize("variant", ["", "-best"])
def test_the_papers_presets_say_what_its_appendix_d_says(name, variant):
    config = load_config(name + variant)
    assert (config.data.name, config.clients, config.rounds) == (name, 10, 300)
    assert (config.local.epochs, config.pruning.level) == (EPOCHS[name], "F")
    if not variant:
        assert config.local.eta == 1e-4
        network = skeleton(config)  # without memory
        assert 23.2e6 < sum(p.numel() for p in network.parameters()) < 1.05 * 23.2e6


REFUSED = {
    "an unknown preset": ("digit", {}, r"preset = 'digit'.*Did you mean 'digits'"),
    "an unknown key": ("digits", {"pruning.levle": "S"}, r"pruning\.levle.*pruning\.level"),
    "an unknown section": ("digits", {"prunning.level": "S"}, r"prunning.*pruning"),
    "a keep ratio of 0": ("digits", {"pruning.keep": 0}, r"pruning\.keep = 0.*greater than 0"),
    "a keep ratio of 1.2": ("digits", {"pruning.keep": 1.2}, r"pruning\.keep = 1\.2.*equal to 1"),
    "too few keep ratios": ("digits", {"pruning.keep": [1, 0.5]}, r"pruning\.keep.*clients = 10"),
    "K below log(1/delta)": (
        "digits",
        {"diffusion.delta": 1e-3, "diffusion.K": 6},
        r"K: 6.*at least 7",
    ),
    "T below 1": (
        "digits",
        {"diffusion.T": 0.5},
        r"diffusion\.T = 0\.5.*greater than or equal to 1",
    ),
    "delta of 1": ("digits", {"diffusion.delta": 1.0}, r"diffusion\.delta = 1\.0.*less than 1"),
    "a width off the group": ("digits", {"model.widths": [33]}, r"model\.widths.*model\.group"),
    "steps and epochs": ("digits", {"local.steps": 1, "local.epochs": 1}, r"local\..*exactly one"),
    "an unknown method": ("digits", {"method": "X-FedDM-S"}, r"method = 'X-FedDM-S'.*R-FedDM-S"),
    "a method and a contradiction": (
        "digits",
        {"method": "R-FedDM-S", "pruning.level": "M"},
        r"pruning\.level = 'M' contradicts method",
    ),
    "an unknown level": ("digits", {"method": None, "pruning.level": "Q"}, r"pruning\.level = 'Q'"),
    "a level with nothing to drop": (
        "digits",
        {"pruning.kind": "full", "pruning.level": "S"},
        r"pruning\.kind: full.*level F",
    ),
    "guidance of labels that were never dropped": (
        "digits",
        {"evaluation.guidance": 2},
        r"evaluation\.guidance: 2 .*model\.label_dropout above 0",
    ),
    "guidance without labels": (
        "digits",
        {"evaluation.guidance": 2, "model.conditional": False},
        r"evaluation\.guidance: 2 .*model\.conditional",
    ),
    "negative guidance": (
        "digits",
        {"evaluation.guidance": -1, "model.label_dropout": 0.1},
        r"evaluation\.guidance = -1.*greater than or equal to 0",
    ),
    "labels to drop where there are none": (
        "digits",
        {"model.label_dropout": 0.1, "model.conditional": False},
        r"model\.label_dropout: 0\.1.*model\.conditional",
    ),
    "words for a number": ("digits", {"rounds": "many"}, r"rounds = 'many'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_with_the_key_and_what_is_allowed(case):
    preset, overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        load_config(preset, overrides)


def test_a_pair_without_an_equals_sign_is_refused():
    with pytest.raises(ConfigError, match="key=value"):
        parse_pairs(["rounds"])


def test_values_are_read_as_yaml():
    assert parse_pairs(["a=1", "b.c=[1, 2]", "d=null", "e=1.0e-4"]) == {
        "a": 1,
        "b.c": [1, 2],
        "d": None,
        "e": 1e-4,
    }


@pytest.mark.parametrize("method", ["FedDM-F", "R-FedDM-L", "T-FedDM-M", "T-FedDM-S"])
def test_a_method_sets_its_pruning_and_is_named_after_it(method):
    config = load_config("digits", {"method": method})
    assert method_name(config) == method


def test_a_method_may_be_given_beside_a_key_that_agrees():
    config = load_config("digits", {"method": "R-FedDM-S", "pruning.level": "S"})
    assert config.pruning.kind == "random"


def test_what_is_typed_outranks_the_method_of_a_preset_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: R-FedDM-L\nlocal: {steps: 1}\n")
    assert load_config(str(path)).pruning.level == "L"
    config = load_config(str(path), {"pruning.level": "S"})
    assert (method_name(config), config.method) == ("R-FedDM-S", None)


def test_choosing_epochs_leaves_the_presets_steps():
    config = load_config("digits", {"local.epochs": 2})
    assert (config.local.steps, config.local.epochs) == (None, 2)


def test_paths_are_made_absolute_from_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("digits", {"data.dir": "images"}).data.dir == str(tmp_path / "images")


def test_a_preset_file_of_ones_own_is_read_by_its_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rounds: 3\nclients: 2\n")
    config = load_config(str(path))
    assert (config.preset, config.rounds, config.clients) == ("mine", 3, 2)
