"""What made a run: versions, commit, machine, command, date; no host and no user."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.version import __version__
from fed_diffusion.config.schema import ConfigError
from fed_diffusion.store.files import read_object, write_atomic

PROVENANCE = "provenance.json"
PACKAGES = ("torch", "torchvision", "flwr", "numpy")
GIT_S = 5.0
logger = logging.getLogger(__name__)


def add_session(path: Path, data: str | None) -> None:
    """Add this process, which begins or resumes a run, to the file.

    A file that is damaged stays as it is, with a warning: the run goes on without the note.
    """
    try:
        known = read_object(path).get("sessions")
    except FileNotFoundError:
        known = None
    except ConfigError as error:
        logger.warning("%s This start or resume of the run is not noted there.", error)
        return
    sessions = [*(known if isinstance(known, list) else []), provenance(data)]
    write_atomic(path, json.dumps({"sessions": sessions}, indent=2) + "\n")


def provenance(data: str | None = None) -> dict[str, Any]:
    """Return what this process is, as plain values.

    Parameters
    ----------
    data
        The hash of the images, where they are known.
    """
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command_line(sys.argv),
        "fed-diffusion": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "machine": machine(),
        "data": data,
    }


def command_line(argv: list[str]) -> str:
    """Return what was typed, with the home directory as ~, since that holds the user's name."""
    program, *words = argv
    shown = shlex.join(["fed-diffusion" if _ours(program) else Path(program).name, *words])
    return shown.replace(str(Path.home()), "~")


def _ours(program: str) -> bool:
    path = Path(program)
    return path.name == "fed-diffusion" or (
        path.name == "__main__.py" and path.parent.name in ("fed_diffusion", "cli")
    )


@cache
def commit() -> str | None:
    """Return the git commit of the source, with -dirty where files differ; None for a package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk: it is only a note
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Return the kind of machine this is."""
    import torch  # the version of fed-diffusion is asked for without it

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
