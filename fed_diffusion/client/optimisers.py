"""A worker's optimiser: it is fresh in every round, or goes on from the state of the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fed_diffusion.config.schema import LocalConfig
from fed_diffusion.protocol.moments import FIRST, SECOND, STEPS, is_shared

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's parameters, as torch has them."""


class Optimiser(Protocol):
    """What training needs of an optimiser."""

    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def step(self) -> object: ...


def fresh_optimiser(local: LocalConfig, network: nn.Module, eta: float) -> Optimiser:
    """The optimiser of a round that begins without a state."""
    parameters = list(network.parameters())
    if local.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=eta)
    return torch.optim.Adam(parameters, lr=eta, fused=True)


def optimiser_of(
    local: LocalConfig, network: nn.Module, eta: float, state: Mapping[str, Tensor]
) -> Optimiser:
    """The optimiser of a round, going on from the state that came where it is shared."""
    if is_shared(local):
        return SharedAdam(dict(network.named_parameters()), eta, state)
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
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], eta: float, state: Mapping[str, Tensor]
    ):
        self._parameters = parameters
        counted = {n for n in parameters if state[STEPS + n].dim()}
        self._parts: list[torch.optim.Optimizer] = []
        if plain := [p for n, p in parameters.items() if n not in counted]:
            self._parts.append(torch.optim.Adam(plain, lr=eta, fused=True))
        if others := [parameters[n] for n in parameters if n in counted]:
            self._parts.append(CountedAdam(others, eta))
        self._state = {p: part.state for part in self._parts for p in _parameters_of(part)}
        for name, parameter in parameters.items():
            self._state[parameter][parameter] = {
                "step": state[STEPS + name].to(parameter.device, torch.float32, copy=True),
                "exp_avg": _like(parameter, state[FIRST + name]),
                "exp_avg_sq": _like(parameter, state[SECOND + name]),
            }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the step before."""
        for part in self._parts:
            part.zero_grad(set_to_none)

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


class CountedAdam(torch.optim.Optimizer):
    """Adam with a number of steps for every coordinate, by which its bias corrections go."""

    def __init__(self, parameters: Iterable[nn.Parameter], eta: float):
        super().__init__(parameters, {"lr": eta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for options in self.param_groups:
            for parameter in options["params"]:
                if parameter.grad is not None:
                    _step(parameter, parameter.grad, options["lr"], self.state[parameter])


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


def _parameters_of(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for options in optimiser.param_groups for p in options["params"]]


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """Return values in the parameter's order of memory, which torch's fused kernels rely on."""
    return torch.empty_like(parameter).copy_(values).detach()
