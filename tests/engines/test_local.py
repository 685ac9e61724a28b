"""Whole runs in one process or several."""

import json

import pytest
import torch
from PIL import Image

import fed_diffusion
from fed_diffusion import generate as runs
from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import pinned_threads
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.common.rng import Purpose
from fed_diffusion.config import ConfigError
from fed_diffusion.data import ImageSet
from fed_diffusion.engines.local import simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir, Sampler


def test_the_number_of_processes_changes_no_bit(tiny, tmp_path):
    config = tiny(method="R-FedDM-S")
    simulate(config, tmp_path / "one", processes=1)
    simulate(config, tmp_path / "two", processes=2)
    for ema in (False, True):
        one, two = (RunDir.open(tmp_path / d).load_theta(ema=ema) for d in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from fed_diffusion.config import load_config
    from tests.tiny import TINY

    path = tmp_path_factory.mktemp("runs") / "run"
    lines = []
    overrides = TINY | {"method": "T-FedDM-S", "evaluation.samples": 60}
    overrides["evaluation.extractor"] = "classifier"
    results = simulate(load_config("digits", overrides), path, processes=1, progress=lines.append)
    return path, results, lines


def test_a_run_leaves_everything_the_design_names(run):
    path, results, lines = run
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "checkpoint/theta.safetensors",
        "checkpoint/ema.safetensors",
        "samples/round-0001.png",
        "samples/final.png",
        "results.json",
        "report.html",
    ):
        assert (path / name).is_file(), name
    assert json.loads((path / "results.json").read_text()) == results
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    assert [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()] == lines


def test_results_hold_the_promised_figures(run):
    _, results, lines = run
    assert results["method"] == "T-FedDM-S"
    assert (results["clients"], results["rounds"], results["seed"]) == (5, 2, 0)
    assert results["gamma_star"] == 3  # S of 5 workers: 3 full, 2 drop the same coordinates
    assert results["w2_max"] > 0
    assert results["bytes_up"] == sum(line["bytes_up"] for line in lines)
    assert set(results["seconds"]) == {"train", "aggregate", "evaluate", "total"}
    quality = results["quality"]
    assert quality["samples"] == 60
    assert quality["nfe"] == 10
    assert len(quality["inception_score"]) == 2
    assert quality["fid"] > quality["fid_floor"] > 0


def test_a_loaded_run_samples_the_same_images_for_the_same_seed(run):
    model = fed_diffusion.load(run[0])
    first, second = model.sample(3, seed=5), model.sample(3, seed=5)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, second)
    assert not torch.equal(first, model.sample(3, seed=6))


@pytest.fixture
def conditional(tiny):
    """A sampler whose untrained network tells labels apart."""
    config = tiny(model__conditional=True, model__label_dropout=0.1)
    model = Sampler(config, parameters_of(build_network(config)))
    random = torch.Generator().manual_seed(0)
    for parameter in model.network.parameters():
        if not parameter.any():  # layers that start at zero would hide the label
            parameter.data.normal_(std=0.1, generator=random)
    return model


def test_a_conditional_network_samples_every_class_in_turn_unless_told(conditional):
    in_turn = torch.arange(12) % 10
    images = conditional.sample(12)
    assert torch.equal(images, conditional.sample(12, labels=in_turn))
    assert not torch.equal(images, conditional.sample(12, labels=in_turn.flip(0)))


@torch.no_grad()
def test_guidance_moves_the_noise_estimate_away_from_that_without_a_label(conditional):
    y, u = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    labels = torch.tensor([3, 0, 9])
    sigma = (1 - torch.exp(-2 * u)).sqrt().float()[:, None, None, None]
    told, untold = conditional.network(y, u, labels), conditional.network(y, u)
    assert (told - untold).abs().max() > 1e-3
    for w in (0.0, 0.5, 3.0):
        want = -((1 + w) * told - w * untold) / sigma
        torch.testing.assert_close(conditional.score(labels, w)(y, u), want, rtol=1e-4, atol=1e-4)


