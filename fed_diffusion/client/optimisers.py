"""A worker's optimiser: it is fresh in every round, or goes on from the state of the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from fed_diffusion.config.schema import LocalConfig
from fed_diffusion.protocol.moments import FIRST, SECOND, STEPS, is_shared

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's parameters, as torch has them."""


class Optimiser(Protocol):
    """What training needs of an optimiser."""

    def zero_grad(self) -> None: ...
    def step(self) -> object: ...


class _Steps:
    """What all optimisers here share: parameters, a step size, and a state for each parameter.

    They are not of torch's class, which imports torch._dynamo when it is made: in every worker,
    that would take as long as importing torch.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], eta: float, decay: float = 0.0):
        self.parameters = list(parameters)
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._eta, self._decay = eta, decay

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for parameter in self.parameters:
            parameter.grad = None

    def _trained(self) -> tuple[list[Tensor], list[Tensor]]:
        """Decay the parameters that have a gradient; return them, and their gradients."""
        used: list[Tensor] = [p for p in self.parameters if p.grad is not None]
        if self._decay:
            torch._foreach_mul_(used, 1 - self._eta * self._decay)
        return used, [p.grad for p in used if p.grad is not None]


class SGD(_Steps):
    """torch.optim.SGD, to the bit where nothing decays."""

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        used, gradients = self._trained()
        torch._foreach_add_(used, gradients, alpha=-self._eta)


class Adam(_Steps):
    """torch.optim.Adam(fused=True), to the bit; with a decay AdamW."""

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        used, gradients = self._trained()
        for parameter in used:
            if parameter not in self.state:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        kept = [self.state[parameter] for parameter in used]
        adam(
            used,
            gradients,
            [state["exp_avg"] for state in kept],
            [state["exp_avg_sq"] for state in kept],
            [],
            [state["step"] for state in kept],
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=self._eta,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )


def fresh_optimiser(local: LocalConfig, network: nn.Module, eta: float) -> Optimiser:
    """The optimiser of a round that begins without a state."""
    kind = SGD if local.optimizer == "sgd" else Adam
    return kind(network.parameters(), eta, local.decay)


def optimiser_of(
    local: LocalConfig, network: nn.Module, eta: float, state: Mapping[str, Tensor]
) -> Optimiser:
    """The optimiser of a round, going on from the state that came where it is shared."""
    if is_shared(local):
        return SharedAdam(dict(network.named_parameters()), eta, state, local.decay)
    return fresh_optimiser(local, network, eta)


class SharedAdam:
    """Adam that goes on from given moments.

    Tensors whose coordinates all have the same number of steps behind them are torch's own, so that
    one client's rounds are one run of it, to the bit.

    Parameters
    ----------
    parameters
        The parameters by name.
    state
        The state as `decode_state` returns it.
    decay
        The weight decay.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        eta: float,
        state: Mapping[str, Tensor],
        decay: float = 0.0,
    ):
        self._parameters = parameters
        counted = {n for n in parameters if state[STEPS + n].dim()}
        self._parts: list[Adam | CountedAdam] = []
        if plain := [p for n, p in parameters.items() if n not in counted]:
            self._parts.append(Adam(plain, eta, decay))
        if others := [parameters[n] for n in parameters if n in counted]:
            self._parts.append(CountedAdam(others, eta, decay))
        self._state = {p: part.state for part in self._parts for p in part.parameters}
        for name, parameter in parameters.items():
            self._state[parameter][parameter] = {
                "step": state[STEPS + name].to(parameter.device, torch.float32, copy=True),
                "exp_avg": _like(parameter, state[FIRST + name]),
                "exp_avg_sq": _like(parameter, state[SECOND + name]),
            }

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for part in self._parts:
            part.zero_grad()

    def step(self) -> None:
        """Take one step on all parameters."""
        for part in self._parts:
            part.step()

    def moments(self) -> dict[str, Tensor]:
        """Return both moments of every parameter, by the names of the state."""
        kinds = {FIRST: "exp_avg", SECOND: "exp_avg_sq"}
        return {
            prefix + name: self._state[parameter][parameter][key]
            for prefix, key in kinds.items()
            for name, parameter in self._parameters.items()
        }


class CountedAdam(_Steps):
    """Adam with a number of steps for every coordinate, by which its bias corrections go."""

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        for parameter, gradient in zip(*self._trained(), strict=True):
            _step(parameter, gradient, self._eta, self.state[parameter])


def _step(parameter: Tensor, gradient: Tensor, eta: float, state: dict[str, Tensor]) -> None:
    count, first, second = state["step"], state["exp_avg"], state["exp_avg_sq"]
    count += 1
    first.lerp_(gradient, 1 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    # -expm1(t log beta) is 1 - beta^t without cancellation
    filled1 = -torch.expm1(count * _log(BETA1))
    filled2 = -torch.expm1(count * _log(BETA2))
    parameter -= eta * (first / filled1) / ((second / filled2).sqrt() + EPS)


def _log(beta: float) -> float:
    return float(torch.tensor(beta, dtype=torch.float64).log())


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """Return values in the parameter's order of memory, which torch's fused kernels rely on."""
    return torch.empty_like(parameter).copy_(values).detach()
