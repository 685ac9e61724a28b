"""What happens to a run that ends early, for whatever reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fed_diffusion.config import ConfigError
from fed_diffusion.store.files import in_words
from fed_diffusion.store.locks import LockLost
from fed_diffusion.store.rundir import RunDir

logger = logging.getLogger(__name__)


class RunStopped(RuntimeError):
    """The run cannot go on now; its last checkpoint exists, and the message says how to resume."""


class RunDiverged(RunStopped):
    """Training diverged: a resumed run would diverge again, and the message says what to do."""


@contextmanager
def ending(
    run: RunDir, save_last: Callable[[], None], how_to_resume: Callable[[], str]
) -> Iterator[None]:
    """Save what can be saved of a run that ends in the block, write status.json, say how to resume.

    What fails meanwhile, as on a full disk, becomes a note of the error that ended the run, and
    never hides that error.

    Parameters
    ----------
    save_last
        A function that writes a checkpoint of the last round where there is none yet.
    how_to_resume
        A sentence with the last checkpoint and the command.
    """
    try:
        yield
    except LockLost:
        raise  # the directory is another process's now
    except BaseException as error:
        _try(run, error, save_last)
        stopped, reason = _told(run, error, how_to_resume())
        _try(run, error, lambda: run.write_status("stopped", reason))
        if stopped is error:
            raise
        raise stopped from error


def _told(run: RunDir, error: BaseException, how: str) -> tuple[BaseException, str]:
    """Return the error to raise and the reason for status.json; both say how to resume if one
    can.
    """
    if isinstance(error, RunDiverged):
        return error, str(error)
    if isinstance(error, RunStopped):
        stopped = RunStopped(f"{error} {how}")
    elif isinstance(error, OSError):
        stopped = RunStopped(f"{in_words(error, run.path)} {how}")
    elif isinstance(error, RuntimeError):  # as torch's, of a device
        stopped = RunStopped(f"{type(error).__name__}: {error} {how}")
    elif isinstance(error, SystemExit):  # Flower's way of ending a process, whatever its code
        return error, f"interrupted: the process was told to end (flwr stop, or a signal). {how}"
    else:
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            error.add_note(how)
        name = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        return error, f"{name}: {error}"
    return stopped, str(stopped)


def _try(run: RunDir, error: BaseException, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as second:
        error.add_note(f"Then: {in_words(second, run.path)}")
        logger.debug("while the run was stopped", exc_info=second)
    except LockLost as second:
        error.add_note(f"Then: {second}")
