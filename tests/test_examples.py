"""Each example of an own part does what its docstring says, by the command that stands there."""

import importlib
import json
import shlex

import numpy as np
import pytest
import torch

import fed_diffusion as fd
from examples import own_aggregator, own_dataset, own_judge, own_mask, own_network, own_sampler
from examples.own_time_grid import karras
from fed_diffusion.build import build_network, parameters_of, time_grid
from fed_diffusion.checks import check_training
from fed_diffusion.cli.main import main
from fed_diffusion.data import partition
from fed_diffusion.diffusion.partitions import kappa_minimal
from fed_diffusion.engines import local
from fed_diffusion.experiment import Experiment
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.store.rundir import RunDir
from fed_diffusion.theory.gaussian import gaussian_score
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.test_engines import same_bits
from tests.tiny import TINY

SMALL = TINY | {"rounds": 1, "clients": 2, "local.steps": 2, "evaluation.every": 0}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)


def commands(name):
    """The commands in an example's docstring, each as its arguments."""
    text = importlib.import_module(f"examples.{name}").__doc__.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    fed-diffusion")]
    return [shlex.split(line)[1:] for line in lines]


def run_as_told(name, out, which=0, **settings):
    """Run an example's command, small; returns the run directory."""
    arguments = commands(name)[which]
    given = {word.partition("=")[0] for word in arguments}
    small = SMALL | {key.replace("__", "."): value for key, value in settings.items()}
    more = [f"{key}={value}" for key, value in small.items() if key not in given]
    for pair in more:
        arguments += ["--set", pair]
    assert main([*arguments, "--out", str(out)]) == 0
    return RunDir.open(out)


