"""A server optimiser of the user's own: Lion, which moves each weight by a momentum's sign.

    fed-diffusion run digits --set server.optimizer=examples.own_server_optimizer:Lion \
        --set server.eta=0.002

The contract is `fed_diffusion.ServerOptimizer`: made with the section `server` of the
configuration, it says in `start` what is remembered of every coordinate, and makes a step of what
the round's average changed. It is shown trained coordinates alone: under masks the others stay as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed_diffusion.config.schema import ServerConfig


class Lion:
    """The step is eta sign(beta1 m + (1 - beta1) Delta); m = beta2 m + (1 - beta2) Delta."""

    def __init__(self, settings: ServerConfig):
        if settings.eta is None:
            raise ValueError("every step has the size server.eta; give one, as 0.002")
        self.start = {"m": 0.0}
        self.eta, self.beta1, self.beta2 = settings.eta, settings.beta1, settings.beta2

    def step(self, delta: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ahead = self.beta1 * state["m"] + (1 - self.beta1) * delta
        m = self.beta2 * state["m"] + (1 - self.beta2) * delta
        return self.eta * ahead.sign(), {"m": m}
