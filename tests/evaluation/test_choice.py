"""Which judges a configuration names, whose file evaluation.weights is, and what auto takes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fed_diffusion.config import build_config, load_config, parse_pairs
from fed_diffusion.config.schema import Config, ConfigError, EvaluationConfig
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation import check_evaluation, public
from fed_diffusion.evaluation.choice import WEIGHTS_FILE, choices
from fed_diffusion.evaluation.quality import JUDGED, evaluate

COLOUR, GREY = (3, 32, 32), (1, 28, 28)
LITE, RESNET = "efficientnet_lite0", "resnet56_cifar10"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps downloads: empty. Returns where Inception's would be."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / WEIGHTS_FILE


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "PACKAGES", ("efficientnet_that_nobody_has", "torch"))


def taken(shape: tuple[int, ...], **evaluation: Any) -> list[tuple[str, Any]]:
    found = choices(EvaluationConfig(**evaluation), shape)
    return [(choice.name, choice.settings.weights) for choice in found]


def test_where_inception_is_not_there_colour_images_have_efficientnet_and_the_reason(
    hub: Path,
) -> None:
    (choice,) = choices(EvaluationConfig(), COLOUR)
    assert choice.name == LITE
    assert "Inception's weights are not on this machine" in str(choice.because)
    assert taken(GREY) == [("inception", None)]
    hub.parent.mkdir(parents=True)
    hub.touch()
    assert choices(EvaluationConfig(), COLOUR)[0].because is None
    assert taken(COLOUR) == [("inception", None)]


def test_a_file_for_inception_is_a_reason_to_take_it() -> None:
    assert taken(COLOUR, weights="x.pth") == [("inception", "x.pth")]
    assert taken(COLOUR, weights={"inception": "x.pth"}) == [("inception", "x.pth")]
    both = {"extractor": ["auto", RESNET]}
    assert taken(COLOUR, **both, weights="x.pth") == [(LITE, None), (RESNET, "x.pth")]


def test_what_auto_takes_and_is_named_outright_is_taken_once() -> None:
    assert taken(COLOUR, extractor=["auto", LITE]) == [(LITE, None)]
    assert taken(COLOUR, extractor=[LITE, "auto"]) == [(LITE, None)]


def test_a_file_goes_to_the_judge_that_takes_one_or_is_named() -> None:
    lite_first = [LITE, RESNET]
    assert taken(COLOUR, extractor=lite_first, weights="a") == [(LITE, None), (RESNET, "a")]
    files = {RESNET: "a", "inception": "b"}
    named = ["inception", RESNET, "classifier"]
    expected = [("inception", "b"), (RESNET, "a"), ("classifier", None)]
    assert taken(COLOUR, extractor=named, weights=files) == expected
    with pytest.raises(ConfigError, match=r"one file for .*inception, resnet56_cifar10.*Name the"):
        taken(COLOUR, extractor=["inception", RESNET], weights="a")
    with pytest.raises(ConfigError, match=r"efficientnet_lite0 brings its own"):
        taken(COLOUR, extractor=LITE, weights="a")
    with pytest.raises(ConfigError, match=r"a file for 'efficientnet_lite0', which is not a judge"):
        taken(COLOUR, extractor=[LITE, RESNET], weights={LITE: "a"})


def colour_run(**evaluation: Any) -> Config:
    return build_config({"data": {"name": "cifar10"}, "evaluation": evaluation})


def test_a_run_says_which_judge_it_takes_in_inceptions_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        check_evaluation(colour_run())
    (said,) = caplog.messages
    assert said.startswith("evaluation.extractor = auto takes efficientnet_lite0: Inception's")
    caplog.clear()
    check_evaluation(colour_run(extractor=LITE))
    check_evaluation(colour_run(samples=0))
    assert caplog.messages == []


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize("extractor", ["auto", LITE, ["inception", LITE]])
def test_without_the_extra_a_run_is_refused_with_the_command_that_installs_it(
    extractor: Any,
) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'fed-diffusion\[judges\]'") as caught:
        check_evaluation(colour_run(extractor=extractor))
    assert str(caught.value).startswith("evaluation.extractor = ")
    check_evaluation(colour_run(extractor="inception"))


def test_judges_are_a_name_or_a_list_and_their_files_absolute() -> None:
    def typed(*pairs: str) -> EvaluationConfig:
        return load_config("digits", parse_pairs(pairs)).evaluation

    assert typed(f"evaluation.extractor={LITE}").extractor == LITE
    assert typed(f"evaluation.extractor=[{LITE}]").extractor == LITE
    two = typed(f"evaluation.extractor=[{RESNET}, my:Judge]", f"evaluation.weights={{{RESNET}: a}}")
    assert two.extractor == (RESNET, "my:Judge")
    assert two.weights == {RESNET: str(Path("a").absolute())}
    assert typed("evaluation.weights=a").weights == str(Path("a").absolute())
    for wrong, says in (
        ("[]", r"the list is empty"),
        (f"[{LITE}, {LITE}]", r"'efficientnet_lite0' is given twice"),
        ("[classifier, resnet56_cifar1]", r"'resnet56_cifar1' is unknown. Did you mean 'resnet56_"),
    ):
        with pytest.raises(ConfigError, match=rf"^evaluation\.extractor = .*{says}"):
            typed(f"evaluation.extractor={wrong}")


def test_a_configuration_of_several_judges_survives_its_file() -> None:
    given = {"evaluation.extractor": [LITE, RESNET], "evaluation.weights": {RESNET: "/a"}}
    config = load_config("digits", given)
    assert build_config(config.to_dict()) == config
    assert load_config("digits").to_dict()["evaluation"]["extractor"] == "classifier"


def test_several_judges_give_what_each_gives_alone(digits: ImageSet) -> None:
    real, images = digits.subset(range(400)), digits.images[400:460]
    own = "examples.own_judge:Spectrum"
    alone = {
        name: evaluate(images, real, EvaluationConfig(extractor=name), seed=0, nfe=1)
        for name in ("classifier", own)
    }
    assert alone[own]["others"] == {}
    both = EvaluationConfig(extractor=["classifier", own])
    together = evaluate(images, real, both, seed=0, nfe=1)
    others = together.pop("others")
    assert together == {key: alone["classifier"][key] for key in together}
    assert others == {own: {key: alone[own][key] for key in JUDGED}}


def test_a_judge_without_figures_costs_no_other_judges(digits: ImageSet) -> None:
    unlabelled = ImageSet(digits.images[:20], None)
    own = "examples.own_judge:Spectrum"
    config = EvaluationConfig(extractor=["classifier", own])
    found = evaluate(digits.images[20:40], unlabelled, config, seed=0, nfe=1)
    assert found["fid"] is None
    assert "needs labels" in found["why"]
    assert found["others"][own]["fid"] > 0
    assert found["others"][own]["why"] is None
