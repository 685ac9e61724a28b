"""Noise that clients add in shares: its distribution, its size in a sum, and the stated epsilon."""

import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation.exact import SCALE, fixed_point
from fed_diffusion.aggregation.private import SAMPLER, epsilon, spent
from fed_diffusion.aggregation.update import Room
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError
from fed_diffusion.config.schema import PrivacyConfig
from fed_diffusion.engines.local import simulate
from fed_diffusion.experiment import RunStopped
from fed_diffusion.masks.mask import Scattered, kept_values
from fed_diffusion.protocol.divergence import note_divergence
from fed_diffusion.secure.messages import Stage
from fed_diffusion.secure.noise import CELL_BITS, CELLS, DiscreteGaussian, Share, _alias_table
from fed_diffusion.secure.words import summed_numbers
from fed_diffusion.store.rundir import RunDir
from tests.secure.federation import Federation
from tests.secure.runs import FAST, run
from tests.secure.test_keys import UNIFORM, chi_squared

PRIVATE = {"privacy__noise": "clients", "wire__differences": True, "secure__aggregation": True}


def exact(s, numbers):
    """P(k) of the discrete Gaussian, by its definition."""
    far = np.arange(-math.ceil(12 * s) - 12, math.ceil(12 * s) + 13, dtype=float)
    total = math.fsum(np.exp(-0.5 * (far / s) ** 2))
    return np.exp(-0.5 * (np.asarray(numbers, float) / s) ** 2) / total


@pytest.mark.parametrize("s", [0.5, 1.0, 3.7, 40.0, 511.0, 700.0, 5000.0])
def test_drawn_numbers_have_the_probabilities_of_the_discrete_gaussian(s):
    """By chi-squared; from twice 256 on numbers are drawn in blocks of 2, 4, 16, ..."""
    count = 1_000_000
    drawn = DiscreteGaussian(s).draw(count)
    reach = math.ceil(4 * s)
    numbers = np.arange(-reach, reach + 1)
    found = np.bincount(np.clip(drawn + reach + 1, 0, 2 * reach + 2), minlength=2 * reach + 3)
    expected = exact(s, numbers) * count
    outside = (count - expected.sum()) / 2
    expected = np.concatenate([[outside], expected, [outside]])
    enough = expected > 10
    statistic = float(((found - expected) ** 2 / expected)[enough].sum())
    degrees = int(enough.sum()) - 1
    assert abs(statistic - degrees) < 6 * math.sqrt(2 * degrees)


def test_a_wide_discrete_gaussian_is_normal_and_its_last_bits_are_uniform():
    from scipy.stats import kstest

    for s in (2.0**31 * 1.3, 2.0**45 * 1.7):
        drawn = DiscreteGaussian(s).draw(200_000)
        assert kstest(drawn / s, "norm").pvalue > 1e-6
        assert chi_squared((drawn & 255).astype(np.uint8).tobytes()) < UNIFORM
        assert chi_squared(((drawn >> 14) & 255).astype(np.uint8).tobytes()) < UNIFORM


def weights_of(s):
    """The whole weights that a table stands for, which the program forgets."""
    thresholds, aliases = _alias_table(s)
    implied = [int(one) for one in thresholds]
    for place, other in enumerate(aliases):
        implied[int(other)] += (1 << CELL_BITS) - int(thresholds[place])
    return implied


@given(st.floats(0.3, 512))
@settings(max_examples=20)
def test_the_table_has_the_weights_of_the_discrete_gaussian_to_the_last_bit_of_a_word(s):
    implied = weights_of(s)
    assert sum(implied) == CELLS << CELL_BITS == 2**64
    values = [math.exp(-0.5 * (q / s) ** 2) for q in range(CELLS)]
    total = math.fsum(values)
    assert all(abs(w - v / total * 2**64) <= 2**12 for w, v in zip(implied, values, strict=True))


@given(st.floats(256, 512))
@settings(max_examples=10)
def test_the_table_is_as_far_from_the_exact_law_as_the_stated_delta_says(s):
    """In total variation where weights are small; elsewhere by chi-squared, next to nothing."""
    found = np.array(weights_of(s), dtype=float) / 2.0**64
    wanted = np.exp(-0.5 * (np.arange(CELLS) / s) ** 2)
    wanted /= math.fsum(wanted)
    tail = wanted < 2.0**-40
    apart = abs(found - wanted)
    assert math.fsum(apart[tail]) < SAMPLER
    assert math.fsum(apart[~tail] ** 2 / wanted[~tail]) < 1e-25