def test_the_sampler_runs_and_is_of_order_two(tmp_path):
    run = run_as_told("own_sampler", tmp_path / "run", **{"evaluation__samples": 0})
    assert run.config().evaluation.sampler == "examples.own_sampler:heun"
    # against the exact flow of a Gaussian N(mu, lam), whose marginals are known at every time
    mu, lam, T, delta = 0.4, torch.tensor([0.3]).double(), 2.0, 0.1
    score = gaussian_score(torch.tensor([mu]).double(), lam)
    start = torch.tensor([[1.7]], dtype=torch.float64)

    def variance(time):
        return np.exp(-2 * time) * float(lam) + 1 - np.exp(-2 * time)

    spread = np.sqrt(variance(delta) / variance(T))
    exact = np.exp(-delta) * mu + spread * (1.7 - np.exp(-T) * mu)
    errors = [
        abs(float(own_sampler.heun(score, start, kappa_minimal(T, delta, K))) - exact)
        for K in (50, 100)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_the_time_grid_is_the_runs_and_even_in_a_power_of_edms_noise_level(tmp_path):
    run = run_as_told("own_time_grid", tmp_path / "run")
    u = time_grid(run.config().diffusion)
    assert u.tolist() == karras(4.13, 1e-3, 20).tolist()
    assert (u[0], u[-1], len(u)) == (4.13, 1e-3, 21)
    levels = np.sqrt(np.exp(2 * u.numpy()) - 1) ** (1 / 7)
    assert np.diff(levels) == pytest.approx(np.full(20, (levels[-1] - levels[0]) / 20), rel=1e-6)


def test_the_data_set_is_what_the_clients_train_on(tmp_path):
    run = run_as_told("own_dataset", tmp_path / "run")
    data = run.results()["data"]
    half = own_dataset.COUNT // 2
    assert (data["images"], data["classes"]) == (2 * half, {"ring": half, "disc": half})
    dataset = own_dataset.shapes(run.config().data)
    dark = [int(dataset.images[i, 0, 4, 4]) for i in range(200)]
    assert np.mean(dark[0::2]) < np.mean(dark[1::2])  # rings have a hole where discs are white


@pytest.mark.parametrize("conditional", [False, True])
def test_the_network_is_what_is_trained_and_samples(tmp_path, conditional):
    run = run_as_told("own_network", tmp_path / "run", model__conditional=conditional)
    network = own_network.Plain(run.config().model, 1, 8, 10 if conditional else None)
    assert run.results()["parameters"] == sum(p.numel() for p in network.parameters())
    assert fd.load(run.path).sample(2).shape == (2, 1, 8, 8)


def test_the_split_gives_the_darkest_images_to_the_first_client(tmp_path, digits):
    run = run_as_told("own_split", tmp_path / "run", clients=3)
    config = run.config()
    parts = partition(digits, config.data, config.clients, config.seed)
    means = [digits.images[part].double().mean(dim=(1, 2, 3)) for part in parts]
    assert float(means[0].max()) <= float(means[1].min())
    assert float(means[1].max()) <= float(means[2].min())
    assert sorted(np.concatenate(parts)) == list(range(len(digits)))
    line = json.loads((run.path / "metrics.jsonl").read_text())
    assert len(line["clients"]) == 3


def test_the_judges_figures_carry_its_name_and_come_from_its_features(tmp_path, digits):
    run = run_as_told("own_judge", tmp_path / "run", evaluation__samples=40)
    quality = run.results()["quality"]
    judge = own_judge.Spectrum(run.config().evaluation, torch.device("cpu"))
    assert quality["extractor"] == "log spectrum (examples.own_judge:Spectrum)"
    assert (quality["extractor_sha256"], quality["why"]) == (judge.sha256, None)
    generated = fd.load(run.path).sample(40)
    ours, theirs = (judge(images)[0].double().numpy() for images in (generated, digits.images))
    a, b = np.cov(ours.T), np.cov(theirs.T)
    overlap = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    apart = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    fid = apart + np.trace(a) + np.trace(b) - 2 * overlap
    assert quality["fid"] == pytest.approx(fid, rel=1e-3)


def test_the_tracker_is_told_of_rounds_images_and_the_end(tmp_path):
    run = run_as_told("own_tracker", tmp_path / "run", which=1, rounds=2, evaluation__every=1)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    diary = (run.path / "diary.txt").read_text().splitlines()
    assert diary[0] == "digits, 2 rounds with 2 clients"
    assert diary[1:-1] == [f"round {n}: loss {lines[n - 1]['loss']:.4f}" for n in (1, 2)]
    assert diary[-1] == "FID None"
    assert torch.load(run.path / "diary-0001.pt", weights_only=True).shape == (16, 1, 8, 8)
    assert torch.load(run.path / "diary-0002.pt", weights_only=True).shape == (4, 1, 8, 8)
    assert len((run.path / "rounds.csv").read_text().splitlines()) == 3


def test_the_aggregator_moves_no_weight_by_more_than_it_says(tmp_path):
    run = run_as_told("own_aggregator", tmp_path / "run", **{"local__eta": 0.1})
    before, after = parameters_of(build_network(run.config())), run.load_theta(ema=False)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).abs()
    assert 0.9e-3 < float(moved.max()) <= 1e-3 + 2**-24
    theta = {"w": torch.zeros(3)}
    mean = own_aggregator.Cautious(theta, 2, run.config().round)
    mean.add({"w": torch.tensor([5e-4, -4.0])}, {"w": fd.Scattered(torch.tensor([1, 0, 1]) > 0)})
    mean.add({"w": torch.tensor([2e-4, 0.0, 3e-4])})
    assert mean.result()["w"].tolist() == pytest.approx([3.5e-4, 0, -3.5e-4], abs=2e-9)
    with pytest.raises(UpdateError, match="not finite"):
        mean.add({"w": torch.full((3,), torch.nan)})
    with pytest.raises(fd.ConfigError, match="every update counts alike"):
        check_training(fd.load_config("digits", ALL | {"round.weighting": "examples"}))


