"""Every setting that changes what is trained, averaged or sent is a condition of its own."""

import pytest

from fed_diffusion.analysis.covered import assumptions, caveats, images
from fed_diffusion.build import Setup
from fed_diffusion.config import load_config
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.theory.bound import Data, Steps, theorem_4_11
from tests.theory.test_bound import RUN

LETTER = {
    "local.optimizer": "sgd",
    "local.state": "fresh",
    "local.schedule": "constant",
    "model.conditional": False,
    "ema.decay": 0,
    "evaluation.denoise": False,
    "evaluation.sampler": "exponential_integrator",
    "evaluation.steps": None,
}
"""The digits preset with what the theorem speaks of."""


def letter(**changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("digits", LETTER | changes)


def failed(config, steps=(60,)):
    return [c.name for c in assumptions(Setup.of(config), steps) if not c.holds]


def test_the_theorems_letter_meets_every_condition():
    assert failed(letter()) == []
    u = PARTITIONS["kappa_minimal"](2.3, 1e-2, 300)
    bound = theorem_4_11(
        Data(64, 20.0), Steps.of(u), RUN, settings=assumptions(Setup.of(letter()), [RUN.S, RUN.S])
    )
    assert bound.covered


BROKEN = {
    "a median": ({"round__aggregation": "median"}, "the mean of equation (8)", "median"),
    "a trimmed mean": (
        {"round__aggregation": "trimmed_mean"},
        "the mean of equation (8)",
        "trimmed_mean",
    ),
    "server momentum": ({"server__optimizer": "momentum"}, "no server optimiser", "momentum"),
    "weights": ({"round__weighting": "examples"}, "equal weights", "examples"),
    "warm-up": ({"local__warmup": 2}, "one eta", "local.warmup = 2"),
    "a schedule": ({"local__schedule": "cosine"}, "one eta", "cosine"),
    "FedProx": ({"local__prox": 0.01}, "no proximal term", "0.01"),
    "weight decay": ({"local__weight_decay": 0.1}, "no weight decay", "0.1"),
    "clipped gradients": ({"local__max_grad_norm": 2}, "whole gradients", "2"),
    "dropout": ({"model__dropout": 0.1}, "no dropout", "0.1"),
    "dropped labels": (
        {"model__conditional": True, "model__label_dropout": 0.2},
        "no dropped labels",
        "0.2",
    ),
    "bf16": ({"worker__precision": "bf16"}, "gradients in fp32", "bf16"),
    "rounding up": ({"wire__up": "int8"}, "nothing rounded on the way", "wire.up = int8"),
    "rounding down": ({"wire__down": "bf16"}, "nothing rounded on the way", "wire.down = bf16"),
    "privacy": (
        {"privacy__clip": 1.0, "wire__differences": True},
        "no clipping and no noise",
        "privacy.clip = 1",
    ),
    "buffered rounds": (
        {"round__mode": "buffered", "wire__differences": True},
        "synchronous rounds",
        "buffered",
    ),
}


@pytest.mark.parametrize("which", BROKEN)
def test_a_setting_outside_the_theorem_fails_its_own_condition_and_is_named(which):
    changes, name, says = BROKEN[which]
    config = letter(**changes)
    assert failed(config) == [name]
    (condition,) = [c for c in assumptions(Setup.of(config), [60]) if not c.holds]
    assert says in condition.says
    u = PARTITIONS["kappa_minimal"](2.3, 1e-2, 300)
    bound = theorem_4_11(
        Data(64, 20.0), Steps.of(u), RUN, settings=assumptions(Setup.of(config), [60])
    )
    assert not bound.covered


def test_unequal_numbers_of_local_steps_are_outside_the_theorem():
    assert failed(letter(), steps=[3, 5, 3]) == ["the same S for all"]
    (condition,) = [c for c in assumptions(Setup.of(letter()), [3, 5]) if not c.holds]
    assert condition.says == "S is from 3 to 5"


def test_settings_that_the_proof_does_not_read_fail_nothing():
    for changes in (
        {"pruning__kind": "topk", "pruning__level": "S"},
        {"model__prediction": "x0"},
        {"data__partition": "dirichlet", "data__flip": True},
        {"wire__differences": True},
        {"evaluation__sampler": "second_order", "ema__decay": 0.9},
        {"model__conditional": True},
    ):
        assert failed(letter(**changes)) == []


def test_dropout_inside_a_network_of_ones_own_is_seen(tmp_path, monkeypatch):
    source = (
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, model, channels, size, classes):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Conv2d(channels, channels, 1)\n"
        "        self.noise = {layer}\n"
        "    def forward(self, x, u, labels=None):\n"
        "        return self.noise(self.layer(x))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    layers = {"Dropout2d": "torch.nn.Dropout2d(0.5)", "BatchNorm2d": "torch.nn.BatchNorm2d(1)"}
    for name, layer in layers.items():
        (tmp_path / f"net_{name}.py").write_text(source.format(layer=layer))
        (condition,) = [
            c
            for c in assumptions(Setup.of(letter(model__name=f"net_{name}:Net")), [60])
            if c.name == "no dropout"
        ]
        assert not condition.holds
        assert name in condition.says
    (tmp_path / "net_plain.py").write_text(source.format(layer="torch.nn.Identity()"))
    assert failed(letter(model__name="net_plain:Net")) == []


SILENT = {
    "functional dropout": ("F.dropout(y, 0.2, self.training)", "another value in training"),
    "dropout inside attention": (
        "self.attention(*3 * (y.flatten(1)[None],))[0][0].view(y.shape)",
        "another value in training",
    ),
    "nothing": ("y", ""),
    "dropout of nothing": ("self.nothing(y)", ""),
    "labels that it cannot do without": ("y + labels[0]", "an error where it was tried"),
}


@pytest.mark.parametrize("which", SILENT)
def test_a_network_that_trains_as_another_one_is_seen_whatever_it_is_made_of(
    which, tmp_path, monkeypatch
):
    """Layers of one's own cannot be known by name: the network is tried, from zeros on too."""
    then, says = SILENT[which]
    module = f"tried_{list(SILENT).index(which)}"
    (tmp_path / f"{module}.py").write_text(
        "import torch\n"
        "import torch.nn.functional as F\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, model, channels, size, classes):\n"
        "        super().__init__()\n"
        "        self.nothing = torch.nn.Dropout(0.0)\n"
        "        self.attention = torch.nn.MultiheadAttention(64, 2, dropout=0.3)\n"
        "        self.leave = torch.nn.Parameter(torch.zeros(1, 1, 1, 1))\n"
        "    def forward(self, x, u, labels=None):\n"
        "        y = F.conv2d(x, self.leave)\n"
        f"        return {then}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = letter(model__name=f"{module}:Net")
    assert failed(config) == (["no dropout"] if says else [])
    (condition,) = [c for c in assumptions(Setup.of(config), [60]) if c.name == "no dropout"]
    assert says in condition.says


def test_the_precision_is_what_workers_report_not_what_this_machine_would_take():
    def condition(*computed):
        (found,) = [
            c
            for c in assumptions(Setup.of(letter()), [60], computed)
            if c.name == "gradients in fp32"
        ]
        return found.holds, found.says

    assert condition("fp32") == (True, "arithmetic in fp32")
    assert condition("fp32", "bf16") == (False, "arithmetic in bf16 and fp32")
    assert condition("unknown") == (False, "arithmetic in unknown")


def test_mirrored_images_are_part_of_what_the_bound_compares_with():
    assert "mirrored" in images(Setup.of(letter(data__flip=True)))["compared_with"]
    assert "mirrored" not in images(Setup.of(letter()))["compared_with"]


def test_epochs_have_a_last_batch_of_which_sigma_1_is_not():
    epochs = caveats(letter(local__epochs=1).local, [1])
    assert len(epochs) == len(caveats(letter().local, [1])) + 1
    assert "smaller" in epochs[-1]


def test_too_few_steps_for_delta_are_a_condition_that_says_by_how_much():
    u = PARTITIONS["geometric"](2.0, 1e-3, 4)
    bound = theorem_4_11(Data(64, 20.0), Steps.of(u), RUN)
    (condition,) = [c for c in bound.conditions if c.name == "K >= log(1 / delta)"]
    assert condition.ratio == pytest.approx(6.907755 / 4)


def test_the_images_of_the_letter_are_those_of_the_bound():
    found = images(Setup.of(letter()))
    assert found["differences"] == []
    assert "theta_R" in found["bound"]
    assert "exponential integrator in K = 300 steps" in found["bound"]
    assert found["run"] == "theta_R, sampled by exponential_integrator in 300 steps"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ema__decay": 0.9}, "moving average"),
        ({"evaluation__sampler": "second_order_sde"}, "second_order_sde"),
        ({"evaluation__steps": 19}, "19 steps in place of K = 300"),
        ({"evaluation__denoise": True}, "Tweedie"),
        ({"model__conditional": True}, "every label equally often"),
        ({"worker__precision": "bf16"}, "bf16"),
    ],
)
def test_what_the_run_samples_otherwise_is_named(changes, named):
    (difference,) = images(Setup.of(letter(**changes)))["differences"]
    assert named in difference


def test_guidance_is_named_beside_the_labels_that_it_needs():
    config = letter(model__conditional=True, model__label_dropout=0.1, evaluation__guidance=1.5)
    assert "guidance 1.5" in images(Setup.of(config))["differences"]


def test_minibatches_without_replacement_are_a_caveat_from_the_second_step_on():
    assert len(caveats(letter().local, [2])) == len(caveats(letter().local, [1])) + 1
    assert "not independent" in caveats(letter().local, [2])[-1]
