"""The configuration: what is refused, and how the message helps."""

from pathlib import Path

import pytest
import yaml

from fed_diffusion.build import skeleton
from fed_diffusion.config import (
    ConfigError,
    build_config,
    load_config,
    method_name,
    parse_pairs,
    presets,
)
from fed_diffusion.config.yaml import parse_yaml


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


@pytest.mark.parametrize("name", ["fashion_mnist-small", "cifar10-small"])
def test_the_small_presets_have_ten_clients_and_about_a_million_parameters(name):
    config = load_config(name)
    assert (config.clients, config.pruning.level) == (10, "F")
    assert 0.8e6 < sum(p.numel() for p in skeleton(config).parameters()) < 1.3e6


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
    "a number for a list": ("digits", {"model.widths": 8}, r"model\.widths = 8 .*a list, as in"),
    "ratios beside a level": (
        "digits",
        {"pruning.kind": "random", "pruning.level": "S", "pruning.keep": 0.5},
        r"pruning\.keep: 0\.5 stands in place of a level.*pruning\.level = S",
    ),
    "a decay that turns signs": (
        "digits",
        {"local.optimizer": "adamw", "local.eta": 0.1, "local.weight_decay": 10},
        r"local\.weight_decay: 10 times local\.eta = 0\.1 is not below 1",
    ),
    "no reference": ("digits", {"evaluation.reference": ""}, r"evaluation\.reference = ''"),
    "words for a number": ("digits", {"rounds": "many"}, r"rounds = 'many'"),
}


@pytest.mark.parametrize(
    ("given", "said"),
    [(0, "greater than 0"), ([1, 2], "less than or equal to 1"), ("half", "a valid number")],
)
def test_of_a_settings_alternatives_only_the_one_of_the_values_shape_complains(given, said):
    with pytest.raises(ConfigError, match=r"pruning\.keep = ") as caught:
        load_config("digits", {"pruning.keep": given})
    assert said in str(caught.value)
    assert str(caught.value).count("is not allowed") == 1


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_with_the_key_and_what_is_allowed(case):
    preset, overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        load_config(preset, overrides)


def test_a_pair_without_an_equals_sign_is_refused():
    with pytest.raises(ConfigError, match="key=value"):
        parse_pairs(["rounds"])


def settings_of(*pairs):
    return load_config("digits", parse_pairs(pairs))


AS_TYPED = ["/x/set #2", "2024", "2024-01-02", "on", "no", "a: b", "010", "12:30", "1_000", "1e-2",
            "[a]", "{a: b}", "'q'", '"q"', "- a", "&a", "*a", "!a", "%a", "@a", "null ", "NULL",
            "x~", " x ", "x#y", "x=y", ":100:", "[red]"]  # fmt: skip


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_setting_of_text_takes_the_text_as_typed(text):
    here = str(Path.cwd() / text) if not text.startswith("/") else text
    assert settings_of(f"data.dir={text}").data.dir == here
    assert settings_of(f"flower.ray_address={text}").flower.ray_address == text


@pytest.mark.parametrize("text", ["2024", "2024-01-02", "on", "010", "12:30", "1_000", "1e-2"])
def test_a_setting_of_text_in_a_file_is_the_text_that_stands_there(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{dir: {text}}}\nflower: {{ray_address: {text}}}\n")
    config = load_config(str(path))
    assert (config.data.dir, config.flower.ray_address) == (str(Path.cwd() / text), text)
    assert build_config(parse_yaml(config.to_yaml(), "the text")) == config


def test_null_is_none_where_a_setting_of_text_may_be_none():
    assert settings_of("data.dir=null").data.dir is None
    assert settings_of("data.dir=").data.dir is None
    assert settings_of("method=null").method is None
    assert settings_of("data.name=null").data.name == "null"
    for none in ("null", "~", "Null", ""):
        assert settings_of("diffusion.K=50", f"evaluation.steps={none}").evaluation.steps is None


