"""A trained run as files: what is in them is what was trained, and others can read it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.checks import check_training
from fed_diffusion.cli.main import main
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.diffusion.samplers import probability_flow
from fed_diffusion.experiment import Experiment
from fed_diffusion.export.folder import export
from fed_diffusion.generate import Sampler
from fed_diffusion.store.rundir import RunDir
from tests.models.pipelines import save_pipeline
from tests.models.test_from_diffusers import models
from tests.tiny import TINY


def untrained(config, path):
    """A run directory whose first round is done and has changed nothing but `theta`, by 1."""
    experiment = Experiment(config, path)
    coordinator, run = experiment.coordinator, experiment.run
    state = run.load_checkpoint().state | {"round": 1}
    tensors = dict(coordinator.tensors())
    tensors["theta"] = {name: value + 1 for name, value in tensors["theta"].items()}
    run.save_checkpoint(tensors, state)
    experiment.close()
    return run


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "run"
    return untrained(load_config("digits", TINY), path)


def test_the_tensors_are_those_of_the_run_and_start_another_one(ours, tmp_path):
    for weights in ("ema", "theta"):
        folder = export(ours, tmp_path / weights, weights=weights)
        there = load_file(folder / "model.safetensors")
        mine = ours.load_theta(ema=weights == "ema")
        assert there.keys() == mine.keys()
        assert all(torch.equal(there[name], mine[name]) for name in mine)
        start = str(folder / "model.safetensors")
        theta = parameters_of(build_network(load_config("digits", TINY | {"model.start": start})))
        assert all(torch.equal(theta[name], mine[name]) for name in mine)
    with pytest.raises(ConfigError, match=r"trained with model\.prediction = 'v'"):
        check_training(
            load_config("digits", TINY | {"model.start": start, "model.prediction": "eps"})
        )


def test_the_command_says_where_the_files_are_and_describes_the_network(ours, tmp_path, capsys):
    assert main(["export", str(ours.path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["model"]["widths"] == [8, 16]
    assert about["images"] == {"channels": 1, "size": 8, "classes": 10}
    assert about["weights"] == "ema"


def test_the_card_says_how_it_was_trained_and_names_no_path(tiny, tmp_path):
    first = untrained(tiny(), tmp_path / "first")
    run = untrained(tiny(model__start=str(first.path), clients=3, seed=7), tmp_path / "second")
    folder = export(run, tmp_path / "out")
    card = (folder / "README.md").read_text()
    sha = run.config().model.start_hash
    for words in ("Clients: 3", "Seed: 7", "digits, 1 x 8 x 8", f"first, SHA-256 {sha}"):
        assert words in card
    assert "no differential privacy" in card
    assert str(tmp_path) not in card + (folder / "config.json").read_text()


def test_the_card_says_all_that_a_local_step_does(tiny, tmp_path):
    own = {"optimizer": "adamw", "state": "shared", "weight_decay": 0.1, "max_grad_norm": 2.5}
    run = untrained(tiny(**{f"local__{k}": v for k, v in own.items()}), tmp_path / "run")
    card = " ".join((export(run, tmp_path / "out") / "README.md").read_text().split())
    for words in ("adamw", "moments shared", "weight decay 0.1", "gradients of norm 2.5 at most"):
        assert words in card


def test_the_card_of_a_private_run_says_what_the_guarantee_leaves_out(tiny, tmp_path):
    first = untrained(tiny(), tmp_path / "first")
    private = tiny(
        model__start=str(first.path),
        privacy__clip=1.0,
        privacy__noise_multiplier=1.0,
        wire__differences=True,
        round__norm_factor=None,
    )
    run = untrained(private, tmp_path / "run")
    spent = {"epsilon": 3.0, "delta": 1e-5, "covers": "theta"}
    results = {"privacy": spent, "loss": 1.0, "quality": {"fid": None, "why": "no samples"}}
    (run.path / "results.json").write_text(json.dumps(results))
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "epsilon = 3 at delta = 1e-05" in card
    assert "the images that the start was trained on are no part" in card
    assert "FID: not measured: no samples" in card


def test_a_folder_that_holds_something_and_a_format_that_cannot_be_are_refused(ours, tmp_path):
    own = untrained(
        load_config("digits", TINY | {"model.name": "examples.own_network:Plain"}), tmp_path / "own"
    )
    with pytest.raises(ConfigError, match=r"examples.own_network:Plain'; use --format safetensors"):
        export(own, tmp_path / "new", "diffusers")
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").write_text("mine")
    for folder in (tmp_path, tmp_path / "kept"):
        with pytest.raises(ConfigError, match="is not empty"):
            export(ours, folder)
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_run_without_a_finished_round_is_refused(tiny, tmp_path):
    Experiment(tiny(), tmp_path / "run").close()
    with pytest.raises(ConfigError, match="no round is finished"):
        export(RunDir.open(tmp_path / "run"), tmp_path / "out")


@models
@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_a_pipeline_that_came_in_goes_out_with_the_same_bits_and_samples(kind, tmp_path):
    import diffusers

    save_pipeline(tmp_path / "in", kind=kind, scheduler=diffusers.DDIMScheduler())
    settings = TINY | {"model.name": "diffusers", "model.pretrained": str(tmp_path / "in")}
    run = untrained(load_config("digits", settings), tmp_path / "run")
    folder = export(run, tmp_path / "out")
    there = diffusers.DiffusionPipeline.from_pretrained(folder)
    before = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "in")
    assert type(there) is type(before)
    assert type(there.scheduler) is type(before.scheduler)
    assert dict(there.scheduler.config) == dict(before.scheduler.config)
    old, new = before.unet.state_dict(), there.unet.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    there.set_progress_bar_config(disable=True)
    (image,) = there(num_inference_steps=2).images
    assert image.size == (8, 8)
    assert "DiffusionPipeline.from_pretrained" in (folder / "README.md").read_text()


@models
def test_diffusers_own_file_starts_a_run_and_our_samples_of_the_export_are_the_runs(tmp_path):
    save_pipeline(tmp_path / "in", num_class_embeds=11)
    named = TINY | {"model.name": "diffusers", "model.conditional": True}
    named |= {"model.label_dropout": 0.1, "model.pretrained": str(tmp_path / "in")}
    run = untrained(load_config("digits", named), tmp_path / "run")
    folder = export(run, tmp_path / "out", weights="theta")
    assert "class_labels" in (folder / "README.md").read_text()
    again = load_config("digits", named | {"model.pretrained": str(folder)})
    theta, mine = parameters_of(build_network(again)), run.load_theta(ema=False)
    assert all(torch.equal(theta[name], mine[name]) for name in mine)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    started = load_config("digits", named | {"model.start": str(file)})
    theta = parameters_of(build_network(started))
    assert all(torch.equal(theta[name], mine[name]) for name in mine)
    one, two = (Sampler(config, mine).sample(4, seed=1) for config in (again, started))
    assert torch.equal(one, two)


@models
def test_the_card_of_a_conditional_pipeline_has_code_that_runs(tmp_path):
    save_pipeline(tmp_path / "in", num_class_embeds=10)
    named = TINY | {"model.name": "diffusers", "model.conditional": True}
    named |= {"model.pretrained": str(tmp_path / "in"), "model.label_dropout": 0}
    run = untrained(load_config("digits", named), tmp_path / "run")
    folder = export(run, tmp_path / "out")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("THIS FOLDER", str(folder)).replace("(100)", "(2)"), found)
    assert found["x"].shape == (2, 1, 8, 8)


@models
def test_a_run_of_diffusers_is_exported_as_tensors_too(tmp_path):
    save_pipeline(tmp_path / "in")
    settings = TINY | {"model.name": "diffusers", "model.pretrained": str(tmp_path / "in")}
    run = untrained(load_config("digits", settings), tmp_path / "run")
    folder = export(run, tmp_path / "out", "safetensors")
    file = str(folder / "model.safetensors")
    check_training(load_config("digits", settings | {"model.start": file}))
    assert str(tmp_path) not in (folder / "config.json").read_text()


@models
@pytest.mark.parametrize("conditional", [False, True])
def test_our_unet_becomes_a_pipeline_that_samples_as_we_do_where_we_are_not_installed(
    conditional, tmp_path
):
    """Another process, which cannot import us, makes the images from the same noise."""
    settings = {"model.attention": [4], "model.head": 8, "evaluation.denoise": True}
    config = load_config("digits", TINY | settings | {"model.conditional": conditional})
    run = untrained(config, tmp_path / "run")
    folder = export(run, tmp_path / "out", "diffusers", "theta")
    noise = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    labels = [3, 5] if conditional else None
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    code = f"""
import sys
sys.modules["fed_diffusion"] = None
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
folder = {str(folder)!r}
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
noise = load_file({str(tmp_path / "noise.safetensors")!r})["noise"]
x = pipe(2, labels={labels}, noise=noise, output_type="pt").images
assert pipe(1, labels={labels and [1]}).images[0].size == (8, 8)
save_file({{"x": x.contiguous()}}, {str(tmp_path / "x.safetensors")!r})
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "code")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0
    sampler = Sampler(config, run.load_theta(ema=False))
    score = sampler.score(None if labels is None else torch.tensor(labels))
    with torch.no_grad():
        mine = probability_flow(score, noise, sampler.partition(), denoise=True)
    theirs = load_file(tmp_path / "x.safetensors")["x"]
    torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)
    assert "custom_pipeline" in (folder / "README.md").read_text()
