"""Latent diffusion: images are encoded once, the network sees latents, samples are decoded."""

import shutil

import numpy as np
import pytest
import torch

from fed_diffusion.build import Setup, with_start
from fed_diffusion.checks import check_training
from fed_diffusion.client import latents
from fed_diffusion.client.images import ClientImages
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data import to_unit
from fed_diffusion.engines.local import simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.export.folder import export
from fed_diffusion.generate import Sampler
from fed_diffusion.models import latent
from fed_diffusion.store.rundir import RunDir
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.models.pipelines import SHAPE, autoencoder, save_pipeline
from tests.models.test_from_diffusers import models
from tests.test_engines import same_bits
from tests.tiny import TINY


def test_an_autoencoder_without_the_package_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(latent, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model\.vae needs .*pip install 'fed-diffusion\[diff"):
        check_training(load_config("digits", TINY | {"model.vae": "some/thing"}))


@pytest.mark.parametrize("change", [{"data.flip": True}, {"data.augment": ["ColorJitter"]}])
def test_changes_of_images_in_each_step_are_refused_with_an_autoencoder(change):
    with pytest.raises(ConfigError, match=r"with model\.vae they are encoded once"):
        load_config("digits", TINY | {"model.vae": "some/thing"} | change)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An autoencoder for grey images whose latents have 2 channels and half the side."""
    torch.manual_seed(0)
    made = autoencoder(latent_channels=2, scaling_factor=0.7, shift_factor=0.1)
    path = tmp_path_factory.mktemp("vae") / "vae"
    made.save_pretrained(path)
    return path


def config(vae, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("digits", TINY | {"model.vae": str(vae)} | dotted)


@models
def test_clients_train_on_the_scaled_means_of_the_posterior(vae, digits):
    import diffusers

    setup = Setup.of(config(vae))
    assert (setup.pixels, setup.shape, setup.d) == ((1, 8, 8), (2, 4, 4), 32)
    few = digits.subset(range(100))
    images = ClientImages(setup, few, own=True)
    seen, _ = images.plain(torch.arange(100))
    theirs = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        mean = theirs.encode(to_unit(few.images)).latent_dist.mean
    torch.testing.assert_close(seen, (mean - 0.1) * 0.7, atol=1e-5, rtol=1e-5)
    train = images.of(0).train
    assert images.second_moment(0) == pytest.approx(
        float(seen[train].double().square().sum()) / len(train)
    )


@models
def test_samples_are_decoded_latents(vae):
    setup = Setup.of(config(vae))
    sampler = Sampler(setup, setup.theta())
    made = sampler.sample(3, seed=1)
    assert made.shape == (3, 1, 8, 8)
    assert made.dtype == torch.uint8
    y = torch.randn(3, 2, 4, 4)
    import diffusers

    theirs = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        expected = theirs.decode(y / 0.7 + 0.1).sample
        found = setup.autoencoder.decode(y)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@models
def test_a_run_on_latents_is_the_same_bits_on_flower_where_a_node_has_its_own_copy(vae, tmp_path):
    settings = config(vae, clients=2, model__conditional=True)
    results = simulate(settings, tmp_path / "local", processes=1)
    assert results["loss"] > 0
    run = RunDir.open(tmp_path / "local")
    assert run.config().model.vae_hash == with_start(settings).model.vae_hash is not None
    copied = shutil.copytree(vae, tmp_path / "copy")
    nodes = [{"partition-id": n, "num-partitions": 2, "warm-seconds": 0} for n in range(2)]
    nodes[1]["vae"] = str(copied)
    FedDiffusion(Experiment(settings, tmp_path / "flower")).run(LocalGrid(nodes))
    assert same_bits(tmp_path / "local", tmp_path / "flower")
    assert (run.path / "samples" / "final.png").is_file()


@models
def test_latents_are_encoded_once_on_a_machine(vae, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "1")
    few, setup = digits.subset(range(70)), Setup.of(config(vae))
    first = latents.encoded(setup, few)
    monkeypatch.setattr(setup.autoencoder, "encode", lambda images: 1 / 0)
    assert torch.equal(latents.encoded(setup, few), first)
    with pytest.raises(ZeroDivisionError):
        latents.encoded(setup, digits.subset(range(69)))


@models
def test_two_sets_of_images_do_not_drive_each_others_latents_out(
    vae, digits, tmp_path, monkeypatch
):
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "1")
    few = [digits.subset(range(70)), digits.subset(range(70, 140))]
    setups = [Setup.of(config(vae, data__dir=str(tmp_path / name))) for name in "ab"]
    for _ in range(2):
        for setup, images in zip(setups, few, strict=True):
            latents.encoded(setup, images)
            monkeypatch.setattr(setup.autoencoder, "encode", lambda images: 1 / 0)


@models
def test_another_autoencoder_than_the_runs_is_refused(vae, tmp_path):
    from safetensors.torch import load_file, save_file

    noted = with_start(config(vae))
    copied = shutil.copytree(vae, tmp_path / "copy")
    file = copied / "diffusion_pytorch_model.safetensors"
    save_file({n: v + 1 for n, v in load_file(file).items()}, file, {"format": "pt"})
    other = noted.model.model_copy(update={"vae": str(copied)})
    with pytest.raises(ConfigError, match=r"another autoencoder than model\.vae_hash"):
        Worker(noted.model_copy(update={"model": other}))


@models
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vae": "./nowhere"}, r"holds no AutoencoderKL"),
        ({"data__name": "cifar10"}, r"for images of 1 channels, and the images have 3"),
        ({"data__pad": 9}, r"data\.size = 9 is not a multiple of 2"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(vae, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_training(load_config("digits", TINY | {"model.vae": str(vae)} | dots(changes)))


def dots(changes):
    return {key.replace("__", "."): value for key, value in changes.items()}


@models
def test_a_pipeline_of_latent_diffusion_samples_with_diffusers_alone(vae, tmp_path):
    import diffusers

    changes = {"in_channels": 2, "out_channels": 2, "sample_size": 4}
    save_pipeline(tmp_path / "in", **SHAPE | changes)
    named = {"model.name": "diffusers", "model.pretrained": str(tmp_path / "in"), "clients": 2}
    settings = load_config("digits", TINY | {"model.vae": str(vae)} | named)
    simulate(settings, tmp_path / "run", processes=1)
    folder = export(RunDir.open(tmp_path / "run"), tmp_path / "out")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(batch_size=2, num_inference_steps=2, output_type="np").images
    assert np.asarray(made).shape == (2, 8, 8, 1)
    ours = Setup.of(settings).autoencoder.values()
    theirs = pipe.vqvae.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
