"""A preset may take another one's settings, and changes them as typed settings would."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed_diffusion.build import skeleton
from fed_diffusion.config import ConfigError, build_config, load_config, load_preset, method_name


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_what_a_preset_does_not_say_is_as_in_the_one_it_extends(tmp_path: Path) -> None:
    mine = write(tmp_path, "extends: digits\nrounds: 3\nmodel: {widths: [8, 16]}\n")
    typed = load_config("digits", {"rounds": 3, "model.widths": [8, 16]})
    assert load_config(mine) == typed.model_copy(update={"preset": "mine"})
    assert load_config(mine, {"rounds": 4}).rounds == 4


def test_settings_that_exclude_one_another_are_changed_as_typed_ones(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "extends: digits\nlocal: {epochs: 2}\n"))
    assert (config.local.steps, config.local.epochs) == (None, 2)
    config = load_config(write(tmp_path, "extends: digits-unequal\npruning: {kind: topk}\n"))
    assert (config.pruning.kind, config.pruning.choice) == ("topk", "ordered")
    config = load_config(write(tmp_path, "extends: digits\nmethod: T-FedDM-S\n"))
    assert method_name(config) == "T-FedDM-S"
    write(tmp_path, "extends: digits\nmethod: R-FedDM-L\n", "base.yaml")
    config = load_config(write(tmp_path, "extends: base.yaml\npruning: {level: S}\n"))
    assert (method_name(config), config.method) == ("R-FedDM-S", None)


def test_a_file_is_found_from_the_one_that_extends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "extends: sub/b.yaml\nrounds: 3\n", "a.yaml")
    write(tmp_path / "sub", "extends: ../c.yaml\nrounds: 2\nclients: 2\n", "b.yaml")
    write(tmp_path, "extends: digits\nclients: 4\nseed: 5\n", "c.yaml")
    monkeypatch.chdir("/")
    config = load_config(str(tmp_path / "a.yaml"))
    assert (config.rounds, config.clients, config.seed, config.preset) == (3, 2, 5, "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: digit\n", r"'digit' does not exist \(.*mine\.yaml extends it\)\. Did you mean"),
        ("extends: mine.yaml\n", r"extends itself: .*mine\.yaml extends .*mine\.yaml"),
        ("extends: [digits]\n", r"extends = \['digits'\] is not allowed"),
        ("extends: absent.yaml\n", r"absent\.yaml cannot be read"),
        ("extends: digits\nrounds_: 2\n", r"rounds_ is not a setting\. Did you mean rounds"),
        ("extends: digits\nmodel: {width: [8]}\n", r"model\.width is not .*model\.widths"),
        ("extends: digits\nmodel: 3\n", r"model = .*give a section"),
        (
            "extends: digits\nmethod: R-FedDM-S\npruning: {level: M}\n",
            r"pruning\.level = 'M' contradicts",
        ),
        ("preset: digits\nrounds: 3\n", r"'digits' has no effect .* write extends: digits"),
        ("preset: digits\nextends: digits\n", r"'digits' has no effect"),
    ],
)
def test_what_cannot_be_extended_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(write(tmp_path, text))


def test_a_preset_among_the_settings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"preset = 'cifar10' has no effect among the settings"):
        load_config("digits", {"preset": "cifar10"})


def test_the_config_of_a_run_keeps_the_name_that_it_was_started_as(tmp_path: Path) -> None:
    config = load_config("digits", {"rounds": 3})
    path = write(tmp_path, config.to_yaml(), "config.yaml")
    assert build_config(load_preset(path)) == config


def test_photos_is_about_a_million_parameters_and_needs_a_folder_alone(tmp_path: Path) -> None:
    config = load_config("photos", {"data.dir": str(tmp_path)})
    assert not config.model.conditional
    assert 0.9e6 < sum(p.numel() for p in skeleton(config).parameters()) < 1.1e6
    scaled = load_config("photos", {"model.widths": [32, 64, 96, 128]})
    assert sum(p.numel() for p in skeleton(scaled).parameters()) > 3e6
