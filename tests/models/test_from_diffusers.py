"""Networks of diffusers against diffusers itself; without it, the message that says how to get it.

No test takes anything from the Hub: every network is made here.
"""

import importlib.util
import json
import shutil

import pytest
import torch

from fed_diffusion.build import Setup, build_network, parameters_of, time_grid, with_start
from fed_diffusion.checks import check_training
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError, build_config, load_config
from fed_diffusion.diffusion.loss import NoisyBatch
from fed_diffusion.diffusion.process import diffuse, per_image, sigma
from fed_diffusion.diffusion.samplers import probability_flow, second_order
from fed_diffusion.engines.local import simulate
from fed_diffusion.models import from_diffusers
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.store.rundir import RunDir
from tests.models.pipelines import SHAPE, save_pipeline
from tests.tiny import TINY

NAMED = TINY | {"model.name": "diffusers"}


def test_a_network_of_diffusers_without_the_package_is_refused_with_the_command_that_installs_it(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(from_diffusers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fed-diffusion\[diffusers\]'"):
        check_training(load_config("digits", NAMED | {"model.pretrained": str(tmp_path)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "diffusers"}, r"name.*needs a network"),
        ({"model.pretrained": "some/thing"}, r"set model\.name to diffusers"),
        ({"model.config": "unet.json"}, r"set model\.name to diffusers"),
        (
            {"model.name": "diffusers", "model.pretrained": "a/b", "model.config": "c.json"},
            r"model\.config.*give one",
        ),
        ({"model.start_hash": "0" * 64}, r"start_hash: nothing is named"),
        ({"model.name": "diffuser"}, r"Did you mean 'diffusers'"),
    ],
)
def test_settings_that_name_no_network_or_two_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_training(load_config("digits", TINY | changes))


def test_a_folder_that_is_there_is_a_path_and_other_names_are_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "ddpm").mkdir(parents=True)

    def read(name):
        return load_config("digits", NAMED | {"model.pretrained": name}).model.pretrained

    assert read("mine/ddpm") == str(tmp_path / "mine" / "ddpm")
    assert read("./gone") == str(tmp_path / "gone")
    assert read("google/ddpm-cifar10-32") == "google/ddpm-cifar10-32"


needs_diffusers = [
    pytest.mark.models,
    pytest.mark.skipif(
        importlib.util.find_spec("diffusers") is None, reason="needs the extra diffusers"
    ),
]


def models(test):
    """Marks of a test that needs diffusers."""
    for mark in needs_diffusers:
        test = mark(test)
    return test