def test_guidance_is_one_call_of_the_network_and_two_evaluations_an_image(conditional):
    sizes = []
    conditional.network.register_forward_hook(lambda m, inputs, out: sizes.append(len(inputs[0])))
    conditional.sample(2, steps=8)
    plain = list(sizes)
    sizes.clear()
    conditional.sample(2, steps=8, guidance=1.5)
    assert (plain, sizes) == ([2] * 8, [4] * 8)
    assert conditional.evaluations(8) == sum(plain) / 2
    assert conditional.evaluations(8, guidance=1.5) == sum(sizes) / 2


def test_guidance_of_zero_is_the_plain_sampler_to_the_bit(conditional):
    assert torch.equal(conditional.sample(3, guidance=0.0), conditional.sample(3))
    assert not torch.equal(conditional.sample(3, guidance=2.0), conditional.sample(3))


def test_a_sampler_or_partition_that_is_named_is_the_one_of_the_settings(conditional, tiny):
    overrides = {"evaluation__sampler": "second_order", "diffusion__partition": "geometric"}
    config = tiny(model__conditional=True, model__label_dropout=0.1, **overrides)
    other = Sampler(config, parameters_of(conditional.network))
    named = conditional.sample(3, sampler="second_order", partition="geometric")
    assert torch.equal(named, other.sample(3))
    assert not torch.equal(named, conditional.sample(3))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"sampler": "euler"}, r"evaluation\.sampler = 'euler'"),
        ({"partition": "evenly"}, r"diffusion\.partition = 'evenly'"),
        ({"partition": "ddpm_linear", "steps": 0}, r"evaluation\.steps = 0"),
        ({"labels": torch.tensor([0, 10])}, r"labels = \[10\].*0 to 9"),
        ({"labels": torch.tensor([0, -1])}, r"labels = \[-1\].*0 to 9"),
        ({"labels": torch.tensor([0])}, r"labels: 1 for 2 images"),
    ],
)
def test_what_cannot_be_sampled_is_refused(conditional, settings, key):
    with pytest.raises(ConfigError, match=key):
        conditional.sample(2, **settings)


def test_guidance_and_labels_are_refused_where_none_were_trained(run):
    model = fed_diffusion.load(run[0])
    with pytest.raises(ConfigError, match=r"model\.label_dropout"):
        model.sample(2, guidance=1.0)
    with pytest.raises(ConfigError, match=r"model\.conditional"):
        model.sample(2, labels=torch.tensor([0, 1]))


def test_images_do_not_depend_on_how_many_are_made_beside_them(run):
    model = fed_diffusion.load(run[0])
    assert torch.equal(model.sample(8, batch=4)[:4], model.sample(4, batch=4))


@pytest.mark.parametrize(("cores", "free", "threads"), [(4, 1e12, 3), (2, 1e12, 2), (4, 0.0, 1)])
def test_images_do_not_depend_on_the_cores_and_the_memory_that_make_them(
    run, cores, free, threads, monkeypatch
):
    model = fed_diffusion.load(run[0])
    images = model.sample(20, batch=8)
    made, pool = [], runs.batches_at_once
    monkeypatch.setattr(runs, "usable_cores", lambda: cores)
    monkeypatch.setattr(runs, "memory_allowed", lambda: free)
    monkeypatch.setattr(
        runs, "batches_at_once", lambda device, n: made.append(n) or pool(device, n)
    )
    assert torch.equal(model.sample(20, batch=8), images)
    assert made == [threads]


