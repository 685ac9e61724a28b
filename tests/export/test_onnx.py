"""A run as an ONNX file: what ONNX Runtime computes with it is what torch computes."""

import json

import pytest
import torch

from fed_diffusion.build import Setup
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.export import onnx
from fed_diffusion.export.folder import export
from tests.export.test_export import untrained
from tests.models.pipelines import save_pipeline
from tests.models.test_from_diffusers import models
from tests.tiny import TINY

UNET = {"model.attention": [4], "model.head": 8, "evaluation.denoise": True}


def test_onnx_without_the_package_is_refused_with_the_command_that_installs_it(
    monkeypatch, tmp_path
):
    run = untrained(load_config("digits", TINY), tmp_path / "run")
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fed-diffusion\[onnx\]'"):
        export(run, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def agrees(config, run, folder):
    """Hold that the file gives torch's noise estimates to 1e-4, for batches of several sizes."""
    import onnxruntime

    model = onnxruntime.InferenceSession(folder / "model.onnx")
    setup = Setup.of(config)
    network = setup.network_with(run.load_theta(ema=False))
    draw = torch.Generator().manual_seed(4)
    for times in ([0.3], [0.002, 0.01, 0.5, 1.0, 4.0], [0.1] * 65):
        x = torch.randn((len(times), *setup.shape), generator=draw)
        u = torch.tensor(times, dtype=torch.float64)
        given = {"x": x, "u": u}
        if setup.classes is not None:  # the last of the labels stands for none
            given["labels"] = torch.arange(len(times)) % setup.classes
            given["labels"][-1] = setup.classes
        (theirs,) = model.run(None, {name: value.numpy() for name, value in given.items()})
        with torch.no_grad():
            mine = network(*given.values())
        apart = (torch.from_numpy(theirs) - mine).abs().max()
        assert float(apart) <= 1e-4 * max(1.0, float(mine.abs().max()))


@models
@pytest.mark.parametrize("conditional", [False, True])
def test_the_file_of_our_unet_computes_what_torch_does_for_any_number_of_images(
    conditional, tmp_path
):
    config = load_config("digits", TINY | UNET | {"model.conditional": conditional})
    run = untrained(config, tmp_path / "run")
    folder = export(run, tmp_path / "out", "onnx", "theta")
    agrees(config, run, folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("THIS FOLDER", str(folder)), found)
    assert found["x"].shape == (2, 1, 8, 8)
    assert str(tmp_path) not in (folder / "config.json").read_text()


@models
@pytest.mark.parametrize("changes", [{}, {"num_class_embeds": 11}])
def test_the_file_of_a_network_of_diffusers_does_so_too(changes, tmp_path):
    save_pipeline(tmp_path / "in", **changes)
    settings = {"model.name": "diffusers", "model.pretrained": str(tmp_path / "in")}
    settings |= {"model.conditional": bool(changes)}
    config = load_config("digits", TINY | settings)
    run = untrained(config, tmp_path / "run")
    agrees(config, run, export(run, tmp_path / "out", "onnx", "theta"))


@models
def test_the_file_of_an_adapter_is_the_base_with_the_adapter_in_it(tmp_path):
    base = untrained(load_config("digits", TINY), tmp_path / "base")
    config = load_config("digits", TINY | {"model.start": str(base.path), "lora.rank": 2})
    run = untrained(config, tmp_path / "run")
    folder = export(run, tmp_path / "out", "onnx", "theta")
    agrees(config, run, folder)
    assert (folder / "adapter").is_dir()
    assert json.loads((folder / "config.json").read_text())["times"][0] == pytest.approx(4.13)