def configured(folder, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("digits", NAMED | {"model.pretrained": str(folder)} | dotted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


def schedulers():
    import diffusers

    return {
        "linear": diffusers.DDPMScheduler(),
        "cosine": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "scaled, v": diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
        ),
        "sample": diffusers.DDPMScheduler(prediction_type="sample"),
        "zero snr": diffusers.DDIMScheduler(
            rescale_betas_zero_snr=True, prediction_type="v_prediction"
        ),
    }


@models
def test_an_imported_network_has_the_bits_of_the_pipelines_weights(folder):
    import diffusers

    theirs = diffusers.DDPMPipeline.from_pretrained(folder).unet.state_dict()
    ours = parameters_of(build_network(configured(folder)))
    assert {f"unet.{name}" for name in theirs} == ours.keys()
    assert all(torch.equal(ours[f"unet.{name}"], value) for name, value in theirs.items())


@models
def test_a_folder_of_a_network_alone_needs_a_scheduler_and_is_the_same_network_then(
    folder, tmp_path
):
    with pytest.raises(ConfigError, match=r"model\.scheduler"):
        check_training(configured(folder / "unet"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    alone = with_start(configured(folder / "unet", model__scheduler=str(scheduler)))
    whole = with_start(configured(folder))
    assert alone.model.network == whole.model.network
    assert alone.model.start_hash == whole.model.start_hash


@models
@pytest.mark.parametrize("name", ["linear", "cosine", "scaled, v", "sample", "zero snr"])
def test_the_loss_at_every_level_is_diffusers_training_loss_on_the_same_noise(name, tmp_path):
    """Theirs is on the output; of v our error is alpha times theirs, of x0 alpha / sigma times."""
    scheduler = schedulers()[name]
    save_pipeline(tmp_path, scheduler=scheduler)
    config = configured(tmp_path, diffusion__T=1.5)
    network = build_network(config).eval()
    bars = scheduler.alphas_cumprod.double()
    j = torch.arange(len(network.levels))
    noise = torch.Generator().manual_seed(1)
    x0 = torch.rand((len(j), 1, 8, 8), generator=noise) * 2 - 1
    eps = torch.randn(x0.shape, generator=noise)
    a, s = per_image(bars[j].sqrt(), x0), per_image((1 - bars[j]).sqrt(), x0)
    stands_for = scheduler.config.prediction_type
    target = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[stands_for]
    factor = {"epsilon": 1.0, "v_prediction": bars[j], "sample": bars[j] / (1 - bars[j])}[
        stands_for
    ]
    with torch.no_grad():
        out = network.unet(scheduler.add_noise(x0, eps, j), j).sample
        theirs = (out - target).square().mean((1, 2, 3)) * factor
        u = network.levels[j]
        ours = (network(diffuse(x0, eps, u), u) - eps).square().mean((1, 2, 3))
        whole = NoisyBatch(x0, u, eps).loss(network)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(whole.double(), theirs.double().mean(), rtol=1e-4, atol=1e-6)
    assert len(j) >= len(bars) - 1


@models
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_and_our_probability_flow_make_the_same_images_of_the_same_noise(
    prediction, steps, tmp_path
):
    import diffusers

    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=prediction)
    save_pipeline(tmp_path, scheduler=scheduler)
    network = build_network(configured(tmp_path)).eval()
    start = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    scheduler.set_timesteps(steps)
    theirs = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(network.unet(theirs, t).sample, t, theirs).prev_sample
        ours = probability_flow(
            lambda y, u: -network(y, u) / per_image(sigma(u), y),
            start,
            network.levels[scheduler.timesteps],
            denoise=True,
        )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@models
@pytest.mark.parametrize("steps", [20, 40])
def test_dpm_solver_and_our_second_order_make_the_same_images_of_the_same_noise(steps, tmp_path):
    import diffusers

    save_pipeline(tmp_path)
    network = build_network(configured(tmp_path)).eval()
    start = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    theirs = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(network.unet(theirs, t).sample, t, theirs).prev_sample
        ours = second_order(
            lambda y, u: -network(y, u) / per_image(sigma(u), y),
            start,
            network.levels[scheduler.timesteps],
            denoise=True,
        )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@models
def test_between_two_levels_the_network_is_asked_at_a_real_level(folder):
    network = build_network(configured(folder)).eval()
    asked = []
    hook = network.unet.register_forward_pre_hook(lambda module, given: asked.append(given[1]))
    u = (network.levels[[3, 700]] + network.levels[[4, 701]]) / 2
    network(torch.zeros(2, 1, 8, 8), u)
    hook.remove()
    (levels,) = asked
    assert 3 < levels[0] < 4
    assert 700 < levels[1] < 701


@models
def test_a_run_of_diffusers_trains_under_masks_and_its_config_rebuilds_it_without_the_files(
    tmp_path, digits
):
    folder = save_pipeline(tmp_path / "pipeline")
    config = configured(
        folder, pruning__kind="random", pruning__level="S", model__label_dropout=0.0
    )
    done = simulate(config, out=tmp_path / "run", processes=1)
    assert done["loss"] > 0
    shutil.rmtree(folder)
    found = RunDir.open(tmp_path / "run")
    stored = build_config(json.loads(json.dumps(found.config().to_dict())))  # as a node gets it
    assert stored.model.start_hash == done["start"]["sha256"]
    theta = found.load_theta(ema=False)
    rebuilt = parameters_of(Setup.of(stored).network_with(theta))
    assert all(torch.equal(rebuilt[name], theta[name]) for name in theta)
    worker = Worker(stored, digits)
    started = Coordinator(stored, theta)
    (task, *_) = started.tasks(1)
    assert worker.run(task).payload.numbers["loss"] > 0


@models
def test_a_new_network_of_a_configuration_has_the_levels_of_ddpm_and_the_models_prediction(
    tmp_path,
):
    file = tmp_path / "unet.json"
    file.write_text(json.dumps(SHAPE))
    config = load_config("digits", NAMED | {"model.config": str(file), "model.prediction": "x0"})
    check_training(config)
    noted = with_start(config)
    assert noted.model.start_hash is None
    assert noted.model.network["scheduler"]["prediction_type"] == "sample"
    file.unlink()
    again = build_config(noted.to_dict())
    first, second = parameters_of(build_network(noted)), parameters_of(build_network(again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(build_network(again).levels, -0.5 * bars.log(), rtol=1e-4, atol=1e-8)


@models
def test_labels_reach_a_class_conditional_network_and_the_last_is_no_label(tmp_path):
    folder = save_pipeline(tmp_path, num_class_embeds=11)
    config = configured(folder, model__conditional=True, model__label_dropout=0.1)
    check_training(config)
    network = build_network(config).eval()
    x, u = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 1.0], dtype=torch.float64)
    j = torch.stack([from_diffusers.level_of(one[None], network.levels)[0] for one in u])
    theirs = network.unet(x, j, class_labels=torch.tensor([3, 10])).sample
    torch.testing.assert_close(network(x, u, torch.tensor([3, 10])), theirs)
    torch.testing.assert_close(network(x, u)[1], theirs[1])


@models
@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ({"in_channels": 3}, {}, r"in_channels = 3.*1 channels"),
        ({"out_channels": 2}, {}, r"out_channels = 2"),
        ({"num_class_embeds": 10}, {}, r"model\.conditional=true"),
        ({}, {"model.conditional": True}, r"model\.conditional=false"),
        (
            {"num_class_embeds": 10},
            {"model.conditional": True, "model.label_dropout": 0.1},
            r"10 classes need 11",
        ),
        ({"time_embedding_type": "fourier"}, {}, r"time_embedding_type"),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 1000},
            {},
            r"time_embedding_type",
        ),
        ({"class_embed_type": "timestep"}, {}, r"class_embed_type"),
        ({}, {"diffusion.T": 6.0}, r"diffusion\.T = 6 is beyond.*to 5\.0"),
        ({}, {"diffusion.delta": 1e-5, "evaluation.steps": 20}, r"diffusion\.delta = 1e-05 is bey"),
        ({}, {"pruning.kind": "channels", "pruning.level": "S"}, r"built-in U-Net only"),
        ({}, {"pruning.kind": "topk", "pruning.level": "S", "pruning.baseline": "small"}, "small"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_training(tmp_path, network, changes, message):
    folder = save_pipeline(tmp_path, **network)
    config = load_config("digits", NAMED | {"model.pretrained": str(folder)} | changes)
    with pytest.raises(ConfigError, match=message):
        check_training(config)


@models
def test_a_scheduler_without_such_levels_is_refused(tmp_path):
    import diffusers

    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.ScoreSdeVeScheduler()):
        folder = save_pipeline(tmp_path / type(scheduler).__name__)
        file = tmp_path / "scheduler.json"
        file.write_text(
            json.dumps(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
        )
        with pytest.raises(ConfigError, match=r"model\.scheduler"):
            check_training(configured(folder, model__scheduler=str(file)))
    file.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match="no scheduler 'UNet2DModel'"):
        check_training(configured(folder, model__scheduler=str(file)))


