"""Streams: functions of seed, round, client and purpose, with all of their entropy."""

import numpy as np
import pytest
import torch
from torch import nn

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.rng import Purpose, philox, seed_torch, torch_generator, torch_seed
from fed_diffusion.config import load_config
from fed_diffusion.server.coordinator import Coordinator
from tests.tiny import TINY

ROUNDS, CLIENTS = 300, 1000


@pytest.fixture(scope="module")
def first_words():
    """The first word of the noise of every client in every round of a long run."""
    words = np.empty((ROUNDS, CLIENTS), np.uint64)
    for round, client in np.ndindex(words.shape):
        words[round, client] = philox(0, Purpose.NOISE, round, client).random_raw()
    return words


def state_words(generator):
    """The 624 words of a CPU generator, as NumPy's own Mersenne Twister has them."""
    return generator.get_state().numpy()[24 : 24 + 8 * 624].view(np.uint64)


def test_no_two_clients_of_a_long_run_draw_the_same_noise(first_words):
    assert len(np.unique(first_words)) == ROUNDS * CLIENTS
    for round, client in ((0, 0), (7, 31), (299, 999)):  # these words are those of the state
        state = state_words(torch_generator(0, Purpose.NOISE, round, client))
        assert state[0] | state[1] << np.uint64(32) == first_words[round, client]


def test_seeds_alike_in_their_low_32_bits_give_different_streams(first_words):
    seeds = (first_words >> np.uint64(1)).ravel()
    low = seeds & np.uint64(2**32 - 1)
    order = np.argsort(low, kind="stable")
    pairs = np.flatnonzero(low[order][1:] == low[order][:-1])
    assert len(pairs)  # a CPU generator that is seeded with them draws the same twice
    for pair in pairs:
        by_seed, by_state = [], []
        for place in order[pair : pair + 2]:
            round, client = divmod(int(place), CLIENTS)
            seed = torch_seed(0, Purpose.NOISE, round, client)
            assert seed == int(seeds[place])
            by_seed.append(torch.randn(99, generator=torch.Generator().manual_seed(seed)))
            noise = torch_generator(0, Purpose.NOISE, round, client)
            by_state.append(torch.randn(99, generator=noise))
        assert torch.equal(*by_seed)
        assert not torch.equal(*by_state)


def test_a_stream_is_the_same_each_time_and_differs_by_what_it_is_for():
    one, two = (torch_generator(3, Purpose.NOISE, 5, 7) for _ in range(2))
    assert torch.equal(torch.randn(9, generator=one), torch.randn(9, generator=two))
    for other in ((4, Purpose.NOISE, 5, 7), (3, Purpose.BATCHES, 5, 7), (3, Purpose.NOISE, 7, 5)):
        again = torch_generator(3, Purpose.NOISE, 5, 7)
        assert not torch.equal(
            torch.randn(9, generator=again), torch.randn(9, generator=torch_generator(*other))
        )


def test_a_cpu_stream_is_the_mersenne_twister_with_these_words():
    """NumPy's twister with the same state gives the same raw words."""
    words = np.asarray(philox(1, Purpose.SAMPLES).random_raw(312)).astype("<u8").view("<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    made = torch_generator(1, Purpose.SAMPLES)
    # torch takes 24 bits of each word for a float in [0, 1)
    expected = (twister.random_raw(2000) & (2**24 - 1)) / 2**24
    assert torch.rand(2000, generator=made).tolist() == expected.tolist()


def test_the_noise_is_normal_and_even():
    from scipy.stats import kstest

    made = torch_generator(2, Purpose.NOISE)
    assert kstest(torch.randn(100_000, generator=made).numpy(), "norm").pvalue > 1e-6
    assert kstest(torch.rand(100_000, generator=made).numpy(), "uniform").pvalue > 1e-6


def test_torchs_own_generator_gets_the_same_state_as_a_stream():
    with torch.random.fork_rng(devices=[]):
        seed_torch(5, Purpose.DROPOUT, 2, 3)
        own = torch.randn(9)
    assert torch.equal(own, torch.randn(9, generator=torch_generator(5, Purpose.DROPOUT, 2, 3)))


class Own(nn.Module):
    """A network that shows what it drew at its start, and in each step."""

    def __init__(self, config, channels, size, classes):
        super().__init__()
        self.start = nn.Parameter(torch.randn(9))
        self.dropped = []

    def forward(self, x, u, labels):
        self.dropped.append(nn.functional.dropout(torch.ones(64), 0.5))
        return x * self.start.sum()


def test_start_values_and_dropout_are_drawn_from_streams_of_their_own():
    config = load_config("digits", TINY | {"model.name": "tests.common.test_rng:Own"})
    theta = parameters_of(build_network(config))
    noise = torch_generator(config.seed, Purpose.INIT)
    assert torch.equal(theta["start"], torch.randn(9, generator=noise))
    worker = Worker(config)
    for task in Coordinator(config, theta).tasks(1):
        network, *_ = worker.networks.holding(theta)
        network.dropped.clear()
        worker.run(task)
        with torch.random.fork_rng(devices=[]):
            seed_torch(config.seed, Purpose.DROPOUT, 1, task.client)
            expected = [nn.functional.dropout(torch.ones(64), 0.5) for _ in network.dropped]
        assert len(network.dropped) >= config.local.steps
        assert all(map(torch.equal, network.dropped, expected))