def test_the_masks_keep_the_largest_of_every_few_neighbours(tmp_path):
    for which, of, kept in ((0, 4, {1: 4, 0.5: 2, 0.25: 1}), (1, 2, {0.5: 1})):
        run = run_as_told("own_mask", tmp_path / f"run{which}", which, clients=5)
        config, theta = run.config(), run.load_theta(ema=False)
        keeps = dict(enumerate(keep for keep in kept if keep < 1))
        family = own_mask.Neighbours(config.pruning, 0)
        for recipe in family.plan(1, keeps, theta, None).values():
            for name, mask in family.derive(recipe, theta, None).items():
                groups = mask.bools.flatten()[: theta[name].numel() // of * of].view(-1, of)
                assert set(groups.sum(1).tolist()) == {kept[recipe.keep]}
                size = theta[name].abs().flatten()[: groups.numel()].view(-1, of)
                least = size.where(groups, torch.inf).amin(1)
                assert bool((size.where(~groups, -1).amax(1) <= least).all())
    with pytest.raises(fd.ConfigError, match="it has `of`, from 2 to 64"):
        check_training(fd.load_config("digits", ALL | {"pruning.options": {"of": 1}}))


def test_the_policy_asks_the_clients_in_turn(tmp_path):
    run = run_as_told("own_policy", tmp_path / "run", clients=4, rounds=3)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    asked = [[client["client"] for client in line["clients"]] for line in lines]
    assert asked == [[0, 1], [2, 3], [0, 1]]


def test_the_server_optimizer_moves_every_weight_by_the_same(tmp_path):
    run = run_as_told("own_server_optimizer", tmp_path / "run")
    assert run.config().server.optimizer == "examples.own_server_optimizer:Lion"
    before, after = parameters_of(build_network(run.config())), run.load_theta(ema=False)
    for name, value in before.items():
        moved = (after[name].double() - value.double()).abs()
        assert bool((((moved - 0.002).abs() < 1e-6) | (moved == 0)).all())
    assert set(run.load_checkpoint().tensors["server"]) == {f"m.{name}" for name in before}
    with pytest.raises(fd.ConfigError, match=r"every step has the size server\.eta"):
        check_training(fd.load_config("digits", ALL | {"server.eta": None}))


ALL = SMALL | {
    "server.optimizer": "examples.own_server_optimizer:Lion",
    "server.eta": 0.002,
    "pruning.kind": "examples.own_mask:Neighbours",
    "round.aggregation": "examples.own_aggregator:Cautious",
    "pruning.level": "S",
    "data.name": "examples.own_dataset:shapes",
    "data.size": 8,
    "data.channels": 1,
    "data.classes": 2,
    "data.partition": "examples.own_split:by_brightness",
    "model.name": "examples.own_network:Plain",
    "diffusion.partition": "examples.own_time_grid:karras",
    "evaluation.sampler": "examples.own_sampler:heun",
    "evaluation.samples": 20,
    "evaluation.reference": "data",
    "evaluation.extractor": "examples.own_judge:Spectrum",
    "round.mode": "examples.own_policy:Turns",
    "trackers": ["csv", "examples.own_tracker:Diary"],
}
SAME = ("loss", "holdout_loss", "bytes_up", "bytes_down", "gamma_star", "quality")


def alike(here, there):
    assert same_bits(here, there)
    one, two = RunDir(here).results(), RunDir(there).results()
    assert [one[key] for key in SAME] == [two[key] for key in SAME]
    for name in ("diary.txt", "diary-0001.pt"):
        assert (here / name).read_bytes() == (there / name).read_bytes()


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    path = tmp_path_factory.mktemp("all") / "run"
    local.simulate(fd.load_config("digits", ALL), path, processes=1)
    return path


def test_all_of_them_at_once_give_the_same_bits_through_flowers_messages(by_hand, tmp_path):
    experiment = Experiment(fd.load_config("digits", ALL), tmp_path / "run")
    nodes = [{"partition-id": n, "num-partitions": 2, "warm-seconds": 0} for n in range(2)]
    FedDiffusion(experiment).run(LocalGrid(nodes))
    alike(by_hand, tmp_path / "run")


@pytest.mark.slow
def test_all_of_them_at_once_give_the_same_bits_in_flowers_processes(by_hand, tmp_path):
    results = fd.run(fd.load_config("digits", ALL), tmp_path / "run", engine="flower")
    assert results == RunDir(tmp_path / "run").results()
    alike(by_hand, tmp_path / "run")
