"""What the server makes of a round's average: the step from theta_r to theta_{r+1}.

`server.optimizer` names it: one of `OPTIMIZERS`, or module:Class for a `ServerOptimizer` of the
user's. With none, theta_{r+1} is the average itself. Otherwise the average's difference to theta_r
is to the server what a gradient step is to a worker (Reddi et al. 2021, Adaptive Federated
Optimization). Under privacy the average has been noised before it comes here, so that all of this
is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.aggregation.named import Aggregator
from fed_diffusion.aggregation.private import PrivateMean
from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config.federation import ServerConfig
from fed_diffusion.masks.mask import Scattered

KEY = "server.optimizer"
State = Mapping[str, Tensor]
Theta = dict[str, Tensor]


class ServerOptimizer(Protocol):
    """A server optimiser says how the server moves theta by a round's average.

    An optimiser is asked tensor by tensor, and sees only coordinates that somebody trained in the
    round. The others do not move and their state does not decay, whatever the masks. The object
    itself remembers nothing: what it needs from one round to the next is in `state`, which
    checkpoints hold.
    """

    @property
    def start(self) -> Mapping[str, float]:
        """The name of each value that is remembered for every coordinate, and what it starts at.

        For example {"m": 0.0}; a plain attribute will do. A name is a word as Python has them.
        """
        ...

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step of those coordinates of one tensor that were trained.

        Parameters
        ----------
        delta
            The round's average minus theta_r, one-dimensional, float64; it must not be changed.
        state
            What is remembered of these coordinates, by the names of `start`, shaped like `delta`,
            float64; it must not be changed. In between rounds it is kept in float32.

        Returns
        -------
        step, state
            What is added to theta_r, shaped like `delta`, float64, finite; and what is to be
            remembered, as `state` came.
        """
        ...


class ServerOptimizerFactory(Protocol):
    """What server.optimizer names: a class of optimisers, or a function that makes one.

    Parameters
    ----------
    settings
        The section `server` of the configuration. Settings that cannot be are refused here, by any
        exception.
    """

    def __call__(self, settings: ServerConfig, /) -> ServerOptimizer: ...


class Momentum:
    """FedAvgM (Hsu et al. 2019): m = beta1 m + Delta; theta moves by eta m."""

    def __init__(self, settings: ServerConfig):
        self.start = {"m": 0.0}
        self._eta = 1.0 if settings.eta is None else settings.eta
        self._beta = settings.beta1

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step; see the contract."""
        m = self._beta * state["m"] + delta
        return self._eta * m, {"m": m}


class Adam:
    """FedAdam: theta moves by eta m / (sqrt(v) + tau).

    m = beta1 m + (1 - beta1) Delta and v = beta2 v + (1 - beta2) Delta^2, from m = 0 and v = tau^2,
    without a correction of bias, as in Reddi et al. 2021.
    """

    def __init__(self, settings: ServerConfig):
        self.start = {"m": 0.0, "v": settings.tau**2}
        self._eta = 0.01 if settings.eta is None else settings.eta
        self._beta1, self._beta2, self._tau = settings.beta1, settings.beta2, settings.tau

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step; see the contract."""
        m = self._beta1 * state["m"] + (1 - self._beta1) * delta
        v = self._second(state["v"], delta * delta)
        return self._eta * m / (v.sqrt() + self._tau), {"m": m, "v": v}

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return self._beta2 * v + (1 - self._beta2) * square


class Yogi(Adam):
    """FedYogi: as FedAdam, with v - (1 - beta2) Delta^2 sign(v - Delta^2) for v."""

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self._beta2) * square * (v - square).sign()


NONE = "none"
OPTIMIZERS: dict[str, ServerOptimizerFactory] = {
    "momentum": Momentum,
    "adam": Adam,
    "yogi": Yogi,
}


