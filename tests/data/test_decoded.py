"""Image files are decoded once for all processes, and what is cached is never taken for another."""

from __future__ import annotations

import multiprocessing
import os
import stat
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.data import image_folder, load_dataset
from fed_diffusion.data.decoded import HEADER, decoded
from tests.data.test_image_folder import config, noise, save


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded, as they are."""
    names: list[str] = []
    read = image_folder.read_image

    def counted(path: Path, *more: object) -> object:
        names.append(path.name)
        return read(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(image_folder, "read_image", counted)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        save(tmp_path / "images", f"{i}.png", noise(8, 8, seed=i))
    return tmp_path / "images"


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.images"))


def test_a_folder_is_decoded_once(folder: Path, reads: list[str], cache: Path) -> None:
    first = load_dataset(config(folder))
    second = load_dataset(config(folder))
    assert sorted(reads) == [f"{i}.png" for i in range(5)]
    assert torch.equal(first.images, second.images)
    assert np.array_equal(first.images[:, 0].numpy(), [noise(8, 8, seed=i) for i in range(5)])
    (file,) = files(cache)
    assert file.stat().st_size == HEADER + 5 * 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {path.name for path in cache.iterdir()} == {file.name, f".{file.name[:32]}.lock"}


def test_who_writes_into_the_images_changes_nobody_elses(folder: Path) -> None:
    mine, yours = load_dataset(config(folder)).images, load_dataset(config(folder)).images
    before = yours.clone()
    mine.zero_()
    assert torch.equal(yours, before)
    assert torch.equal(load_dataset(config(folder)).images, before)


def replace_keeping_the_date(folder: Path) -> None:
    before = (folder / "3.png").stat()
    save(folder, "new.png", noise(8, 8, seed=99))
    os.replace(folder / "new.png", folder / "3.png")
    os.utime(folder / "3.png", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "one more": lambda folder: save(folder, "6.png"),
    "one less": lambda folder: (folder / "2.png").unlink(),
    "renamed": lambda folder: (folder / "2.png").rename(folder / "20.png"),
    "other pixels": lambda folder: save(folder, "2.png", noise(8, 8, seed=77)),
    "other pixels of the old date": replace_keeping_the_date,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_has_changed_is_decoded_again_and_the_old_file_removed(
    change: str, folder: Path, reads: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_dataset(config(folder))
    old = files(cache)
    time.sleep(0.01)  # file systems' clocks tick
    CHANGES[change](folder)
    reads.clear()
    found = load_dataset(config(folder))
    assert len(reads) == len(found) == len(list(folder.iterdir()))
    assert files(cache) != old
    assert len(files(cache)) == 1
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "0")
    assert torch.equal(found.images, load_dataset(config(folder)).images)


def test_other_settings_have_a_file_of_their_own(folder: Path, cache: Path) -> None:
    for i, given in enumerate(
        ({}, {"channels": 3}, {"size": 16, "pad": 16}, {"background": "white"}, {"crop": 8})
    ):
        load_dataset(config(folder, **given))
        assert len(files(cache)) == i + 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[HEADER + 100] ^= 1
    path.write_bytes(content)


def spoil_the_header(path: Path) -> None:
    path.write_bytes(b"[" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, spoil_the_header])
def test_a_damaged_file_is_made_again_with_a_warning(
    damage: Callable[[Path], None], folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = load_dataset(config(folder)).images.clone()
    damage(files(cache)[0])
    assert torch.equal(load_dataset(config(folder)).images, images)
    assert "damaged" in caplog.text
    caplog.clear()
    assert torch.equal(load_dataset(config(folder)).images, images)
    assert caplog.text == ""


def test_files_that_cannot_be_used_leave_nothing_behind(folder: Path, cache: Path) -> None:
    (folder / "3.png").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="1 images of 5"):
        load_dataset(config(folder))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed(folder: Path, cache: Path) -> None:
    load_dataset(config(folder))
    (file,) = files(cache)
    left = cache / f".{file.name[:32]}-left"
    left.write_bytes(b"half")
    file.unlink()
    load_dataset(config(folder))
    assert not left.exists()


@pytest.mark.parametrize("where", ["a file", "no home"])
def test_a_cache_that_cannot_be_written_costs_the_cache_alone(
    where: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" if where == "a file" else "~nobody-of-this-name/cache"
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(root))
    assert len(load_dataset(config(folder))) == 5
    assert "cached" in caplog.text


def test_the_cache_is_bounded_and_keeps_what_was_used_last(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (10, 1, 10, 10)  # 1,000 bytes behind a header of 4,096

    def chunks() -> Iterator[np.ndarray]:
        yield np.zeros(shape, np.uint8)

    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "12e-6")
    for i, key in enumerate("ab"):
        decoded(key, "1", shape, chunks)
        os.utime(cache / f"{key}-1.images", (i, i))
    decoded("a", "1", shape, chunks)
    decoded("c", "1", shape, chunks)
    assert [path.name for path in files(cache)] == ["a-1.images", "c-1.images"]
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "5e-6")
    assert decoded("d", "1", shape, chunks).shape == shape  # larger than all that is allowed
    assert len(files(cache)) == 2


@pytest.mark.parametrize("value", ["-1", "much", "inf", "nan"])
def test_a_bound_that_is_no_number_of_gigabytes_is_said_and_nothing_cached(
    value: str,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", value)
    assert len(load_dataset(config(folder))) == 5
    assert f"FED_DIFFUSION_IMAGE_CACHE_GB = '{value}' is not allowed" in caplog.text
    assert not cache.exists()


def load_when_both_are_there(folder: Path, both: Barrier, found: Queue[int]) -> None:
    both.wait()
    found.put(int(load_dataset(config(folder)).images.sum()))


def test_of_two_processes_that_begin_at_once_one_decodes(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5, 300):
        save(folder, f"{i}.png", noise(8, 8, seed=i))
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "0")
    total = int(load_dataset(config(folder)).images.sum())
    monkeypatch.setenv("FED_DIFFUSION_IMAGE_CACHE_GB", "1")
    # forked, so that the count of what is decoded goes with each
    context = multiprocessing.get_context("fork")
    both, found, read = context.Barrier(2), context.Queue(), context.Value("i", 0)
    real = image_folder.read_image

    def counted(*given: object) -> object:
        with read.get_lock():
            read.value += 1
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(image_folder, "read_image", counted)
    given = (folder, both, found)
    processes = [context.Process(target=load_when_both_are_there, args=given) for _ in range(2)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60), found.get(timeout=60)] == [total, total]
    for process in processes:
        process.join()
    assert read.value == 300
    assert len(files(cache)) == 1
