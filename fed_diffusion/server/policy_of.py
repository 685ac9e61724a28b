"""From `round.mode` to a round policy, built in or the user's own, whose answers are checked."""

from __future__ import annotations

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.server.policies import POLICIES, RoundPolicy


def policy_of(config: Config) -> RoundPolicy:
    """Return the policy of a run.

    Raises
    ------
    ConfigError
        There is no such policy, it cannot be made, or it needs differences and the wire has none.
    """
    name = config.round.mode
    make = resolve("round.mode", name, POLICIES)
    with blamed("round.mode", name):
        policy: RoundPolicy = make(config)
        if name not in POLICIES:
            _check(policy, config.clients)
    if policy.overlapping and not config.wire.differences:
        raise ConfigError(
            f"round.mode = {name!r} lets tasks outlive their round, so it adds what each worker "
            "changed to a theta that has moved meanwhile; set wire.differences to true."
        )
    return policy


def checked(asked: list[int], free: list[int]) -> list[int]:
    """Return the clients that a policy asks, each once and in ascending order.

    Raises
    ------
    ValueError
        Some of them are not free.
    """
    if odd := sorted(set(asked) - set(free)):
        raise ValueError(f"the round policy asks clients {odd[:3]}, which are not free")
    return sorted(set(asked))


def _check(policy: RoundPolicy, clients: int) -> None:
    """Try a user's policy on a first round; any exception is reported as the policy's fault."""
    target, quorum = policy.target(clients), policy.quorum(clients)
    if type(target) is not int or not 1 <= target <= clients:
        raise ValueError(f"target({clients}) is {target!r}, not a whole number from 1 to {clients}")
    if type(quorum) is not int or not 1 <= quorum <= target:
        raise ValueError(f"quorum({clients}) is {quorum!r}, not a whole number from 1 to {target}")
    everyone = list(range(clients))
    if not checked(policy.ask(1, everyone, clients), everyone):
        raise ValueError("ask() names no client although all clients are free")
    for staleness in (0, 1) if policy.overlapping else (0,):
        factor = policy.weight(staleness)
        if not 0 < factor <= 1:
            raise ValueError(f"weight({staleness}) is {factor!r}, not above 0 and at most 1")