class ServerStep:
    """The server's step moves theta by the configured optimiser, and keeps the optimiser's state.

    Parameters
    ----------
    theta
        Parameters by name; only their shapes count.

    Raises
    ------
    ConfigError
        There is no such optimiser, or it refuses its settings.
    """

    def __init__(self, settings: ServerConfig, theta: Mapping[str, Tensor]):
        self._name = settings.optimizer
        self._optimizer: ServerOptimizer | None = None
        self._state: dict[str, Theta] = {}
        if self._name == NONE:
            return
        made: ServerOptimizerFactory = resolve(KEY, self._name, {NONE: None, **OPTIMIZERS})
        with blamed(KEY, self._name):
            self._optimizer = made(settings)
            for slot, value in _checked_start(self._optimizer).items():
                self._state[slot] = {
                    n: torch.full(tuple(v.shape), value, dtype=torch.float32)
                    for n, v in theta.items()
                }

    def move(self, theta: Theta, average: Theta, mean: Aggregator) -> Theta:
        """Return theta_{r+1} from theta_r and the round's average.

        Parameters
        ----------
        average
            The result of `mean`, at theta's names.
        mean
            Who trained what is read from it.

        Raises
        ------
        ConfigError
            The optimiser has failed, or its step is not finite: theta and the state are as before.
        """
        if self._optimizer is None:
            return average
        # who took part is a secret of private rounds; there every coordinate of any client moves
        counts = mean.everyone if isinstance(mean, PrivateMean) else mean.coverage.counts()
        moved: Theta = {}
        state: dict[str, Theta] = {slot: {} for slot in self._state}
        with blamed(KEY, self._name):
            for name, old in theta.items():
                before = {slot: values[name] for slot, values in self._state.items()}
                trained = counts[name].flatten() > 0
                moved[name], after = self._tensor(old, average[name], before, trained)
                for slot, value in after.items():
                    state[slot][name] = value
        self._state = state
        return moved

    def _tensor(
        self, old: Tensor, average: Tensor, state: State, trained: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one tensor's new values and state; what was not trained keeps both."""
        assert self._optimizer is not None
        if not bool(trained.any()):
            return old, dict(state)
        theta = old.flatten()[trained].double()
        delta = average.flatten()[trained].double() - theta
        shown = {slot: value.flatten()[trained].double() for slot, value in state.items()}
        step, after = self._optimizer.step(delta, shown)
        if after.keys() != state.keys():
            raise ValueError(f"its state has the names {sorted(after)}, not {sorted(state)}")
        for what, value in {"step": step, **after}.items():
            _check_tensor(what, value, delta)
        new = _put(theta + step, old, trained)
        return new, {slot: _put(value, state[slot], trained) for slot, value in after.items()}

    def tensors(self) -> dict[str, Theta]:
        """Return what a checkpoint holds, by file: a tensor for each parameter and name of `start`.

        The names are slot.parameter, as in m.enter.weight.
        """
        flat = {f"{slot}.{n}": v for slot, values in self._state.items() for n, v in values.items()}
        return {"server": flat} if flat else {}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        ValueError
            The checkpoint's tensors are not those of this optimiser and model.
        """
        mine, theirs = self.tensors().get("server", {}), tensors.get("server", {})
        shapes = [{n: tuple(v.shape) for n, v in group.items()} for group in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the checkpoint holds no state of {KEY} = {self._name!r}")
        for slot, values in self._state.items():
            self._state[slot] = {name: theirs[f"{slot}.{name}"] for name in values}


def _checked_start(optimizer: ServerOptimizer) -> dict[str, float]:
    start = {slot: float(value) for slot, value in dict(optimizer.start).items()}
    odd = [slot for slot, value in start.items() if not math.isfinite(value)]
    if odd or not all(slot.isidentifier() for slot in start):
        raise ValueError(f"start = {start}; it must map names of variables to finite numbers")
    return start


def _check_tensor(what: str, value: Tensor, like: Tensor) -> None:
    got = value.dtype, tuple(value.shape)
    if got != (like.dtype, tuple(like.shape)):
        raise ValueError(f"its {what} is {got[0]} {list(got[1])}, not float64 {[*like.shape]}")
    if not bool(value.float().isfinite().all()):
        raise ValueError(f"its {what} is not finite (a smaller server.eta helps where it grows)")


def _put(values: Tensor, whole: Tensor, trained: Tensor) -> Tensor:
    """Return a copy of a tensor with other values, as float32, where somebody trained."""
    new = whole.flatten().clone()
    new[trained] = values.float()
    return new.view(whole.shape)


def check_optimizer(settings: ServerConfig) -> None:
    """Let a user's optimiser take three steps on a tiny network, or refuse the optimiser.

    Raises
    ------
    ConfigError
        The optimiser cannot be found, or it breaks the contract; the message says how.
    """
    if settings.optimizer != NONE and settings.optimizer not in OPTIMIZERS:
        theta = {"a": torch.arange(6.0).view(2, 3) / 8, "b": torch.ones(2)}
        first = ServerStep(settings, theta)
        with blamed(KEY, settings.optimizer):
            _try(settings, first, theta)


class _Watched:
    """Passes a step on, and refuses one that writes to its arguments."""

    def __init__(self, optimizer: ServerOptimizer):
        self._optimizer = optimizer
        self.start = optimizer.start

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        before = [value.clone() for value in (delta, *state.values())]
        given = [delta, *state.values()]
        found = self._optimizer.step(delta, state)
        if not all(map(torch.equal, before, given)):
            raise ValueError("it changes its arguments, delta or the state")
        return found


def _try(settings: ServerConfig, first: ServerStep, theta: Theta) -> None:
    """Take a step of all coordinates, one of some, and one more, also with a resumed copy."""
    some = {"a": Scattered(torch.tensor([[True, False, False], [True, True, False]]))}

    def after(step: ServerStep, old: Theta, masks: Mapping[str, Scattered], by: float) -> Theta:
        mean = MaskedMean(old, 1)
        kept = {n: masks[n].take(v) if n in masks else v for n, v in old.items()}
        mean.add({name: value + by for name, value in kept.items()}, masks)
        return step.move(old, mean.result(), mean)

    assert first._optimizer is not None
    first._optimizer = _Watched(first._optimizer)
    twice = after(first, after(first, theta, {}, 0.01), some, -0.02)
    resumed = ServerStep(settings, theta)
    resumed.restore(first.tensors())
    thrice = [after(step, twice, {}, 0.01) for step in (first, resumed)]
    if not all(torch.equal(thrice[0][name], thrice[1][name]) for name in theta):
        raise ValueError(
            "it goes on differently when it is made anew with its state: what it "
            "remembers must be in `state` alone"
        )