def test_the_memory_of_a_batch_is_seen_before_many_are_made_at_once(tiny, monkeypatch):
    config = tiny(model__widths=[32, 64], model__conditional=True)
    model = Sampler(config, parameters_of(build_network(config)))

    def score(images):
        labels = torch.zeros(images, dtype=torch.int64)
        return model.score(labels)

    y, u = torch.zeros((512, *model.shape)), torch.ones(512, dtype=torch.float64)
    with torch.no_grad(), pinned_threads(1):
        score(512)(y, u)
        with peak_memory(model.device) as peak:
            score(512)(y, u)
            takes = peak()
        monkeypatch.setattr(runs, "usable_cores", lambda: 64)
        for batches in (0.5, 20):
            monkeypatch.setattr(runs, "memory_allowed", lambda n=batches: n * takes)
            made = runs._Batches(model, config, 512, 0, Purpose.SAMPLES)
            assert 1 <= made._at_once(score(64), 64, 64) <= max(1, 2 * batches)


def test_the_score_is_minus_eps_over_sigma(run):
    model = fed_diffusion.load(run[0])
    y, u = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 2.0], dtype=torch.float64)
    sigma = (1 - torch.exp(-2 * u)).sqrt().float()[:, None, None, None]
    with torch.no_grad():
        torch.testing.assert_close(model.score()(y, u), -model.network(y, u) / sigma)


def test_too_few_sampling_steps_are_refused(run):
    with pytest.raises(ConfigError, match=r"evaluation\.steps = 3"):
        fed_diffusion.load(run[0]).sample(1, steps=3)


def test_a_run_directory_is_never_overwritten(run, tiny):
    with pytest.raises(ConfigError, match="holds a run already"):
        simulate(tiny(), run[0])


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        fed_diffusion.load(tmp_path)


def test_without_reference_images_the_figures_are_null_and_say_why(tiny, tmp_path):
    config = tiny(evaluation__reference="none", evaluation__samples=4, rounds=1)
    quality = simulate(config, tmp_path / "run", processes=1)["quality"]
    assert quality["fid"] is None
    assert "evaluation.reference" in quality["why"]


def test_a_folder_of_images_serves_as_the_reference(tiny, digits, tmp_path):
    for i in range(300):
        folder = tmp_path / "real" / str(int(digits.labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(folder / f"{i}.png")
    config = tiny(evaluation__reference=str(tmp_path / "real"), evaluation__samples=40, rounds=1)
    quality = simulate(config, tmp_path / "run", processes=1)["quality"]
    assert quality["fid"] > 0
    assert "300" in quality["reference"]


def test_an_evaluation_that_fails_leaves_results_that_can_be_completed(tiny, tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr("fed_diffusion.evaluation.generated.measure", fail)
    with pytest.raises(MemoryError):
        simulate(tiny(rounds=1), tmp_path / "run", processes=1)
    quality = RunDir.open(tmp_path / "run").results()["quality"]
    assert quality["fid"] is None
    assert "fed-diffusion evaluate" in quality["why"]


def test_a_worker_that_fails_is_rejected_and_the_run_goes_on(tiny, tmp_path, monkeypatch):
    from fed_diffusion.client.worker import Worker

    healthy = Worker.run

    def run(self, task):
        if task.client == 1:
            raise MemoryError("no room")
        return healthy(self, task)

    monkeypatch.setattr(Worker, "run", run)
    results = simulate(tiny(rounds=1), tmp_path / "run", processes=1)
    assert (results["rejected"], results["gamma_star"]) == (1, 4)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["rejected"] == [{"client": 1, "reason": "MemoryError: no room", "fault": "server"}]


def test_more_clients_than_images_are_refused_before_training(tiny, tmp_path):
    with pytest.raises(ConfigError, match="clients"):
        simulate(tiny(clients=2000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_to_condition_on_are_missed_before_training(tiny, digits, tmp_path):
    bare = ImageSet(digits.images, name="bare")
    with pytest.raises(ConfigError, match=r"model\.conditional.*sub-folder per class"):
        Experiment(tiny(model__conditional=True), tmp_path / "run", bare)
    assert not (tmp_path / "run").exists()
