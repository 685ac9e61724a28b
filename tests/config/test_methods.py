"""Methods are names for settings."""

import pytest

from fed_diffusion.config import ConfigError, load_config, method_name

NAMED = [
    "FedDM-F",
    "R-FedDM-L",
    "T-FedDM-M",
    "C-FedDM-S",
    "B-FedDM-S",
    "FedDM-S-exclusive",
    "FedDM-M-small",
    "FedDM-F-prox",
    "FedDM-F-quant",
    "C-FedDM-S-prox-quant",
    "FedDM-S-small-quant",
    "FedDM-F-literal",
    "R-FedDM-S-prox-literal",
]


@pytest.mark.parametrize("method", NAMED)
@pytest.mark.parametrize("preset", ["digits", "digits-unequal"])
def test_a_method_sets_what_its_name_says_whatever_the_preset(method, preset):
    assert method_name(load_config(preset, {"method": method})) == method


def test_the_last_words_are_options_of_any_method():
    config = load_config("digits", {"method": "T-FedDM-S-prox-quant"})
    assert (config.pruning.kind, config.pruning.level) == ("topk", "S")
    assert config.local.prox > 0
    assert (config.wire.down, config.wire.up, config.wire.differences) == ("int8", "int8", True)
    plain = load_config("digits", {"method": "FedDM-prox"})
    assert (plain.pruning.kind, plain.wire.up) == ("full", "fp32")


@pytest.mark.parametrize("preset", ["cifar10", "svhn", "fashion_mnist", "digits"])
def test_one_word_takes_the_paper_at_its_letter(preset):
    config = load_config(preset, {"method": "T-FedDM-M-literal"})
    assert (config.pruning.kind, config.pruning.level) == ("topk", "M")
    assert config.pruning.scope == "all"  # masks cover every coordinate
    assert (config.local.optimizer, config.local.state) == ("sgd", "fresh")  # (7), no momentum
    assert config.ema.decay == 0  # samples come from theta_R
    assert config.round.weighting == "uniform"  # (8)
    assert (config.round.aggregation, config.wire.up) == ("mean", "fp32")
    changed = {"pruning", "local", "ema", "method"}
    plain = load_config(preset).to_dict()
    assert {key for key, value in config.to_dict().items() if value != plain[key]} == changed


def test_a_baseline_without_a_level_keeps_the_presets_ratios():
    config = load_config("digits-unequal", {"method": "FedDM-exclusive"})
    assert config.pruning.baseline == "exclusive"
    assert config.pruning.keep[-1] == 0.125
    assert method_name(config) == "FedDM-own-exclusive"


def test_ones_own_ratios_and_nodes_that_say_theirs_have_names_too():
    assert method_name(load_config("digits-unequal")) == "C-FedDM-own"
    node = {"pruning.kind": "topk", "pruning.budget": "node"}
    assert method_name(load_config("digits", node)) == "T-FedDM-node"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("C-FedDM", "C goes with a level"),
        ("R-FedDM-F", "R goes with a level"),
        ("R-FedDM-S-small", "small drops no weights"),
        ("FedDM-F-exclusive", "its level says who is weak"),
        ("FedDM-S", "kind: full drops nothing"),
        ("FedDM-F-quant-quant", "is unknown"),
        ("feddm", r"is unknown. Allowed: \[R-"),
    ],
)
def test_a_name_that_means_nothing_is_refused(method, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", {"method": method})


REFUSED = {
    "a choice of nothing": ({"pruning.choice": "rolling"}, "needs kind channels"),
    "a unit of nothing": (
        {"pruning.kind": "random", "pruning.unit": "channels"},
        "needs kind balanced",
    ),
    "two sources of ratios": (
        {"pruning.kind": "channels", "pruning.budget": "auto", "pruning.keep": 0.5},
        "lets the nodes say their ratios",
    ),
    "auto with masks that save nothing": (
        {"pruning.kind": "random", "pruning.budget": "auto"},
        "needs masks that save memory",
    ),
    "nodes with nothing to drop": (
        {"pruning.kind": "full", "pruning.budget": "node"},
        "needs a kind that drops something",
    ),
    "a method and its opposite": (
        {"method": "FedDM-F-quant", "wire.up": "fp32"},
        r"wire\.up = 'fp32' contradicts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_without_effect_or_at_odds_are_refused(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        load_config("digits", overrides)
