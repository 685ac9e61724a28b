"""Images are decoded into a cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not below `tmp_path`, which many tests read as a folder of images."""
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(root))
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "1")
    return root / "images"