def test_the_stated_delta_holds_what_the_clients_sampler_lacks():
    of = {"clip": 1.0, "noise_multiplier": 20.0}
    clients, server = (
        spent(PrivacyConfig(**of, noise=noise), 1.0, 100, drawn=10 * 24 * 10**6)
        for noise in ("clients", "server")
    )
    assert clients["epsilon"] == server["epsilon"]
    assert server["delta"] == 1e-5
    more = (1 + math.exp(clients["epsilon"])) * 2.4e10 * SAMPLER
    assert clients["delta"] == pytest.approx(1e-5 + more)
    assert 1e-6 < more < 1e-5
    loud = PrivacyConfig(clip=1.0, noise_multiplier=1e-3, noise="clients")
    assert spent(loud, 1.0, 100, drawn=2.4e8)["delta"] == 1.0


def test_noise_follows_from_no_seed():
    np.random.seed(0)
    first = DiscreteGaussian(1e9).draw(100)
    np.random.seed(0)
    assert not (DiscreteGaussian(1e9).draw(100) == first).any()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e3]),
    clip=st.floats(1e-6, 10),
)
def test_a_clients_whole_numbers_are_never_longer_than_the_clip(seed, scale, clip):
    draw = np.random.default_rng(seed)
    theta = {"a": torch.from_numpy(draw.normal(size=(3, 40))).float(), "b": torch.zeros(5)}
    masks = {"a": Scattered(torch.from_numpy(draw.random((3, 40)) < 0.6))}
    moved = {n: v + torch.from_numpy(scale * draw.normal(size=v.shape)) for n, v in theta.items()}
    end = kept_values({name: value.float() for name, value in moved.items()}, masks)
    changes = Share(clip, 1.0).clipped(end, theta, masks, 1.0)
    room = Room(3)
    whole = [int(k) for n, v in changes.items() for k in fixed_point(n, v, 1, room)]
    assert sum(k * k for k in whole) <= (clip * SCALE) ** 2
    if scale == 1e3:
        assert sum(k * k for k in whole) >= (0.99 * clip * SCALE) ** 2


def private(clients, **settings):
    given = {"privacy.clip": 0.5, "privacy.noise": "clients", "wire.differences": True}
    given |= {"privacy.noise_multiplier": 1.6}
    return Federation(clients, sizes=((300, 200),), **given | settings)


@pytest.mark.parametrize("lost", [{}, {5: Stage.VECTORS}, {4: Stage.KEYS, 5: Stage.VECTORS}])
def test_every_opened_sum_has_the_accounted_noise_at_least_whoever_is_lost(lost):
    federation, sigma, least = private(6, keeps=[0.8] * 6), 1.6 * 0.5, 3
    mean, withheld = federation.opened(federation.attempt(lost))
    left = [client for client in range(6) if client not in lost]
    among = federation.kept(range(6) if 4 not in lost else [0, 1, 2, 3, 5])["t0"]
    survivors, everyone = federation.kept(left)["t0"], federation.kept(range(6))["t0"]
    moved = mean.result()["t0"] - federation.theta["t0"]
    opened = among >= least + sum(stage == Stage.VECTORS for stage in lost.values())
    assert not moved[~opened].any()
    assert withheld == int((~opened & (survivors > 0)).sum())
    noise = (moved * everyone)[opened].double()  # beside it the clipped differences are nothing
    for count in survivors[opened].unique().tolist():
        assert count >= least
        part = noise[survivors[opened] == count]
        expected = sigma * math.sqrt(count / least)
        assert float(part.std()) == pytest.approx(expected, abs=6 * expected / math.sqrt(len(part)))
    assert int(opened.sum()) > 30_000


def test_what_is_summed_is_the_clipped_difference_of_every_client():
    """With next to no noise it is the mean of the differences, each as long as the clip."""
    federation = private(4, **{"privacy.noise_multiplier": 1e-8})
    mean, _ = federation.opened(federation.attempt())
    total = torch.zeros(300, 200, dtype=torch.float64)
    for update in federation.updates.values():
        sent = update.payload.arrays["t0"].data
        change = torch.frombuffer(bytearray(sent), dtype=torch.float32).view(300, 200).double()
        total += change * 0.5 / change.norm()
    moved = (mean.result()["t0"] - federation.theta["t0"]).double()
    assert torch.allclose(moved, total / 4, atol=1e-6)


@pytest.mark.parametrize(("multiplier", "rounds"), [(0.7, 1), (1.6, 40), (8.0, 200)])
def test_epsilon_is_the_accountants_within_the_bound_of_kairouz_liu_and_steinke(multiplier, rounds):
    """Their Proposition 14, for the smallest share of a configuration and 10^8 coordinates."""
    clip, least, coordinates = 1.0, 10, 10**8
    s = 2.0**10
    z = s * math.sqrt(least) / SCALE / clip  # the multiplier that this share would be of
    tau = 10 * sum(math.exp(-2 * (math.pi * s) ** 2 * k / (k + 1)) for k in range(1, least))
    concentrated = 1 / z + tau * math.sqrt(coordinates)
    assert concentrated == 1 / z  # the bound adds nothing that a float64 holds
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.ZCDpEvent(0.5 / multiplier**2), rounds)
    ours = epsilon(multiplier, 1.0, rounds, 1e-5)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


