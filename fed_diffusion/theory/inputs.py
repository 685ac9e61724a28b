"""What Theorem 4.11 reads: of the data, of a partition of time, and of a run's training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.diffusion import partitions


@dataclass(frozen=True)
class Data:
    """Dimension d and second moment M_{n,2} = E ||X_0||^2 of one worker's data."""

    d: int
    M2: float

    def __post_init__(self) -> None:
        if self.d < 1:
            raise ConfigError(f"d = {self.d}; a dimension is at least 1")
        not_negative(M2=self.M2)


@dataclass(frozen=True)
class Steps:
    """What the theorem reads of a partition.

    Attributes
    ----------
    T, K
        Its start and its number of steps.
    kappa
        The kappa that the bound is evaluated at.
    needed
        The smallest kappa with gamma_k <= kappa min{1, u_{k+1}} for every k.
    delta
        Its end; None where it is not known, and then Remark 4.12's condition on K is not looked at.
    """

    T: float
    K: int
    kappa: float
    needed: float
    delta: float | None = None

    def __post_init__(self) -> None:
        for name in ("T", "K", "kappa", "needed"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}; it must be above 0")

    @classmethod
    def of(cls, u: Tensor, kappa: float | None = None) -> Steps:
        """Of a partition [K + 1], at its own kappa unless another is given."""
        needed = partitions.kappa(u)
        return cls(
            float(u[0]), len(u) - 1, needed if kappa is None else kappa, needed, float(u[-1])
        )


@dataclass(frozen=True)
class Training:
    """What Lemmas 4.6 and 4.7 read of a run of R rounds of S local steps by N workers.

    Attributes
    ----------
    eta, L, sigma1, sigma2
        Step size, Lipschitz constant of every grad F_n, and the roots of the variances of
        Assumption 4.3 (sigma1 at the real batch size).
    w2
        w^2 of Assumption 4.2, the largest ||theta_r - theta_r * m||^2.
    gamma_star
        Gamma*, the fewest trainers that any coordinate has in any round.
    F0, Fn0
        F(theta_0), and F_n(theta_0) of the worker that the bound is for.
    drift
        ||theta_R - theta_0||.
    optimizer, full_participation
        The lemmas cover plain SGD, and every worker in every round.
    """

    N: int
    S: int
    R: int
    eta: float
    L: float
    sigma1: float
    sigma2: float
    w2: float
    gamma_star: int
    F0: float
    Fn0: float
    drift: float
    optimizer: str = "sgd"
    full_participation: bool = True

    def __post_init__(self) -> None:
        for name in ("N", "S", "R"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.gamma_star <= self.N:
            raise ConfigError(f"gamma_star = {self.gamma_star}; it must be from 0 to N = {self.N}")
        if not self.eta > 0:
            raise ConfigError(f"eta = {self.eta}; it must be above 0")
        names = ("L", "sigma1", "sigma2", "w2", "F0", "Fn0", "drift")
        not_negative(**{name: getattr(self, name) for name in names})


def to_F_scale(training: Training, Z: float, d: int) -> Training:
    """From the simple loss F_n / (Z d), which training minimises, to F_n itself.

    eta_F = eta / (Z d); losses, gradients and L times Z d, so sigma times Z d; theta is the same.
    """
    scale = Z * d
    return replace(
        training,
        eta=training.eta / scale,
        L=training.L * scale,
        sigma1=training.sigma1 * scale,
        sigma2=training.sigma2 * scale,
        F0=training.F0 * scale,
        Fn0=training.Fn0 * scale,
    )


def eta_from_F_scale(eta: float, Z: float, d: int) -> float:
    """The config's eta, on the simple loss, of a step size on the scale of F: eta_F Z d."""
    return eta * Z * d


def not_negative(**values: float) -> None:
    """Refuse numbers below 0, and what is no number: `ConfigError` names it."""
    for name, value in values.items():
        if not value >= 0:
            raise ConfigError(f"{name} = {value}; it must be a number from 0")
