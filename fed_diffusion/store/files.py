"""Files of a run directory: written whole or not at all, and refused by name when damaged."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.config.schema import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENODEV,
    errno.ESTALE,
)
"""The errors of a file system that is full, read-only, broken, gone or closed to us."""


def fresh_file(folder: Path, name: str) -> tuple[int, Path]:
    """Yield a new hidden file beside `name`, open for writing, with the mode that the umask asks
    for.

    Files of tempfile can be read by their owner alone, and in a folder that people share they stay
    so when they take another file's place.
    """
    path = folder / f".{name}-{uuid.uuid4().hex[:12]}"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), path


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one.

    Parameters
    ----------
    durable
        Bring it to disk at once; not needed for what is out of date within seconds.
    """
    file, fresh = fresh_file(path.parent, path.name)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(fresh, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line and bring it to disk; where there is no room, no part of the line stays."""
    data = (line + "\n").encode()
    fresh = not path.exists()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)
    if fresh:
        sync(path.parent)


def sync(path: Path) -> None:
    """Have the operating system bring a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file.

    Raises
    ------
    OSError
        The file cannot be written; safetensors itself raises another kind of exception.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    _open_up(path)  # safetensors makes files that their owner alone can read


def _open_up(path: Path) -> None:
    """Give a file the mode that the umask asks for, as a new file beside it has it."""
    file, probe = fresh_file(path.parent, path.name)
    mode = stat.S_IMODE(os.fstat(file).st_mode)
    os.close(file)
    probe.unlink()
    path.chmod(mode)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    ConfigError
        The file cannot be read, or does not hold a JSON object.
    FileNotFoundError
        There is no such file.
    """
    try:
        found = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}. {MEND}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it holds no JSON object. {MEND}")
    return found


MEND = "Put the file back from a copy; where there is none, remove it."


def check_writable(path: Path, what: str) -> None:
    """Refuse a file that could not be written, before anything is computed for it.

    Raises
    ------
    ConfigError
        The file cannot be written; `what` is the option that named it.
    """
    if path.is_dir():
        raise ConfigError(f"{what} {path} is a folder; give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be written: {error.strerror or error}. Give another place."
        ) from error


def in_words(error: OSError, folder: Path | None = None) -> str:
    """Return what the operating system says, as a sentence.

    Parameters
    ----------
    folder
        The folder to name if the error does not name a file, as after a failed write.
    """
    where = error.filename or (folder if error.errno in DISK_ERRORS else None)
    if where is not None and error.strerror:
        return f"{where}: {error.strerror}."
    return f"{type(error).__name__}: {error}."