@pytest.mark.parametrize("kind", ["full", "topk", "channels"])
def test_a_run_whose_clients_add_the_noise_says_the_epsilon_of_one_whose_server_does(
    tiny, tmp_path, kind
):
    level = {} if kind == "full" else {"pruning__level": "S"}
    settings = FAST | PRIVATE | level | {"pruning__kind": kind, "privacy__clip": 0.1}
    results = simulate(
        tiny(**settings, privacy__noise_multiplier=2.0), tmp_path / "run", processes=1
    )
    assert results["privacy"]["epsilon"] == epsilon(2.0, 1.0, 1, 1e-5)
    assert results["privacy"]["noise"] == "clients"
    assert 1e-5 < results["privacy"]["delta"] < 1.001e-5
    assert results["rejected"] == 0


@pytest.mark.parametrize("method", ["FedDM-F", "C-FedDM-S"])
def test_without_clip_and_noise_a_private_sum_in_secret_is_the_mean_of_equation_8(
    tiny, tmp_path, method
):
    settings = FAST | {"method": method, "wire__differences": True}
    plain = run(tiny(**settings), tmp_path / "plain").coordinator.theta
    quiet = PRIVATE | {"privacy__clip": 100.0, "privacy__noise_multiplier": 1e-8}
    config = tiny(**settings | quiet, secure__least=1)
    secret = run(config, tmp_path / "secret").coordinator.theta
    assert all(torch.allclose(plain[n], v, atol=5e-6) for n, v in secret.items())
    assert any(not torch.equal(plain[n], v) for n, v in secret.items())


def test_every_attempt_at_a_private_round_is_in_epsilon(tiny, tmp_path):
    """An attempt that no sum comes of may have told the server one."""
    config = tiny(**FAST | PRIVATE, privacy__clip=0.1)
    with pytest.raises(RunStopped, match="tried 3 times"):
        run(config, tmp_path / "run", lost=dict.fromkeys((0, 1, 2), Stage.OPEN))
    assert RunDir(tmp_path / "run").opened(0) == 3


REFUSED = {
    "needs secure.aggregation = true": {"secure__aggregation": False},
    "needs round.fraction = 1": {"round__fraction": 0.8},
    "must be at least": {"privacy__noise_multiplier": 1e-12},
    "have room for": {"privacy__clip": 1000.0, "privacy__noise_multiplier": 50.0, "clients": 5000},
    "changes nothing without privacy.clip": {"privacy__clip": None},
    "needs privacy.noise = clients": {"privacy__noise": "server"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_noise_of_clients_that_would_have_no_guarantee_is_refused(tiny, why):
    with pytest.raises(ConfigError, match="noise") as refused:
        tiny(**FAST | PRIVATE | {"privacy__clip": 0.1} | REFUSED[why])
    assert why in str(refused.value)


@pytest.mark.parametrize("losses", ["each", "summed"])
@pytest.mark.parametrize("loss", [math.nan, 1e30, 500.0])
def test_no_client_is_lost_by_what_its_images_make_of_its_training(
    tiny, tmp_path, monkeypatch, losses, loss
):
    """Else theta shows it: it has fewer coordinates that change, and less noise."""
    train = Worker._train

    def diverging(self, network, plain, fast, task, *rest):
        said = train(self, network, plain, fast, task, *rest)
        if task.client != 2:
            return said
        with torch.no_grad():
            next(network.parameters()).fill_(loss)
        return loss, 1e-3

    monkeypatch.setattr(Worker, "_train", diverging)
    config = tiny(**FAST | PRIVATE | {"rounds": 2}, privacy__clip=0.1, secure__losses=losses)
    for line in run(config, tmp_path / "run").history:
        assert line.rejected == []
        assert len(line.clients) == 5


def test_a_difference_that_is_not_finite_is_zero_and_has_its_noise():
    theta = {"a": torch.ones(40)}
    bad = {"a": torch.tensor([math.inf, math.nan] * 20)}
    assert not Share(1.0, 1.0).clipped(bad, theta, {}, 1.0)["a"].any()


def test_losses_that_are_hidden_fit_into_the_sums_of_all_clients():
    for clients in (3, 10**4, 10**6):
        numbers = {"loss": math.nan, "holdout_loss": 1e9, "images": 1, "seconds": 1.0}
        note_divergence(numbers, math.nan, clients)
        assert summed_numbers(numbers, True, clients)[0] > 0


def test_who_was_lost_is_named_among_what_is_not_covered_where_clients_add_the_noise():
    of = {noise: PrivacyConfig(clip=1.0, noise=noise) for noise in ("server", "clients")}
    covers = {noise: spent(settings, 1.0, 1)["covers"] for noise, settings in of.items()}
    assert "were lost in a round" in covers["clients"]
    assert "were lost in a round" not in covers["server"]
