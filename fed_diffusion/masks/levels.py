"""The paper's pruning levels F, L, M and S (Appendix D) for any number of workers."""

from __future__ import annotations

from fractions import Fraction

from fed_diffusion.config.schema import PruningConfig

SHARES: dict[str, dict[str, str]] = {
    "F": {"1": "1"},
    "L": {"1": "0.8", "0.75": "0.2"},
    "M": {"1": "0.6", "0.80": "0.2", "0.75": "0.2"},
    "S": {"1": "0.6", "0.75": "0.4"},
}
"""For each level, the share of the workers by keep ratio, as decimals for `Fraction`."""


def level_ratios(level: str, clients: int) -> tuple[float, ...]:
    """Return the keep ratio of every worker, largest first.

    The shares are scaled to `clients` by largest remainder in exact fractions; a tie goes to the
    larger keep ratio.
    """
    shares = {Fraction(keep): Fraction(share) for keep, share in SHARES[level].items()}
    exact = {keep: share * clients for keep, share in shares.items()}
    counts = {keep: int(value) for keep, value in exact.items()}
    by_remainder = sorted(exact, key=lambda keep: (exact[keep] - counts[keep], keep), reverse=True)
    for keep in by_remainder[: clients - sum(counts.values())]:
        counts[keep] += 1
    return tuple(float(keep) for keep in sorted(counts, reverse=True) for _ in range(counts[keep]))


def keep_ratios(pruning: PruningConfig, clients: int) -> tuple[float, ...]:
    """The keep ratio of every client under these settings."""
    if pruning.kind == "full":
        return (1.0,) * clients
    if pruning.keep is None:
        return level_ratios(pruning.level, clients)
    if isinstance(pruning.keep, tuple):
        return pruning.keep
    return (pruning.keep,) * clients
