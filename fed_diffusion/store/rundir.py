"""The run directory: what is written where, and who may write there.

config.yaml          the resolved configuration: enough to repeat the run
metrics.jsonl        one line per round
checkpoint/          theta.safetensors, ema.safetensors, state.json; checkpoint-previous/ is the one
                     before it
samples/             round-0005.png ..., final.png; real.png, images of the data set beside them
results.json         the figures of a finished run; `evaluation` is the number of its own line in
evaluations.jsonl    every evaluation, the run's own and later ones, with its settings and its date
report.html          all of it on one page
privacy.jsonl        under privacy one line for each round that was opened, again or not
data.json            who holds how many images of which class, where the server has the data
budgets.json         what each client's node can carry, where nodes say it (pruning.budget)
status.json          how the run ended: finished, or stopped or failed and why
progress.json        what a run that is alive does at this moment, see `fed_diffusion.store.live`
provenance.json      what began and resumed the run: versions, commit, machine, command, date, and
                     the hash of the images
run.json             the run's id, which its checkpoints carry too
.run.<n>.lock        who is at the run now, see `fed_diffusion.store.locks`

Whoever writes there holds the lock: one process at a time, on whichever machine.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fed_diffusion.config import Config, ConfigError, build_config
from fed_diffusion.config.yaml import read_yaml
from fed_diffusion.store.checkpoint import (
    NEWEST,
    PREVIOUS,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from fed_diffusion.store.evaluations import EVALUATIONS
from fed_diffusion.store.files import write_atomic
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.store.locked_dir import LOCK_TOKEN as LOCK_TOKEN
from fed_diffusion.store.locked_dir import RunBusy as RunBusy
from fed_diffusion.store.locked_dir import RunTaken as RunTaken
from fed_diffusion.store.provenance import PROVENANCE, add_session
from fed_diffusion.store.run_files import RunFiles

DEFAULT_ROOT = "runs"
RESULTS = ("metrics.jsonl", NEWEST, PREVIOUS, "results.json")
"""A directory that holds one of these has a run in it."""
OTHERS = (
    *("config.yaml", "report.html", "budgets.json", "data.json", "privacy.jsonl"),
    *(PROVENANCE, EVALUATIONS, "samples/final.png", "samples/real.png"),
)


class RunDir(RunFiles):
    """The directory of one run: how it is claimed, its configuration and its checkpoints."""

    @classmethod
    def create(
        cls,
        path: str | Path | None,
        config: Config,
        data: str | None = None,
        root: str | Path = DEFAULT_ROOT,
    ) -> RunDir:
        """Claim a directory for a new run, lock it and write config.yaml and run.json.

        Parameters
        ----------
        path
            The directory. None stands for a new one, ROOT/<preset>-<time>, with a number behind it
            if other runs begin in the same second.
        data
            The hash of the images that the run is to train on, where they are known.

        Raises
        ------
        RunTaken
            The directory holds a run already, or files of the user's that are called as a run's
            are (nothing is ever overwritten), or, as `RunBusy`, another process is about to make a
            run there.
        ConfigError
            The directory cannot be written to.
        """
        run = None
        try:
            run = _claim_new(config.preset, Path(root)) if path is None else cls(path)
            run.path.mkdir(parents=True, exist_ok=True)
            run.lock()
            run.refuse_existing()
            for name in ("status.json", *([] if run.joined else [PROVENANCE])):
                (run.path / name).unlink(missing_ok=True)  # of one that never began
            (run.path / "samples").mkdir(exist_ok=True)
            if not run.joined or not (run.path / "run.json").exists():
                created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                identity = {"id": uuid.uuid4().hex, "created": created, "data": data}
                write_atomic(run.path / "run.json", json.dumps(identity, indent=2) + "\n")
                run.note_beginning(data)
            write_atomic(run.path / "config.yaml", config.to_yaml())
        except OSError as error:
            raise ConfigError(
                f"the run directory {run.path if run else root} cannot be made: "
                f"{error.strerror or error}. Give another directory (--out)."
            ) from error
        return run

    def refuse_existing(self) -> None:
        """Raise `RunTaken` where a new run would write over anything, of a run or of the user."""
        if any((self.path / name).exists() for name in RESULTS):
            raise RunTaken(f"{self.path} holds a run already; give another directory (--out).")
        if (self.path / "run.json").is_file() and "id" in self.identity():
            return  # of a run that never began
        for name in ("run.json", *OTHERS):
            if (self.path / name).exists():
                raise RunTaken(
                    f"{self.path} holds {name}, which is not from a run, and a new run would "
                    "write over; give another directory (--out)."
                )

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Return an existing run; raise `ConfigError` where there is none."""
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise ConfigError(f"{run.path} is not a run directory: it has no config.yaml.")
        return run

    # --- what is in it --------------------------------------------------------------------------

    def config(self) -> Config:
        path = self.path / "config.yaml"
        settings = read_yaml(path, "configuration")
        try:
            return build_config(settings)
        except ConfigError as error:
            raise ConfigError(f"{path} cannot be used: {error}") from error

    def write_config(self, config: Config) -> None:
        self.check_lock()
        write_atomic(self.path / "config.yaml", config.to_yaml())

    def note_beginning(self, data: str | None = None) -> None:
        """Add to provenance.json what begins or resumes this run.

        A ServerApp adds nothing: the command that started it has done so.

        Parameters
        ----------
        data
            The hash of the images, where they are known.
        """
        if self.joined:
            return
        self.check_lock()
        add_session(self.path / PROVENANCE, data)

    def has_checkpoint(self) -> bool:
        return any((self.path / folder).exists() for folder in (NEWEST, PREVIOUS))

    def save_checkpoint(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Write checkpoint/; see `fed_diffusion.store.checkpoint`."""
        self.check_lock()
        save_checkpoint(self.path, tensors, state)

    def load_checkpoint(self) -> Checkpoint:
        """Return the newest whole checkpoint; raise `ConfigError` where there is none."""
        try:
            return load_checkpoint(self.path)
        except CheckpointError as error:
            raise ConfigError(f"{self.path} cannot be read as a trained run: {error}.") from error

    def load_trained(self) -> Checkpoint:
        """Return the newest whole checkpoint; raise `ConfigError` where no round is finished."""
        checkpoint = self.load_checkpoint()
        if checkpoint.state.get("round") == 0:
            raise ConfigError(f"{self.path} cannot be read as a trained run: no round is finished.")
        return checkpoint

    def load_theta(self, *, ema: bool) -> dict[str, Tensor]:
        return self.load_trained().tensors["ema" if ema else "theta"]

    def read_rounds(self, last: int) -> tuple[list[RoundSummary], list[int]]:
        """Return the rounds of metrics.jsonl up to `last`, and the numbers of damaged lines.

        Of a repeated round the last line counts.
        """
        rounds: dict[int, RoundSummary] = {}
        damaged = []
        lines = self.metrics.read_bytes().split(b"\n") if self.metrics.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                summary = RoundSummary.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged.append(number)  # as the last one, where a process was killed
                continue
            if summary.round <= last:
                rounds[summary.round] = summary
        return [rounds[number] for number in sorted(rounds)], damaged

    def begin_again(self, rounds: Iterable[RoundSummary]) -> None:
        """Leave only these rounds in metrics.jsonl: what came after the checkpoint comes again."""
        self.check_lock()
        write_atomic(self.metrics, "".join(json.dumps(r.to_dict()) + "\n" for r in rounds))
        (self.path / "status.json").unlink(missing_ok=True)


def _claim_new(preset: str, root: Path) -> RunDir:
    """A directory that did not exist before and that nobody else has claimed."""
    stem = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return RunDir(path)
    raise AssertionError("there are numbers enough")
