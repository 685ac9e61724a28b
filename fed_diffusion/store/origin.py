"""What a run depends on, as its checkpoints hold it, and whether the run can go on from there.

A resumed run promises the bits that it would have ended with. That holds only for the same
settings, the same images and the same meaning of what is stored, so each checkpoint carries all
three, sealed, and everything is compared before anything is written. A trained model is sampled and
measured with the settings and images of its training, too, or not at all.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fed_diffusion.common.version import __version__
from fed_diffusion.config import Config, ConfigError, build_config, with_overrides
from fed_diffusion.config.schema import DataConfig
from fed_diffusion.store.checkpoint import Checkpoint
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.store.rundir import RunDir

CHANGEABLE = ("rounds", "evaluation", "worker", "flower", "trackers", "data.dir")
"""Settings and sections that may change on purpose.

Of data.dir only the place may change: the images in it are compared by their hash.
"""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """Where a run directory stands, once it is known that the run can go on."""

    config: Config
    checkpoint: Checkpoint | None
    """The newest checkpoint; None where no round was finished yet."""
    rounds: list[RoundSummary]
    changes: list[dict[str, Any]]
    """Settings that were changed on purpose, now and in earlier resumes."""
    changed: bool
    """Whether any of `changes` is new."""

    @property
    def round(self) -> int:
        return 0 if self.checkpoint is None else int(self.checkpoint.state["round"])


def origin_of(
    settings: dict[str, Any],
    data: str | None,
    run: RunDir,
    versions: Mapping[str, int],
    device: str,
) -> dict[str, Any]:
    """Return what a run depends on, as plain values.

    Parameters
    ----------
    settings
        The whole configuration: `Config.to_dict()`.
    data
        The hash of the images, where this process has them.
    versions
        Of the formats and of the arithmetic behind what is stored.
    device
        The type of device that the run computes on.
    """
    known = run.identity()
    return {
        "id": known.get("id"),
        "config": settings,
        "data": data or known.get("data"),
        "versions": dict(versions),
        "made_by": {
            "fed-diffusion": __version__,
            "torch": torch.__version__,
            "device": device,
        },
        "changes": [],
    }


def standing(
    run: RunDir,
    versions: Mapping[str, int],
    accept_changes: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Standing:
    """Read everything that a run goes on from, and write nothing.

    Parameters
    ----------
    versions
        As for `origin_of`.
    accept_changes
        Let through what can be changed on purpose (`CHANGEABLE`), and rounds that the record has
        lost.
    changes
        Dotted settings that are to have new values from here on, as they were typed: they need no
        other word, and are in the `config` that comes back, not in the directory yet.

    Raises
    ------
    ConfigError
        The run cannot go on; the message says what differs from its beginning, and what to do.
    """
    typed = dict(changes or {})
    config = run.config()
    _refuse_fixed(typed)
    config = with_overrides(config, typed) if typed else config
    finished = run.finished()
    if finished and not accept_changes and not typed:
        raise _nothing_left(run)
    if not run.has_checkpoint():
        _refuse_lost_checkpoints(run)
        return Standing(config, None, [], [], False)
    found = run.load_checkpoint()
    origin = found.state.get("origin")
    if not isinstance(origin, dict) or origin.get("versions") != versions:
        there = origin.get("versions") if isinstance(origin, dict) else "none"
        raise ConfigError(
            f"{run.path} cannot be resumed: its checkpoint was written by another version of "
            f"fed-diffusion (formats {there}, these are {dict(versions)}). Resume it with that "
            "version."
        )
    known = run.identity().get("id")
    if known is not None and known != origin["id"]:
        raise ConfigError(
            f"{run.path} cannot be resumed: its checkpoint is of another run ({origin['id']}; this "
            f"one is {known}, see run.json). Put this run's own checkpoint back."
        )
    round = int(found.state["round"])
    different = _differences(run, origin["config"], config.to_dict())
    if different:
        _refuse_changes(run, different, accept_changes, typed)
    if round > config.rounds:
        raise ConfigError(
            f"{run.path} has done {round} rounds, more than rounds = {config.rounds}; set rounds "
            f"to {round} to end it there, or higher to go on: "
            f"{resume_command(run.path, '--rounds', str(round))}"
        )
    if finished and round == config.rounds:
        raise _nothing_left(run)
    rounds = _recorded(run, round, accept_changes)
    new = [{"after_round": round, "key": k, "was": a, "is": b} for k, (a, b) in different.items()]
    return Standing(config, found, rounds, [*origin["changes"], *new], bool(new))


def trained(run: RunDir) -> tuple[Config, Checkpoint]:
    """Return the settings of a run and what was trained with them, to sample and measure with.

    Raises
    ------
    ConfigError
        No round is finished, or config.yaml is no longer what the parameters were trained with.
    """
    config, found = run.config(), run.load_trained()
    origin = found.state.get("origin")
    if isinstance(origin, dict):  # not of a version that noted none
        different = _differences(run, origin["config"], config.to_dict())
        if fixed := {key: pair for key, pair in different.items() if not _may_change(key)}:
            raise ConfigError(
                f"{run.path} cannot be used as it is: its config.yaml is not what its network was "
                f"trained with: {_changes(fixed)}. Put {', '.join(fixed)} back."
            )
    return config, found


def check_same_data(
    run: RunDir, settings: DataConfig, checkpoint: Checkpoint | None, data: str | None
) -> None:
    """Raise `ConfigError` for images that are not those of the run's beginning.

    Parameters
    ----------
    settings
        The section `data` of the run's configuration.
    checkpoint
        The run's checkpoint; None where there is none yet.
    data
        The hash of the images, where this process has them.
    """
    origin = run.identity() if checkpoint is None else checkpoint.state.get("origin", {})
    then = origin.get("data")
    if then is None or data is None:
        logger.info("%s: the images are not on this machine, and were not compared", run.path)
    elif then != data:
        raise ConfigError(
            f"{run.path} cannot be used as it is: the images of data.name = {settings.name!r}, "
            f"data.dir = {settings.dir!r} are not those that the run began with (SHA-256 "
            f"{data[:12]}, and it was {str(then)[:12]}): images, labels or their order have "
            "changed. Put the images back as they were, or begin a new run with the new ones."
        )


def note_where(run: RunDir, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of what may change bits and cannot be refused, such as a new version of torch."""
    differ = [f"{key} {then.get(key)} (now {now[key]})" for key in now if then.get(key) != now[key]]
    if differ:
        logger.warning(
            "%s was begun with %s: it may not end with the bits it would have ended with",
            run.path,
            ", ".join(differ),
        )