NUMBERS = {
    "a leading zero is no octal": ("seed=010", 10),
    "zeros alone": ("seed=000", 0),
    "an underscore as in Python": ("seed=1_000", 1000),
    "an exponent": ("rounds=1e2", 100),
    "a whole number with a point": ("rounds=3.0", 3),
    "quotes": ("rounds='3'", 3),
    "blanks": ("rounds= 3 ", 3),
    "an exponent without a point": ("local.eta=1e-2", 0.01),
    "a large exponent": ("data.alpha=1E3", 1000.0),
    "a point alone before": ("local.eta=.5", 0.5),
    "a count": ("round.quorum=1", 1),
    "a part": ("round.quorum=1.0", 1.0),
    "a smaller part": ("round.quorum=0.5", 0.5),
    "another count": ("round.quorum=2", 2),
    "one of several numbers": ("data.channels=3", 3),
    "one ratio": ("pruning.keep=0.5", 0.5),
    "a list": ("model.widths=[16, 024]", (16, 24)),
    "a list of nothing": ("model.attention=[]", ()),
    "true": ("data.flip=true", True),
    "yes": ("data.flip=yes", True),
    "off": ("data.flip=off", False),
    "a word that YAML takes for false": ("data.flip=No", False),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_other_settings_are_read_as_their_type_says(case, tmp_path):
    pair, value = NUMBERS[case]
    key, _, text = pair.partition("=")
    section, _, name = key.partition(".")
    more = ["pruning.kind=random"] if section == "pruning" else []
    beside = {"pruning": "kind: random, ", "local": "steps: 1, "}.get(section, "")
    path = tmp_path / "mine.yaml"
    path.write_text(f"{section}: {{{beside}{name}: {text}}}" if name else f"{key}: {text}")
    for config in (settings_of(pair, *more), load_config(str(path))):
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert (found, type(found)) == (value, type(value))


NO_NUMBERS = ["rounds=true", "rounds=yes", "rounds=null", "rounds=", "rounds=12:30", "rounds=0x10",
              "rounds=0o17", "rounds=3 #2", "rounds=3,5", "rounds=1e-2", "rounds=.inf",
              "rounds=nan",
              "rounds=[3]", "rounds={a: 3}", "rounds=2024-01-02", "local.eta=on", "data.flip=2",
              "data.channels=true", "data.flip=null", "round.quorum=true", "model.widths=64",
              "model.widths=[8, true]", "pruning.keep=[1, yes]", "wire.up=off", "round.quorum=1.5",
              "seed=99999999999999999999", "rounds=99999999999999999999",
              "seed=" + "9" * 5000, "seed=-1"]  # fmt: skip


@pytest.mark.parametrize("pair", NO_NUMBERS)
def test_text_that_a_setting_does_not_mean_is_refused_with_its_key(pair):
    with pytest.raises(ConfigError, match=rf"^{pair.partition('=')[0]} = "):
        settings_of(pair)


@pytest.mark.parametrize(
    "given",
    [
        {"rounds": True},
        {"local.eta": True},
        {"data.channels": True},
        {"model.widths": [8, True]},
        {"round.norm_factor": True},
    ],
)
def test_true_is_not_one(given):
    with pytest.raises(ConfigError, match="true and false are not numbers"):
        load_config("digits", given)


@pytest.mark.parametrize(
    "pairs",
    [("rounds=1", "rounds=1"), ("local={steps: 3}", "local.eta=1"), ("local.eta=1", "local={}")],
)
def test_a_setting_that_is_given_twice_is_refused(pairs):
    with pytest.raises(ConfigError, match=r"^set: (rounds is given twice|local.*holds the other)"):
        parse_pairs(pairs)


def test_the_settings_that_are_given_are_left_as_they_are():
    given = {"local": {"epochs": 2}, "pruning": {"kind": "random"}}
    first = load_config("digits", given)
    assert (first.local.epochs, first.local.steps) == (2, None)
    assert given == {"local": {"epochs": 2}, "pruning": {"kind": "random"}}


def test_a_key_twice_in_a_typed_mapping_is_refused():
    with pytest.raises(ConfigError, match=r"local=\{steps: 1, steps: 2\}.*steps stands twice"):
        parse_pairs(["local={steps: 1, steps: 2}"])


@pytest.mark.parametrize("method", ["FedDM-F", "R-FedDM-L", "T-FedDM-M", "T-FedDM-S"])
def test_a_method_sets_its_pruning_and_is_named_after_it(method):
    config = load_config("digits", {"method": method})
    assert method_name(config) == method


def test_a_method_may_be_given_beside_a_key_that_agrees():
    config = load_config("digits", {"method": "R-FedDM-S", "pruning.level": "S"})
    assert config.pruning.kind == "random"


@pytest.mark.parametrize("same", ["1e-2", "0.01", "0.0100", "1E-2", "'0.01'"])
def test_a_value_that_is_written_in_another_way_is_no_contradiction(same):
    config = settings_of("method=FedDM-prox", f"local.prox={same}")
    assert config.local.prox == 0.01
    assert settings_of("method=R-FedDM-S", 'pruning.level="S"').pruning.level == "S"
    assert settings_of("method=FedDM-quant", "wire.differences=yes").wire.differences


@pytest.mark.parametrize(
    "pair", ["local.prox=0.02", "local={steps: 3, prox: 0}", "pruning={kind: random, level: M}"]
)
def test_a_value_that_differs_is_a_contradiction_wherever_it_stands(pair):
    with pytest.raises(ConfigError, match="contradicts method = 'R-FedDM-S-prox'"):
        settings_of("method=R-FedDM-S-prox", pair)


def test_a_file_that_contradicts_its_own_method_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: R-FedDM-S\npruning: {kind: random, level: M}\n")
    with pytest.raises(ConfigError, match=r"pruning\.level = 'M' contradicts"):
        load_config(str(path))
    path.write_text("method: R-FedDM-S\npruning: {kind: random, level: S}\n")
    assert method_name(load_config(str(path))) == "R-FedDM-S"


def test_a_typed_method_replaces_all_of_the_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: FedDM-prox\n")
    assert method_name(load_config(str(path), {"method": "R-FedDM-S"})) == "R-FedDM-S"


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
