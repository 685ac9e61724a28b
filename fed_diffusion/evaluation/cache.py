"""Features of reference sets on disk, so that 50,000 images pass an extractor only once.

They are kept in the folder `features` of the caches; see `fed_diffusion.common.caches`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fed_diffusion.common.caches import cache_root
from fed_diffusion.config.schema import ConfigError
from fed_diffusion.store.files import fresh_file

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return the folder of the features; raise `ConfigError` if the home directory is unknown."""
    return cache_root() / "features"


def cached(key: str, n: int, compute: Callable[[], Tensor]) -> Tensor:
    """Return what `compute` gives, [n, d]; read it from the disk if it is there under `key`.

    A file that cannot be read is computed again, with a warning; a disk that cannot be written to
    costs the cache and nothing else, as does a system that knows no home directory.
    """
    try:
        path = cache_dir() / f"{key}.safetensors"
    except ConfigError as error:
        logger.warning("features are not cached: %s", error)
        return compute()
    if path.is_file():
        try:
            found = load_file(path)["features"]
            if found.ndim == 2 and len(found) == n and bool(torch.isfinite(found).all()):
                return found
            problem = f"their shape is {list(found.shape)}"
        except (OSError, SafetensorError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        logger.warning("the cached features %s are damaged (%s): computed again", path, problem)
    features = compute()
    try:
        _write(path, save({"features": features.contiguous()}))
    except OSError as error:
        logger.warning("features cannot be cached in %s: %s", path.parent, error)
    return features


def _write(path: Path, content: bytes) -> None:
    """Write the content whole or not at all, also where several processes write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file, fresh = fresh_file(path.parent, "features")
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
    except BaseException:
        fresh.unlink()
        raise
    os.replace(fresh, path)
