"""The real digits, and one thread: on busy cores several cost these tests ten times as much."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fed_diffusion.config.schema import DataConfig
from fed_diffusion.data.datasets import ImageSet, load_dataset


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="package")
def digits() -> ImageSet:
    return load_dataset(DataConfig(name="digits"))
