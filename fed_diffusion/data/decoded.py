"""Decoded image files in one memory-mapped file, so that no process decodes them a second time.

All processes of a machine map the same file: the images are in memory once, and need not fit in it.
The file is in the folder `images` of the caches (see `fed_diffusion.common.caches`), readable by
its user alone. It holds whatever the images show; $FED_DIFFUSION_IMAGE_CACHE_GB = 0 keeps nothing,
and every process then decodes into its own memory.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from fed_diffusion.common.caches import alone, cache_root
from fed_diffusion.config.schema import ConfigError

logger = logging.getLogger(__name__)
LIMIT_VARIABLE = "FED_DIFFUSION_IMAGE_CACHE_GB"
LIMIT_GB = 50.0
"""The gigabytes that all cached sets may take together; the least recently used ones go first."""
HEADER = 4096  # bytes before the pixels: a page, so that the pixels begin on one
PIECE = 2**24  # bytes that are looked at together
Shape = tuple[int, ...]
Chunks = Callable[[], Iterator[np.ndarray]]


def decoded(key: str, state: str, shape: Shape, chunks: Chunks) -> np.ndarray:
    """Return the images uint8 [n, C, H, W] that `chunks` decodes, from the cache if they are there.

    A damaged file is decoded again, with a warning; a disk that cannot be written to costs the
    cache and nothing else. Writing to the array changes neither the file nor what others see.

    Parameters
    ----------
    key
        What is decoded and how: the folder and all settings that matter.
    state
        A fingerprint of the files; what is cached under the same key in another state is removed.
    chunks
        Yields the images in order, in arrays [m, C, H, W]; whatever it raises is passed on, and
        nothing is cached then.
    """
    try:
        folder, limit = cache_root() / "images", _limit()
    except ConfigError as error:
        logger.warning("decoded images are not cached: %s", error)
        return _in_memory(shape, chunks)
    if math.prod(shape) + HEADER > limit:
        if limit:
            logger.warning(
                "the decoded images take %.1f GB, and %s allows %.1f: they are not cached",
                math.prod(shape) / 1e9,
                LIMIT_VARIABLE,
                limit / 1e9,
            )
        return _in_memory(shape, chunks)
    path = folder / f"{key}-{state}.images"
    found = _mapped(path, shape)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f".{key}.lock"):
            found = _mapped(path, shape)  # another process may have been at it
            if found is None:
                _remove(folder.glob(f"{key}-*"), folder.glob(f".{key}-*"))
                _write(path, key, shape, chunks)
                _bound(folder, path, limit)
                found = _mapped(path, shape)
    except OSError as error:
        logger.warning("decoded images cannot be cached in %s: %s", folder, error)
    return _in_memory(shape, chunks) if found is None else found


def _limit() -> float:
    """Return the limit in bytes."""
    given = os.environ.get(LIMIT_VARIABLE) or LIMIT_GB
    try:
        limit = float(given) * 1e9
    except ValueError:
        limit = -1
    if not 0 <= limit < math.inf:
        raise ConfigError(
            f"{LIMIT_VARIABLE} = {given!r} is not allowed: give a number of gigabytes, or "
            "0 to keep nothing."
        )
    return limit


def _in_memory(shape: Shape, chunks: Chunks) -> np.ndarray:
    images = np.empty(shape, dtype=np.uint8)
    start = 0
    for chunk in chunks():
        images[start : start + len(chunk)] = chunk
        start += len(chunk)
    return images


def _write(path: Path, key: str, shape: Shape, chunks: Chunks) -> None:
    """Write the images whole or not at all, with at most one chunk in this process's memory."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{key}-", delete=False) as file:
        try:
            file.write(bytes(HEADER))
            checksum = 0
            for chunk in chunks():
                content = np.ascontiguousarray(chunk).data
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.seek(0)
            file.write(json.dumps({"shape": list(shape), "crc32": checksum}).encode())
        except BaseException:
            file.close()
            _remove([Path(file.name)])
            raise
    os.replace(file.name, path)


def _mapped(path: Path, shape: Shape) -> np.ndarray | None:
    """Return the images of a file that is whole and of this shape; else None."""
    try:
        with path.open("rb") as file:
            header, size = _header(file), os.fstat(file.fileno()).st_size
            # copy on write: torch wants memory that could be written to
            right = header["shape"] == list(shape) and size == HEADER + math.prod(shape)
            images = np.memmap(file, np.uint8, "c", HEADER, shape) if right else None
        if images is not None and _checksum(images) == header["crc32"]:
            os.utime(path)  # so that those that are used stay
            return images
        problem = "its checksum does not match" if right else f"{size} bytes of {header['shape']}"
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = f"{type(error).__name__}: {error}"
    logger.warning("the decoded images in %s are damaged (%s): decoded again", path, problem)
    return None


def _header(file: IO[bytes]) -> dict[str, Any]:
    """Return what the file says of itself; nothing where the file is damaged."""
    try:
        header = json.loads(file.read(HEADER).rstrip(b"\0"))
    except ValueError:
        header = None
    return {"shape": None, "crc32": None} | (header if isinstance(header, dict) else {})


def _checksum(images: np.ndarray) -> int:
    content, checksum = images.reshape(-1), 0
    for start in range(0, len(content), PIECE):
        checksum = zlib.crc32(content[start : start + PIECE].data, checksum)
    return checksum


def _bound(folder: Path, newest: Path, limit: float) -> None:
    """Remove the sets that were unused for longest; a process that has one mapped keeps it."""
    total = 0
    sets = [(path.stat(), path) for path in folder.glob("*.images")]
    for stat, path in sorted(sets, key=lambda one: (one[1] != newest, -one[0].st_mtime)):
        total += stat.st_size
        if total > limit:
            _remove([path])


def _remove(*groups: Iterator[Path] | list[Path]) -> None:
    for group in groups:
        for path in group:
            if not path.name.endswith(".lock"):
                with suppress(OSError):  # in use on a system that does not let go
                    path.unlink()
