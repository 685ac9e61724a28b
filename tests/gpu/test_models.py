"""Networks of diffusers, adapters, latents and text on a GPU; without one, on the CPU."""

from __future__ import annotations

import pytest
import torch

from fed_diffusion.build import Setup
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import load_config
from fed_diffusion.engines.local import run_in_process
from fed_diffusion.experiment import Experiment
from fed_diffusion.server.coordinator import Coordinator
from tests.models.pipelines import autoencoder, save_pipeline, save_text_pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.models]
SMALL = {
    "clients": 3,
    "rounds": 2,
    "local.steps": 2,
    "local.batch": 8,
    "diffusion.K": 20,
    "evaluation.samples": 40,
    "evaluation.steps": 10,
    "evaluation.every": 0,
    "theory.every": 0,
}
RANKS = {"lora.rank": 4, "lora.alpha": 8, "pruning.kind": "ranks", "pruning.keep": [1, 0.5, 0.25]}


def pretrained(folder):
    return {"model.name": "diffusers", "model.pretrained": str(save_pipeline(folder / "pipeline"))}


def latent(folder):
    torch.manual_seed(0)
    autoencoder(latent_channels=2, scaling_factor=0.7).save_pretrained(folder / "vae")
    return {"model.vae": str(folder / "vae"), "model.widths": [8, 16]}


def text(folder):
    pipeline = str(save_text_pipeline(folder / "text"))
    return {
        "model.name": "diffusers",
        "model.pretrained": pipeline,
        "model.vae": pipeline,
        "model.text": pipeline,
        "model.conditional": False,
        "data.caption": "a photo of a {}",
        "evaluation.prompts": ["a photo of a 3"],
    }


def adapter(folder):
    return text(folder) | RANKS | {"lora.base": "bf16"}


@pytest.mark.parametrize(
    "kind", [pretrained, latent, text, adapter], ids=lambda kind: kind.__name__
)
def test_a_network_that_people_have_trains_to_figures_and_twice_to_the_same_bits(kind, tmp_path):
    config = load_config("digits", SMALL | {"model.conditional": False} | kind(tmp_path))
    results = run_in_process(Experiment(config, tmp_path / "run"), processes=1)
    assert results["quality"]["fid"] > 0
    first, second = (one_round(config) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def one_round(config):
    setup = Setup.of(config)
    coordinator = Coordinator(setup, setup.theta())
    worker = Worker(setup)
    for task in coordinator.tasks(1):
        assert coordinator.receive(worker.run(task))
    coordinator.close_round()
    return coordinator.theta