def resume_command(path: Path, *options: str, engine: str = "local") -> str:
    """Return the command to type to go on with a run, quoted for a shell.

    Parameters
    ----------
    engine
        The engine that goes on: local, flower, or deployment (a SuperLink that has the run).
    """
    if engine == "deployment":
        return shlex.join(["fed-diffusion", "deploy", "run", "OPERATOR", "--resume", str(path)])
    words = ["fed-diffusion", "resume", str(path), *options]
    return shlex.join([*words, "--engine", engine] if engine != "local" else words)


def _nothing_left(run: RunDir) -> ConfigError:
    return ConfigError(
        f"{run.path} is finished; there is nothing to resume. To measure it again: "
        f"{shlex.join(['fed-diffusion', 'evaluate', str(run.path)])}. For more rounds: "
        f"{resume_command(run.path, '--rounds', str(2 * run.config().rounds))}"
    )


def _refuse_lost_checkpoints(run: RunDir) -> None:
    begun = run.metrics.exists() and run.metrics.read_bytes().strip()
    if begun or (run.path / "results.json").exists():
        raise ConfigError(
            f"{run.path} cannot be resumed: its checkpoints are gone, though rounds were done "
            "(metrics.jsonl or results.json is there). Put checkpoint/ back from a copy, or begin "
            "a new run in another directory."
        )


def _differences(
    run: RunDir, then: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Key -> (value then, value now), of the settings that differ."""
    try:
        before = dict(_flat(build_config(then).to_dict()))  # with the defaults of today
    except ConfigError as error:
        raise ConfigError(
            f"{run.path} cannot be used: this version of fed-diffusion does not know the settings "
            f"that the run began with. {error}"
        ) from error
    after = dict(_flat(now))
    pairs = {key: (before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _refuse_fixed(typed: Mapping[str, Any]) -> None:
    """Refuse settings that were typed anew and may not change."""
    for key in typed:
        if not _may_change(key):
            raise ConfigError(
                f"{key} cannot be changed in a run that has begun: every result depends on it. "
                f"These settings can be changed: {', '.join(CHANGEABLE)}. For another {key} begin "
                "a new run."
            )


def _refuse_changes(
    run: RunDir,
    different: Mapping[str, tuple[Any, Any]],
    accept: bool,
    typed: Mapping[str, Any],
) -> None:
    fixed = [key for key in different if not _may_change(key)]
    if not fixed and (accept or all(_stands_in(key, typed) for key in different)):
        return
    if not fixed:
        different = {k: pair for k, pair in different.items() if not _stands_in(k, typed)}
    if fixed:
        how = f"Put {', '.join(fixed)} back, or begin a new run: every result depends on these."
    else:
        how = f"If that is on purpose: {resume_command(run.path, '--accept-changes')}"
    raise ConfigError(
        f"{run.path} cannot be resumed as it is: its config.yaml is not what the run began with: "
        f"{_changes(different)}. {how}"
    )


def _may_change(key: str) -> bool:
    return _stands_in(key, CHANGEABLE)


def _stands_in(key: str, others: Iterable[str]) -> bool:
    """Return whether a key is one of the others, or in a section that is."""
    return any(key == one or key.startswith(f"{one}.") for one in others)


def _changes(different: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} = {now!r} (it was {then!r})" for key, (then, now) in different.items())


def _recorded(run: RunDir, round: int, accept: bool) -> list[RoundSummary]:
    rounds, damaged = run.read_rounds(round)
    lost = sorted(set(range(1, round + 1)) - {summary.round for summary in rounds})
    if not lost:
        return rounds
    lines = f" (damaged: line {', '.join(map(str, damaged))})" if damaged else ""
    if accept and rounds:
        logger.warning("%s lacks rounds %s%s", run.metrics, _listed(lost), lines)
        return rounds
    how = "Put them back from a copy"
    if rounds:
        how += (
            "; or go on without them, so that the sums in results.json lack them too: "
            + resume_command(run.path, "--accept-changes")
        )
    raise ConfigError(
        f"{run.path} cannot be resumed as it is: metrics.jsonl lacks rounds {_listed(lost)}{lines} "
        f"of the {round} that its checkpoint has done. {how}"
    )


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return f"{shown}, ... ({len(numbers)} in all)" if len(numbers) > 20 else shown
