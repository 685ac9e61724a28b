"""Secure aggregation: its settings, and what cannot be had with it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fed_diffusion.config.federation import (
    PrivacyConfig,
    RoundConfig,
    TheoryConfig,
    WireConfig,
)
from fed_diffusion.config.names import is_own
from fed_diffusion.config.section import Section
from fed_diffusion.config.training import LocalConfig, PruningConfig


class SecureConfig(Section):
    """Secure aggregation: the server learns sums of updates, and no client's own update."""

    aggregation: bool = False
    """Whether updates are aggregated securely. The parameters that come out have the same bits, but
    for coordinates that `least` keeps hidden."""
    neighbours: int | None = Field(None, ge=2)
    """With how many others each client shares masks and secrets; an even number. By default it is
    all of them up to 32 clients, and beyond that as few as fail with a probability of at most 2^-40
    while a tenth of the clients collude with the server and a fifth of them vanish. Under unequal
    masks it is always all."""
    threshold: float = Field(0.5, ge=0.5, lt=1)
    """More than this part of those who hold a client's secrets must be left to open a sum. What
    fewer of them know tells nothing."""
    least: int = Field(3, ge=1)
    """A sum of fewer clients than this is not opened: such coordinates keep theta_r, and `withheld`
    in metrics.jsonl counts them. 1 opens everything. With privacy.noise = clients it is also for
    how many clients the noise is enough: the more, the less noise each of them adds."""

    losses: Literal["each", "summed"] = "each"
    """each: every client's losses, images and seconds travel in the clear. summed: only their sums
    are opened, and every client's entry in metrics.jsonl holds the mean; no node says how many
    images it has when it joins."""

    @model_validator(mode="after")
    def _circles_are_even(self) -> SecureConfig:
        if self.neighbours is not None and self.neighbours % 2:
            raise ValueError(
                f"neighbours: {self.neighbours} is odd; clients in a circle have as many "
                "neighbours on either side, so give an even number"
            )
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> SecureConfig:
        for name, field in type(self).model_fields.items():
            if not self.aggregation and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name}: {getattr(self, name)} changes nothing, since updates are not "
                    f"aggregated securely; set secure.aggregation to true, or leave {name} out"
                )
        return self


def check_secure(
    secure: SecureConfig,
    clients: int,
    round: RoundConfig,
    local: LocalConfig,
    wire: WireConfig,
    pruning: PruningConfig,
    privacy: PrivacyConfig,
    theory: TheoryConfig,
) -> None:
    """Raise a `ValueError` where the other settings need what sums alone do not tell."""
    if not secure.aggregation:
        if privacy.noise == "clients":
            raise ValueError(
                "privacy.noise: clients needs secure.aggregation = true: a client's share of the "
                "noise does not hide its own difference, which the server would see"
            )
        return
    factor = None if round.norm_factor == "auto" else round.norm_factor
    lossless = not wire.differences or wire.down == "fp32"
    wanted: dict[str, tuple[Any, Any, str]] = {
        "round.mode": (
            round.mode,
            "synchronous",
            "clients that train on different theta share no masks",
        ),
        "round.aggregation": (
            round.aggregation,
            "mean",
            "other averages need every update by itself",
        ),
        "round.over_select": (
            round.over_select,
            0,
            "whoever is left out at the end counts as lost, and costs coordinates",
        ),
        "round.max_norm": (round.max_norm, None, "the server sees no update's norm"),
        "round.norm_factor": (factor, None, "the server sees no update's norm"),
        "privacy.noise": (
            "clients" if privacy.clip is None else privacy.noise,
            "clients",
            "the server clips each difference again before it adds noise, and sees none",
        ),
        "theory.every": (theory.every or None, None, "it measures single clients' gradients"),
        "wire.down": (
            "fp32" if lossless else wire.down,
            "fp32",
            "with wire.differences a client adds its difference to theta_r itself",
        ),
    }
    if secure.losses == "summed":
        counts = "uniform", "secure.losses = summed hides the clients' numbers of images"
        wanted["round.weighting"] = round.weighting, *counts
        if local.state == "shared":
            why = "with secure.losses = summed nobody knows how many steps a client has taken"
            wanted["local.epochs"] = local.epochs, None, why
    for key, (value, needed, why) in wanted.items():
        if value != needed:
            raise ValueError(
                f"secure.aggregation: it needs {key} = {_typed(needed)} (not {_typed(value)}): "
                f"{why}"
            )
    if privacy.clip is not None:
        _check_noise(secure, privacy.clip, privacy.noise_multiplier, round.fraction, clients)
    _check_group(secure, max(1, int(round.fraction * clients + 0.5)), clients, pruning)


def _check_noise(
    secure: SecureConfig, clip: float, multiplier: float, fraction: float, clients: int
) -> None:
    """Refuse noise of clients that would have no guarantee, or that the sums have no room for."""
    if fraction < 1:
        raise ValueError(
            f"privacy.noise: clients needs round.fraction = 1 (not {fraction:g}): under secure "
            "aggregation all know who takes part, so that a draw would hide nobody"
        )
    share = multiplier * clip / secure.least**0.5
    if share < 2.0**-30:
        raise ValueError(
            f"privacy.noise: each client's share would have the standard deviation {share:.3g} "
            f"(noise_multiplier {multiplier:g}, clip {clip:g}, secure.least {secure.least}), and "
            f"it must be at least {2.0**-30:.3g}, some steps of the fixed-point numbers; raise "
            "privacy.clip or privacy.noise_multiplier"
        )
    largest = clients * clip + 10 * share * clients**0.5
    if largest >= 2.0**22:
        raise ValueError(
            f"privacy.noise: sums with noise could be as large as {largest:.3g}, and the "
            f"fixed-point numbers have room for {2.0**22:.3g}; lower privacy.clip or "
            "privacy.noise_multiplier, or raise secure.least"
        )


def _check_group(secure: SecureConfig, asked: int, clients: int, pruning: PruningConfig) -> None:
    """Refuse groups in which sums could never be opened, or would hide nothing."""
    if asked < max(secure.least, 2):
        raise ValueError(
            f"secure.aggregation: a round asks {asked} of clients = {clients} "
            f"(round.fraction), and a sum needs {max(secure.least, 2)} (secure.least); ask "
            "more clients"
        )
    if secure.neighbours is None:
        return
    if not _whole(pruning):
        raise ValueError(
            f"secure.neighbours: {secure.neighbours} cannot be chosen with pruning.kind = "
            f"{pruning.kind!r} and clients that keep a part of the network: under unequal masks "
            "two clients that share no secret could be the only ones that keep a coordinate. "
            "Leave it out: then all are neighbours. Or set pruning.kind to full"
        )
    if secure.neighbours > asked - 1:
        raise ValueError(
            f"secure.neighbours: {secure.neighbours} are more than the {asked - 1} others that a "
            "round asks (clients, round.fraction). Leave it out, and all of them are neighbours"
        )


def _whole(pruning: PruningConfig) -> bool:
    """Whether it is known before the run that every client keeps the whole network."""
    if pruning.kind == "full" or pruning.baseline is not None:
        return True
    ratios = pruning.keep if isinstance(pruning.keep, tuple) else (pruning.keep or 1.0,)
    built_in = not is_own(pruning.kind)
    return built_in and pruning.budget == "level" and pruning.level == "F" and min(ratios) == 1


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return "null" if value is None else str(value)
