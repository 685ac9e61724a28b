"""What a run trains, as the server holds it: theta, and what moves with it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed_diffusion.aggregation.named import Aggregator
from fed_diffusion.config import Config
from fed_diffusion.protocol.moments import blank, grouped, parted, ungrouped
from fed_diffusion.server.optimizers import ServerStep


class Model:
    """Theta and its moving average, and the states of the clients' and the server's optimisers.

    Attributes
    ----------
    theta, ema
        The parameters and their moving average by name, float32 on the CPU.
    moments
        The optimiser's state behind theta, where local.state is shared; see `protocol.moments`.
    round
        How many rounds are done.
    parameters
        The number of parameters.
    """

    def __init__(self, config: Config, theta: Mapping[str, Tensor]):
        self.config = config
        self.theta = {n: v.detach().to("cpu").float().clone() for n, v in theta.items()}
        self.ema = {name: value.clone() for name, value in self.theta.items()}
        self.moments = blank(self.theta, config.local)
        self.step = ServerStep(config.server, self.theta)
        self.round = 0
        self.parameters = sum(value.numel() for value in self.theta.values())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file."""
        groups = {"theta": self.theta, "ema": self.ema} | grouped(self.moments)
        return groups | self.step.tensors()

    def put_back(self, tensors: Mapping[str, Mapping[str, Tensor]], round: int) -> None:
        """The inverse of `tensors`, after so many rounds.

        Raises
        ------
        ValueError
            The tensors are not this model's.
        """
        self.theta, self.ema = (_as(self.theta, tensors[name]) for name in ("theta", "ema"))
        self.moments = _as(self.moments, ungrouped(tensors))
        self.step.restore(tensors)
        self.round = round

    def move(self, average: Aggregator) -> None:
        """End a round: the average of equation (8), the server's step, the moving average."""
        mean, moments = parted(average.result())
        self.theta, self.moments = self.step.move(self.theta, mean, average), moments
        self.round += 1
        decay = min(self.config.ema.decay, (1 + self.round) / (10 + self.round))
        for name, value in self.ema.items():
            value.lerp_(self.theta[name], 1 - decay)


def _as(model: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors in the model's order, which random masks follow; a file keeps its own."""
    shapes, theirs = ({n: tuple(v.shape) for n, v in it.items()} for it in (model, stored))
    if shapes != theirs:
        raise ValueError("the checkpoint's tensors are not those of the configured model")
    return {name: stored[name] for name in model}
