"""Text as the condition: captions are embedded once, the network is told them, prompts sample."""

import json
import shutil

import pytest
import torch
from PIL import Image

from fed_diffusion.build import Setup, parameters_of
from fed_diffusion.checks import check, check_training
from fed_diffusion.client import texts
from fed_diffusion.client.images import ClientImages
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data import ImageSet, captions_of, content_hash, load_dataset
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.export.folder import export
from fed_diffusion.generate import Sampler
from fed_diffusion.models import text
from fed_diffusion.store.rundir import RunDir
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.models.pipelines import save_pipeline, save_text_pipeline
from tests.models.test_from_diffusers import models
from tests.test_engines import same_bits
from tests.tiny import TINY

PROMPTS = ["a photo of a 3", "a photo of a 7"]
NAMED = TINY | {
    "clients": 2,
    "model.name": "diffusers",
    "data.caption": "a photo of a {}",
    "evaluation.prompts": PROMPTS,
    "evaluation.grid": 2,
}


def test_text_without_the_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fed-diffusion\[text\]'"):
        text.width_of("some/thing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.prompts": []}, r"evaluation\.prompts.*needs texts to sample for"),
        ({"model.conditional": True}, r"text: captions are for a network of diffusers without"),
        ({"model.text": None}, r"evaluation\.prompts: it is for networks of text"),
    ],
)
def test_settings_of_text_that_do_not_go_together_are_refused(changes, message):
    given = {"model.text": "some/thing", "model.pretrained": "some/thing"}
    with pytest.raises(ConfigError, match=message):
        load_config("digits", NAMED | given | changes)


def folder_of_photos(root, lines):
    for n in range(4):
        Image.new("L", (8, 8), 40 * n).save(root / f"{n}.png")
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"data.name": "image_folder", "data.dir": str(root), "data.channels": 1}
    return load_config("digits", TINY | options | {"data.size": 8}).data


def test_captions_are_those_of_the_images_own_lines_and_part_of_what_a_run_depends_on(tmp_path):
    lines = [{"file_name": f"{n}.png", "text": f"shade {n}"} for n in (3, 1, 0, 2)]
    data = folder_of_photos(tmp_path, lines)
    dataset = load_dataset(data)
    assert captions_of(dataset, data) == [f"shade {n}" for n in range(4)]
    assert dataset.notes == ()
    assert dataset.subset([2, 0]).captions == ("shade 2", "shade 0")
    before = [content_hash(dataset, captions) for captions in (True, False)]
    folder_of_photos(tmp_path, [line | {"text": "grey"} for line in lines])
    after = [content_hash(load_dataset(data), captions) for captions in (True, False)]
    assert after[0] != before[0]
    assert after[1] == before[1]  # a run of images alone goes on


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('{"file_name": "0.png", "text": null}', ""),
        ('{"file_name": "0.png", "text": "  "}', ""),
        ('{"file_name": "0.png", "text": "a\u2028b\u0085c"}', "a\u2028b\u0085c"),
        ('\ufeff{"file_name": "0.png", "text": "a"}', "a"),
        ('{"file_name": "/elsewhere/0.png", "text": "mine"}', ""),
    ],
)
def test_only_text_beside_the_images_is_a_caption(tmp_path, line, caption):
    data = folder_of_photos(tmp_path, [])
    (tmp_path / "metadata.jsonl").write_text(line, "utf-8")
    found = load_dataset(data).captions
    assert (found or ("",))[0] == caption


@pytest.mark.parametrize("line", ['["a"]', '{"text": ["a"]}', "[" * 100_000, '{"text": "b"}'])
def test_a_broken_line_is_told_and_stops_no_run_that_reads_no_captions(tmp_path, line):
    data = folder_of_photos(tmp_path, [])
    (tmp_path / "metadata.jsonl").write_text(line)
    dataset = load_dataset(data)
    assert dataset.captions is None
    assert any("metadata.jsonl cannot be read (line 1" in note for note in dataset.notes)
    with pytest.raises(ConfigError, match="4 of 4 have none"):
        captions_of(dataset, data)


def test_images_without_a_caption_are_counted(tmp_path):
    data = folder_of_photos(tmp_path, [{"file_name": "0.png", "text": "black"}])
    with pytest.raises(ConfigError, match=r"3 of 4 have none.*data\.caption"):
        captions_of(load_dataset(data), data)


