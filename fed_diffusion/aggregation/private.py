"""Client-level differential privacy under masks; the server adds the noise, or the clients do.

What is released is theta_{r+1}, every round. With m_n the mask that client n has in round r whether
or not it takes part, and P the clients that do,

    theta_{r+1}^i = theta_r^i + (sum_{n in P} m_n^i Delta_n^i + noise^i) / (q W^i),
    W^i = sum over all clients of m_n^i,   noise ~ N(0, (z C)^2 I),   ||m_n Delta_n|| <= C.

Equation (8) divides by the number of workers that did train coordinate i: a ratio of two sums,
both of which change with one client. Here the denominator q W is known before anybody answers
(masks are functions of seed, round, ratio and theta_r, never of images), so one client, put in or
taken out, moves the numerator by at most C in Euclidean norm, whatever its mask; dividing is
post-processing. So sigma = z C on the sum, the same on every coordinate, for all masks.

Neighbours: one client's differences are all replaced by zero (REPLACE_SPECIAL). Each round is a
Gaussian mechanism, Poisson-sampled with rate q = round.fraction where that is below 1; then the
draw is the operating system's and secret, and `metrics.jsonl`, which names the participants, must
not be published. Every round that was opened counts, also one that was repeated after a crash or
stayed below its quorum: what clients were sent and did is not taken back. Noise comes from the
operating system: a private run is not reproducible.

With privacy.noise = server the server is trusted (central model). With clients, under secure
aggregation, the sum comes with its noise (`secure.noise`), and here is nothing left to be added.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.exact import BLOCK, SCALE, ExactSums
from fed_diffusion.aggregation.update import Room, check_update
from fed_diffusion.config.schema import ConfigError, PrivacyConfig
from fed_diffusion.masks.mask import Masks
from fed_diffusion.protocol.clipping import factor_of
from fed_diffusion.protocol.codecs import difference
from fed_diffusion.protocol.errors import UpdateError

MANY = 1 << 31
"""The room for clients: they are counted one mask at a time, and their number is not known
before.
"""

COVERS = (
    "theta and its moving average after every round, and what is computed from them alone, such as "
    "generated images. It does not cover, in results.json itself: loss, holdout_loss and "
    "dsm_objective (the clients' own numbers, neither clipped nor noised), bytes, seconds and "
    "rejected, and the quality figures that compare with real images (FID, KID, memorisation, and "
    "IS where a classifier learned from them) unless those are public. Nor does it cover "
    "metrics.jsonl (losses and held-out losses, numbers of images, who took part or was refused), "
    "data.json (who holds how many images of which class), budgets.json, checkpoint/state.json, "
    "report.html and the logs; nor that a round stayed below its quorum, or that a run ended early"
)
"""What the stated epsilon covers, and what it does not cover."""
LOST = (
    "; nor who, or how many, were lost in a round: coordinates that keep their value and the size "
    "of the noise show it"
)
"""What it does not cover either where clients add the noise."""
SAMPLER = 2e-17
"""How far the law of a number that a client draws is from the discrete Gaussian in its tail, in
total variation; see `fed_diffusion.secure.noise`."""
_system = random.SystemRandom()


class PrivateMean:
    """The clipped numerator's exact sum, with noise, over a fixed denominator.

    Parameters
    ----------
    theta
        theta_r.
    everyone
        The masks of all clients of the run in this round, one after another: their sum is W. Memory
        does not grow with their number.
    rate
        q, the probability with which each of them takes part.

    Attributes
    ----------
    everyone
        W of every coordinate, by name.
    """

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        everyone: Iterable[Masks],
        rate: float,
        privacy: PrivacyConfig,
    ):
        assert privacy.clip is not None
        self._theta = dict(theta)
        denominators = Coverage(self._theta, MANY)
        for masks in everyone:
            denominators.add(masks)
        clients = max(1, denominators.updates)
        self.everyone = denominators.counts()
        self._room = Room(clients)
        self._sums = ExactSums(self._theta, self._room)
        self.coverage = Coverage(self._theta, clients)
        self._clip = privacy.clip
        at_server = privacy.noise == "server"
        self._sigma = privacy.noise_multiplier * privacy.clip if at_server else 0.0
        self._rate = rate

    def add(
        self, values: Mapping[str, Tensor], masks: Masks | None = None, weight: float = 1.0
    ) -> None:
        """Add one worker's difference to theta_r; the server clips it too, since a client may
        lie.
        """
        if weight != 1:
            raise UpdateError(f"weight = {weight}; under privacy every client has the weight 1")
        masks = masks or {}
        self._room.check(1)
        found = check_update(self._theta, values, masks)
        square, _ = difference(values, self._theta, masks)
        factor = factor_of(math.sqrt(square), self._clip)
        changes = {
            name: (value - found[name].take(self._theta[name])) * factor
            for name, value in values.items()
        }
        self._sums.add(changes, found, 1)
        self.coverage.add(masks)

    def fill(self, name: str, sums: Tensor, level: int = 0) -> None:
        """Take a tensor's sums as secure aggregation has made them, of clients that have clipped
        their differences and added the noise themselves; see `MaskedMean.fill`.
        """
        assert level == 0
        assert not self._sigma
        self._sums.fill(name, sums)

    def result(self) -> dict[str, Tensor]:
        """Return theta_{r+1}; a coordinate that no client's mask keeps stays as it is."""
        return {name: self._moved(name) for name in self._theta}

    def _moved(self, name: str) -> Tensor:
        new, unit = self._theta[name].flatten().clone(), SCALE * self._room.scale
        sums, kept = self._sums[name].flatten(), self.everyone[name].flatten()
        for start in range(0, new.numel(), BLOCK):
            part = slice(start, start + BLOCK)
            total = sums[part].clone()
            if self._sigma:
                # on the same grid as the sum: rounding after the noise, so no bit escapes it
                noise = np.rint(self._sigma * unit * gaussian(len(total)))
                total += torch.from_numpy(noise).to(torch.int64)
            below = self._rate * kept[part].to(torch.float64)
            step = total.to(torch.float64) / unit / below.clamp(min=1e-9)
            new[part] += torch.where(below > 0, step, 0.0).to(torch.float32)
        return new.view(self._theta[name].shape)


