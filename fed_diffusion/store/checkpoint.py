"""Checkpoints that survive a crash at any moment: the last two, each whole, checked when read.

checkpoint/            the newest: *.safetensors and state.json
checkpoint-previous/   the one before it
checkpoint-spoiled/    one that training could not go on from, if there was one

A checkpoint is written beside the others, synced to disk, and takes its place by renaming. Its
state holds the hash of every tensor file and of itself; one that is truncated or altered is
recognised, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fed_diffusion.store.files import save_tensors, sync

NEWEST, PREVIOUS, SPOILED = "checkpoint", "checkpoint-previous", "checkpoint-spoiled"
STATE = "state.json"
VERSION = 1
"""The version of a checkpoint's state.

It is raised when a state means something else than before, or when a run goes on differently from
the same state.
"""
TRIES, PAUSE_S = 5, 0.1
"""How often, and how many seconds apart, a checkpoint is looked for that is being replaced."""
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is missing or is not what was written; the message says which and why."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: groups of tensors by name, and a state of plain values."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write the newest checkpoint of a run; the one that was newest becomes the previous one.

    Parameters
    ----------
    run
        The run directory.
    tensors
        File name (without its ending) -> tensors by name.
    state
        Plain values, as JSON takes them.
    """
    fresh = run / f".checkpoint-{uuid.uuid4().hex[:12]}"
    fresh.mkdir()
    try:
        _write(fresh, tensors, state)
        _swap(run, fresh)
    finally:  # after an error, as of a full disk, what is half written takes no room
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(run: Path, fresh: Path) -> None:
    """Put the new checkpoint in its place; if this is cut off at any moment, one of the two is
    whole.
    """
    newest, previous, old = run / NEWEST, run / PREVIOUS, run / ".checkpoint-old"
    shutil.rmtree(old, ignore_errors=True)
    if newest.exists():
        if previous.exists():
            previous.rename(old)
        newest.rename(previous)
    fresh.rename(newest)
    sync(run)
    shutil.rmtree(old, ignore_errors=True)
    for left in run.glob(".checkpoint-*"):  # of a process that was killed while it wrote one
        shutil.rmtree(left, ignore_errors=True)


def set_back(run: Path) -> int:
    """Put the newest checkpoint aside, and the one before it in its place, if there is one.

    Returns
    -------
    int
        The round of the newest checkpoint from now on.
    """
    newest, previous, spoiled = run / NEWEST, run / PREVIOUS, run / SPOILED
    round = int(_read(previous if previous.exists() else newest).state["round"])
    if previous.exists():
        shutil.rmtree(spoiled, ignore_errors=True)
        newest.rename(spoiled)  # cut off here, the one before is what is read
        previous.rename(newest)
        sync(run)
    return round


def _write(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    hashes = {}
    for name, group in tensors.items():
        path = folder / f"{name}.safetensors"
        save_tensors(path, group)
        sync(path)
        hashes[path.name] = _hash_of(path)
    sealed = json.loads(json.dumps(dict(state) | {"sha256": hashes}))  # as it will be read
    (folder / STATE).write_text(json.dumps(sealed | {"seal": _seal(sealed)}), "utf-8")
    sync(folder / STATE)
    sync(folder)


def load_checkpoint(run: Path) -> Checkpoint:
    """Return the newest whole checkpoint, also while another process writes the next one.

    Raises
    ------
    CheckpointError
        No checkpoint is whole; the message says what is wrong with each.
    """
    for _ in range(TRIES):
        before, problems = _standing(run), []
        for folder in (run / NEWEST, run / PREVIOUS):
            try:
                checkpoint = _read(folder)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems and _standing(run) != before:
                break  # the folders were renamed while they were read
            for problem in problems:
                logger.warning("%s; the one before it is used", problem)
            return checkpoint
        if _standing(run) == before and (run / NEWEST).exists():
            break
        time.sleep(PAUSE_S)
    raise CheckpointError("; ".join(problems))


def _standing(run: Path) -> list[int | None]:
    """Return the folders of the newest checkpoint and the one before it, whatever their names."""
    paths = (run / NEWEST, run / PREVIOUS)
    found: list[int | None] = []
    for path in paths:
        try:
            found.append(path.stat().st_ino)
        except FileNotFoundError:
            found.append(None)
    return found


def _read(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE} is damaged: {error}") from error
    if not isinstance(state, dict) or state.pop("seal", None) != _seal(state):
        raise CheckpointError(f"{folder / STATE} was altered since it was written")
    tensors = {}
    for name, digest in state.pop("sha256").items():
        path = folder / name
        try:
            whole = path.is_file() and _hash_of(path) == digest
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if not whole:
            raise CheckpointError(f"{path} is missing, truncated or altered")
        tensors[path.stem] = load_file(path)
    return Checkpoint(tensors, state)


def _seal(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
