"""A folder of image files as one uint8 array, every file decoded and checked on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fed_diffusion.files import expanded
from fed_diffusion.hardware import usable_cores
from fed_diffusion.schema import ConfigError, DataConfig

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SHOWN = 5  # how many unusable files an error lists
CHUNK = 256  # files per unit of work of a thread
_DEEP_MODES = ("I", "F")  # PIL clips these to 255 on conversion, which would whiten the image


class FolderImages(NamedTuple):
    """What a folder holds: images uint8 [n, C, H, W]; labels and client indices int64 [n]."""

    images: np.ndarray
    labels: np.ndarray | None
    folders: tuple[str, ...] | None
    folder_of: np.ndarray | None


class _File(NamedTuple):
    path: Path
    category: str | None
    client: int


def read_folder(config: DataConfig, shape: tuple[int, int, int]) -> FolderImages:
    """Read every image below `config.dir`, in the order of the names.

    The layout is a flat folder of images or one sub-folder per class. With ``partition: folders``
    the first level is one folder per client, each of them laid out like that. Classes and clients
    are numbered in the (plain string) order of their names; names that begin with a dot or with
    two underscores are ignored.

    Parameters
    ----------
    shape
        (C, H, W) that every image must have; other colour modes are converted to C channels.

    Raises
    ------
    ConfigError
        Names data.dir, the files, what they are, what is expected and how to fix it.
    """
    root = _root(config)
    try:
        files, categories, clients = _scan(root, by_client=config.partition == "folders")
    except OSError as error:
        raise _bad(root, f"cannot be listed ({error})") from error
    if not files:
        raise _bad(root, f"holds no image; looked for {', '.join(EXTENSIONS)}")
    _check_classes(root, config, categories)
    index = {name: i for i, name in enumerate(categories)}
    labels = [index[file.category] for file in files if file.category is not None]
    owners = np.array([file.client for file in files], dtype=np.int64)
    return FolderImages(
        images=_decode_all(root, [file.path for file in files], shape),
        labels=np.array(labels, dtype=np.int64) if categories else None,
        folders=clients,
        folder_of=None if clients is None else owners,
    )


def _root(config: DataConfig) -> Path:
    if not config.dir:
        raise ConfigError(
            "data.dir is not set; data.name = 'image_folder' needs the folder of the images."
        )
    root = expanded(config.dir, "data.dir")
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise _bad(root, f"{what} (working directory: {Path.cwd()})")
    return root


def _bad(root: Path, what: str) -> ConfigError:
    return ConfigError(f"data.dir = {str(root)!r} {what}.")


def _check_classes(root: Path, config: DataConfig, categories: list[str]) -> None:
    if config.classes is None or config.classes == len(categories):
        return
    has = f"{len(categories)} class folders" if categories else "no class folders"
    raise _bad(
        root,
        f"has {has}, but data.classes = {config.classes}; set data.classes to "
        f"{len(categories) or 'null'}, or sort the images into {config.classes} folders",
    )


def _scan(root: Path, by_client: bool) -> tuple[list[_File], list[str], tuple[str, ...] | None]:
    """The image files with their class and client, the class names, and the client names."""
    if not by_client:
        files, names = _scan_client(root, root, 0)
        return files, sorted(names), None
    loose, folders = _entries(root)
    if loose:
        raise _bad(
            root,
            f"holds {loose[0].name!r} beside the client folders, and data.partition = 'folders' "
            "cannot tell whose it is; move it into the folder of a client",
        )
    files, names = [], set()
    for client, folder in enumerate(folders):
        own, found = _scan_client(root, folder, client)
        if not own:
            raise _bad(root, f"has the client folder {folder.name!r} with no image in it")
        files += own
        names |= found
    if names and any(file.category is None for file in files):
        flat = next(folders[file.client].name for file in files if file.category is None)
        raise _bad(
            root,
            f"has class sub-folders in some client folders and none in {flat!r}; use them in "
            "all or in none",
        )
    return files, sorted(names), tuple(folder.name for folder in folders)


def _scan_client(root: Path, folder: Path, client: int) -> tuple[list[_File], set[str]]:
    """The images of a flat folder, or of its class sub-folders together with their names."""
    loose, classes = _entries(folder)
    if loose and classes:
        raise _bad(
            root,
            f"holds {loose[0].name!r} and the sub-folder {classes[0].name!r} side by side in "
            f"{folder.name!r}; use images only, or class sub-folders only",
        )
    files = [_File(path, None, client) for path in loose]
    for category in classes:
        images, deeper = _entries(category)
        if deeper:
            raise _bad(
                root,
                f"is one level too deep at {str(deeper[0].relative_to(root))!r}; expected images "
                "in one folder per class. If the first level is one folder per client, set "
                "data.partition = 'folders'",
            )
        files += [_File(path, category.name, client) for path in images]
    return files, {category.name for category in classes}


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images and the sub-folders directly in `folder`, each sorted by name."""
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__")):
                continue  # .DS_Store, ._image.png, __MACOSX
            if entry.is_dir():
                folders.append(folder / entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(folder / entry.name)
    return sorted(images), sorted(folders)


def _decode_all(root: Path, paths: list[Path], shape: tuple[int, int, int]) -> np.ndarray:
    """Decode the files into one array [n, C, H, W]; all that cannot be used end in one error."""
    images = np.empty((len(paths), *shape), dtype=np.uint8)

    def decode(start: int) -> list[tuple[Path, str]]:
        found = []
        for i in range(start, min(start + CHUNK, len(paths))):
            problem = _decode(paths[i], images[i])
            if problem:
                found.append((paths[i], problem))
        return found

    # PIL decodes outside the interpreter lock, so a few threads help
    with ThreadPoolExecutor(max_workers=min(4, usable_cores())) as pool:
        problems = [
            item for found in pool.map(decode, range(0, len(paths), CHUNK)) for item in found
        ]
    if problems:
        raise _bad(root, "\n".join(_explain(root, problems, len(paths), shape)))
    return images


def _explain(
    root: Path, problems: list[tuple[Path, str]], total: int, shape: tuple[int, int, int]
) -> Iterator[str]:
    yield f"has {len(problems)} images of {total} that cannot be used:"
    for path, problem in problems[:SHOWN]:
        yield f"  {path.relative_to(root)} {problem}"
    if len(problems) > SHOWN:
        yield f"  and {len(problems) - SHOWN} more"
    side = shape[1]
    yield (
        f"Expected readable 8-bit images of {side}x{side} pixels (data.size = {side}). Set "
        "data.size to the side that all images have, or resize them; replace or remove broken ones"
    )


def _decode(path: Path, out: np.ndarray) -> str | None:
    """Decode one file into `out` [C, H, W]; what is wrong with it, or None."""
    channels, height, width = out.shape
    try:
        with Image.open(path) as image:
            if image.size != (width, height):
                return f"is {image.size[0]}x{image.size[1]} pixels"
            if image.mode.startswith(_DEEP_MODES):
                return f"has more than 8 bits per channel (mode {image.mode})"
            image.load()  # a cut-off file opens well and fails only here
            mode = "L" if channels == 1 else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # PIL: OSError, SyntaxError, ValueError, struct.error and others
        return f"cannot be read ({type(error).__name__}: {error})"
    out[...] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return None