def gaussian(count: int) -> np.ndarray:
    """Draw independent standard normal values from the operating system's entropy, by Box and
    Muller.
    """
    pairs = (count + 1) // 2
    words = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64) >> np.uint64(11)
    one, two = (words.astype(np.float64) + 0.5).reshape(2, pairs) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(one)), 2 * np.pi * two
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def drawn(clients: list[int], rate: float) -> list[int]:
    """Draw each client with probability `rate`, independently: nobody can tell beforehand who."""
    return [client for client in clients if rate >= 1 or _system.random() < rate]


# --- accounting ---------------------------------------------------------------------------------


def event(noise_multiplier: float, rate: float, rounds: int) -> Any:
    """Return `rounds` Gaussian mechanisms, Poisson-sampled, as the accountant names them."""
    accounting = _accounting()
    once = accounting.GaussianDpEvent(noise_multiplier)
    if rate < 1:
        once = accounting.PoissonSampledDpEvent(rate, once)
    return accounting.SelfComposedDpEvent(once, rounds)


def epsilon(noise_multiplier: float, rate: float, rounds: int, delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy after so many rounds, by
    Renyi's.
    """
    accounting = _accounting()
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(
        neighboring_relation=accounting.NeighboringRelation.REPLACE_SPECIAL
    )
    accountant.compose(event(noise_multiplier, rate, rounds))
    return float(accountant.get_epsilon(delta))


def spent(
    privacy: PrivacyConfig, fraction: float, opened: int, finished: int = 0, drawn: float = 0
) -> dict[str, Any] | None:
    """What results.json says of a run's privacy; None where it has none.

    Parameters
    ----------
    fraction
        The part of the clients that a round asks: round.fraction.
    opened
        How many rounds were sent to clients; a round that was sent twice counts twice.
    finished
        How many of those rounds changed the model.
    drawn
        How many numbers the clients draw in a round at most, where they add the noise. What the
        sampler's tail adds to delta is a bound: (1 + e^epsilon) `SAMPLER` for each of them.
    """
    if privacy.clip is None:
        return None
    found = epsilon(privacy.noise_multiplier, fraction, opened, privacy.delta)
    delta = privacy.delta
    if privacy.noise == "clients":
        delta += (1 + math.exp(min(found, 100.0))) * SAMPLER * drawn * opened
    return {
        "epsilon": found,
        "delta": min(1.0, delta),
        "sigma": privacy.noise_multiplier * privacy.clip,
        "clip": privacy.clip,
        "noise_multiplier": privacy.noise_multiplier,
        "noise": privacy.noise,
        "sampling_rate": fraction,
        "rounds": opened,
        "repeated": opened - finished,
        "covers": COVERS + (LOST if privacy.noise == "clients" else ""),
        "reproducible": False,
    }


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError(
            "privacy.clip needs the accountant: pip install 'fed-diffusion[privacy]'."
        ) from error
    return dp_accounting