def test_a_template_names_the_class_of_each_image(digits):
    data = load_config("digits", TINY).data.model_copy(update={"caption": "a {}, written"})
    found = captions_of(digits.subset([0, 1]), data)
    assert found == ["a 0, written", "a 1, written"]
    plain = ImageSet(digits.images)
    with pytest.raises(ConfigError, match="have no classes"):
        captions_of(plain, data)
    assert captions_of(plain, data.model_copy(update={"caption": "a digit"}))[5] == "a digit"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return save_text_pipeline(tmp_path_factory.mktemp("text") / "pipe")


def config(pipe, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    whole = {f"model.{key}": str(pipe) for key in ("pretrained", "vae", "text")}
    return load_config("digits", NAMED | whole | dotted)


def loaded(folder, **options):
    import diffusers

    made = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    made.set_progress_bar_config(disable=True)
    return made


@models
def test_the_network_is_told_each_captions_embedding_as_the_pipeline_makes_it(pipe, digits):
    setup = Setup.of(config(pipe, model__label_dropout=0.5))
    few = digits.subset(range(100))
    images = ClientImages(setup, few, own=True)
    _, told = images.plain(torch.arange(100))
    theirs = loaded(pipe)
    captions = captions_of(few, setup.config.data)
    with torch.no_grad():
        wanted, empty = theirs.encode_prompt(captions, "cpu", 1, True)
    torch.testing.assert_close(told, wanted, atol=1e-5, rtol=1e-5)
    noise = torch.Generator().manual_seed(0)
    _, seen = images.batch(torch.arange(100), noise, None)
    gone = [torch.allclose(seen[i], empty[i], atol=1e-5) for i in range(100)]
    kept = [torch.allclose(seen[i], wanted[i], atol=1e-5) for i in range(100)]
    assert 30 < sum(gone) < 70
    assert [not one for one in gone] == kept


@models
def test_texts_are_embedded_once_on_a_machine(pipe, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "1")
    setup, few = Setup.of(config(pipe)), digits.subset(range(70))
    first = texts.embedded(setup, few)
    assert len(first.table) == 11
    monkeypatch.setattr(text.TextEncoder, "encode", lambda *arguments: 1 / 0)
    assert torch.equal(texts.embedded(setup, few).table, first.table)


@models
def test_guidance_is_that_of_the_pipeline_and_prompts_are_sampled_in_turn(pipe):
    setup = Setup.of(config(pipe))
    sampler = Sampler(setup, setup.theta())
    y, u = torch.randn(2, 4, 4, 4), torch.full((2,), 0.5, dtype=torch.float64)
    theirs = loaded(pipe)
    with torch.no_grad():
        texts, empty = theirs.encode_prompt(PROMPTS, "cpu", 1, True)
        with_text, without = (sampler.network(y, u, told) for told in (texts, empty))
        found = sampler.score(torch.tensor([0, 1]), 2.0)(y, u)
    wanted = -(3 * with_text - 2 * without) / torch.sqrt(-torch.expm1(-2 * u))[0].float()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.equal(with_text, without)
    both, first = sampler.sample(4, seed=1), sampler.sample(4, seed=1, labels=torch.zeros(4).long())
    assert both.shape == (4, 1, 8, 8)
    assert torch.equal(both[::2], first[::2])


@pytest.fixture(scope="module")
def run(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    simulate(config(pipe, lora__rank=2, evaluation__guidance=1.0), path, processes=1)
    return RunDir.open(path)


@models
def test_a_run_is_the_same_bits_on_flower_where_a_node_has_its_own_copy(pipe, run, tmp_path):
    copied = shutil.copytree(pipe, tmp_path / "copy")
    nodes = [{"partition-id": n, "num-partitions": 2, "warm-seconds": 0} for n in range(2)]
    nodes[1] |= {"vae": str(copied), "text": str(copied)}
    settings = config(pipe, lora__rank=2, evaluation__guidance=1.0)
    FedDiffusion(Experiment(settings, tmp_path / "flower")).run(LocalGrid(nodes))
    assert same_bits(run.path, tmp_path / "flower")
    assert run.config().model.text_hash is not None


@models
def test_a_resumed_run_ends_with_the_same_bits(pipe, run, tmp_path):
    from fed_diffusion.client.worker import Worker

    settings = config(pipe, lora__rank=2, evaluation__guidance=1.0)
    experiment = Experiment(settings, tmp_path / "run")
    worker = Worker(experiment.setup)
    for task in experiment.tasks(1):
        experiment.receive(worker.run(task))
    experiment.close_round()
    experiment.close()
    run_in_process(Experiment.resume(tmp_path / "run"), processes=1)
    assert same_bits(run.path, tmp_path / "run")


@models
def test_a_node_whose_text_encoder_is_another_one_is_refused(pipe, tmp_path):
    other = save_text_pipeline(tmp_path / "other", seed=1)
    nodes = [{"partition-id": n, "num-partitions": 2, "warm-seconds": 0} for n in range(2)]
    nodes[1]["text"] = str(other)
    experiment = Experiment(config(pipe), tmp_path / "run")
    ((_, _, reason), *_) = FedDiffusion(experiment)._meet(LocalGrid(nodes)).refusals(range(2))
    experiment.close()
    assert "is another text encoder or tokenizer than model.text_hash" in reason


@models
def test_the_exported_adapter_makes_of_the_base_what_the_exported_pipeline_is(pipe, run, tmp_path):
    """Both ways out give the network of the run, and the pipeline samples."""
    theta = {name: 0.1 * torch.randn_like(v) for name, v in run.load_theta(ema=False).items()}
    mine = Setup.of(run.config()).network_with(theta)
    checkpoint = run.load_checkpoint()
    folder = tmp_path / "out"
    run_copy = shutil.copytree(run.path, tmp_path / "copy")
    run_there = RunDir.open(run_copy)
    run_there.save_checkpoint(dict(checkpoint.tensors) | {"theta": theta}, checkpoint.state)
    export(run_there, folder, "diffusers", "theta")
    whole, base = loaded(folder), loaded(pipe)
    adapter = folder / "adapter"
    base.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
    x, u = torch.randn(2, 4, 4, 4), torch.full((2,), 0.5, dtype=torch.float64)
    from fed_diffusion.diffusion.levels import level_of

    with torch.no_grad():
        told = whole.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        wanted = mine(x, u, told)
        level = level_of(u, mine.levels)
        for made in (whole, base):
            found = made.unet(x, level, told).sample
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        plain = loaded(pipe).unet(x, level, told).sample
    assert float((plain - wanted).abs().max()) > 1e-2
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    given = {}
    code = code.replace("THIS FOLDER", str(folder)).replace("width=8", "width=8, output_type='np'")
    exec(code.replace("output_type", "num_inference_steps=2, output_type"), given)
    assert given["image"].shape == (8, 8, 1)


@models
def test_networks_and_encoders_that_do_not_fit_are_refused(pipe, tmp_path):
    with pytest.raises(ConfigError, match=r"conditioned on text .*model\.text"):
        check_training(config(pipe, model__text=None, data__caption=None, evaluation__prompts=[]))
    plain = save_pipeline(tmp_path / "plain", in_channels=4, out_channels=4)
    with pytest.raises(ConfigError, match="is for a UNet2DConditionModel"):
        check_training(config(pipe, model__pretrained=str(plain)))
    wide = save_text_pipeline(tmp_path / "wide", width=32)
    with pytest.raises(ConfigError, match=r"in 32 values.*cross_attention_dim = 16"):
        check_training(config(pipe, model__text=str(wide)))
    with pytest.raises(ConfigError, match=r"model\.text = .* holds no CLIPTextModel"):
        check_training(config(pipe, model__text=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="have none"):
        check(config(pipe, data__caption=None))


@models
def test_a_new_network_of_text_is_trained_whole_and_starts_as_the_configuration_says(
    pipe, tmp_path
):
    parts = pipe / "unet" / "config.json", pipe / "scheduler" / "scheduler_config.json"
    files = {"model__config": str(parts[0]), "model__scheduler": str(parts[1])}
    settings = config(pipe, model__pretrained=None, rounds=1, **files)
    results = simulate(settings, tmp_path / "run", processes=1)
    theta = parameters_of(Setup.of(settings).network())
    assert results["parameters"] == sum(value.numel() for value in theta.values())
    assert results["loss"] > 0
