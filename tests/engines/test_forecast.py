"""What a run is said to take is what it takes, as far as that can be known before."""

import time

import numpy as np
import pytest

from examples.own_judge import Spectrum
from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.cli.dry_run import size_lines
from fed_diffusion.data import partition, split_holdout
from fed_diffusion.engines import forecast as forecasting
from fed_diffusion.engines import local
from fed_diffusion.engines.forecast import Forecast, forecast, size_of
from fed_diffusion.engines.forecast_evaluation import evaluation_seconds
from fed_diffusion.engines.local import simulate
from fed_diffusion.engines.timing import makespan
from fed_diffusion.store.files import save_tensors

UNEQUAL = {"pruning__kind": "channels", "pruning__keep": [1, 1, 0.5, 0.5, 0.5]}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)


def test_the_sizes_are_those_of_the_network_and_of_the_split(tiny, digits):
    config = tiny(local__steps=None, local__epochs=3)
    size = size_of(config, digits)
    assert size.parameters == sum(p.numel() for p in build_network(config).parameters())
    parts = partition(digits, config.data, config.clients, config.seed)
    for client, part in zip(size.clients, parts, strict=True):
        train, held = split_holdout(part, config.data.holdout, config.seed, client.number)
        assert (client.train, client.holdout) == (len(train), len(held))
        counted = np.bincount(digits.labels.numpy()[train], minlength=10).tolist()
        assert list(client.labels.values()) == counted
        assert client.steps == 3 * -(-len(train) // 8)


def test_an_adapter_is_what_travels_and_its_base_is_counted_apart(tiny, digits, tmp_path):
    save_tensors(tmp_path / "base.safetensors", parameters_of(build_network(tiny())))
    config = tiny(lora__rank=2, model__start=str(tmp_path / "base.safetensors"))
    whole, size = size_of(tiny(), digits), size_of(config, digits)
    assert (whole.frozen, size.frozen) == (0, whole.parameters)
    assert size.parameters == sum(p.numel() for p in build_network(config).parameters())
    lines = dict(size_lines(config, size))
    assert lines["adapter"].startswith(f"{size.parameters:,} parameters")
    assert lines["base"].startswith(f"{whole.parameters:,} parameters")
    assert "adapter" not in dict(size_lines(tiny(), whole))


def test_multiply_adds_are_those_of_every_convolution_and_product(tiny, digits):
    network, counted = build_network(tiny()), 0

    def convolution(module, inputs, output):
        nonlocal counted
        counted += module.weight.numel() * output.shape[2] * output.shape[3] // module.groups

    def linear(module, inputs, output):
        nonlocal counted
        counted += module.weight.numel()

    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
    with torch.no_grad():
        network(torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.float64), None)
    # attention adds its two products, which no module holds
    assert counted <= size_of(tiny(), digits).macs <= 1.2 * counted


def test_the_bytes_and_ratios_of_a_round_are_the_run_s(tiny, digits, tmp_path):
    config = tiny(**UNEQUAL, rounds=1, evaluation__every=0)
    expected = forecast(config, digits)
    results = simulate(config, tmp_path / "run", processes=1)
    assert expected.keeps == {0.5: 3, 1.0: 2}
    assert expected.bytes_down == results["bytes_down"]
    assert expected.bytes_up == results["bytes_up"]


def test_jobs_are_taken_in_turn_by_whoever_is_free():
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([2, 2, 2], 2) == 4
    assert makespan([5], 4) == 5
    assert makespan([1, 2, 3], 1) == 6
    assert makespan([], 2) == 0


def test_more_rounds_take_more_training_and_a_resumed_run_only_what_is_left(tiny, digits):
    config = tiny(rounds=100, evaluation__every=0)
    whole, rest = forecast(config, digits), forecast(config, digits, done=99)
    assert rest.seconds["training"] < whole.seconds["training"] / 10
    assert whole.total == sum(whole.seconds.values())
    assert isinstance(rest, Forecast)


def test_the_time_is_within_a_factor_of_what_the_rounds_then_take(tiny, digits, tmp_path):
    """A wide factor, since the machine may be busy with something else; see benchmarks for more."""
    config = tiny(rounds=3, clients=3, local__steps=60, local__batch=16, evaluation__every=0)
    expected = forecast(config, digits).seconds["training"] - 3 * forecasting.ROUND_S
    began = time.perf_counter()
    seconds = simulate(config, tmp_path / "run", processes=1)["seconds"]
    assert time.perf_counter() - began > seconds["train"]
    assert seconds["train"] / 4 < expected < 4 * seconds["train"]


class Slow(Spectrum):
    """A judge that takes a hundredth of a second for each image."""

    def __call__(self, images):
        time.sleep(0.01 * len(images))
        return super().__call__(images)


def test_each_judge_is_timed_on_the_images_that_it_will_see(tiny, digits):
    one = {"evaluation__extractor": "classifier", "evaluation__samples": 400}
    two = one | {"evaluation__extractor": ("classifier", "tests.engines.test_forecast:Slow")}
    less, more = (evaluation_seconds(tiny(**own), digits)["measuring"] for own in (one, two))
    seen = 400 + len(digits)
    assert more - less > 0.01 * seen * 0.8  # the classifier's own time varies