@models
def test_a_folder_or_a_name_that_holds_no_network_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"is no folder"):
        check_training(configured(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"holds no UNet2DModel"):
        check_training(configured(tmp_path))


@models
def test_weights_that_are_missing_or_pickled_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_pipeline(tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    values = load_file(file)
    save_file({n: v for n, v in values.items() if n != "conv_in.bias"}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing keys: conv_in\.bias"):
        check_training(configured(folder))
    file.unlink()
    torch.save(values, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        check_training(configured(folder))


@models
def test_a_name_that_no_unet_knows_is_refused_in_a_configuration(tmp_path):
    file = tmp_path / "unet.json"
    file.write_text(json.dumps(SHAPE | {"layers": 3}))
    with pytest.raises(ConfigError, match=r"'layers' is no setting of a UNet2DModel"):
        check_training(load_config("digits", NAMED | {"model.config": str(file)}))
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"not JSON"):
        check_training(load_config("digits", NAMED | {"model.config": str(file)}))


@models
def test_weights_that_are_not_those_of_the_noted_hash_are_refused(folder):
    noted = with_start(configured(folder))
    other = noted.model.model_copy(update={"start_hash": "0" * 64})
    with pytest.raises(ConfigError, match=r"other values than model\.start_hash"):
        build_network(noted.model_copy(update={"model": other}))
    assert time_grid(noted.diffusion) is not None
