"""A folder of image files as one uint8 array, every file decoded and checked on the way."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.config.yaml import expanded
from fed_diffusion.data.captions import METADATA, read_captions
from fed_diffusion.data.decode import EXTENSIONS, BadImage, read_image
from fed_diffusion.data.decoded import decoded
from fed_diffusion.data.fit import HOW, fit

FORMAT = "1"  # of what is cached: another number where the same files are decoded otherwise
WITHOUT_CLASSES = "for images without classes set model.conditional=false"
SHOWN = 5  # how many unusable files an error lists
CHUNK = 256  # files per unit of work of a thread
LEFT_BEHIND = frozenset(
    (
        *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "recycler", "system volume information"),
        *("lost+found", "lost.dir"),  # Linux, Android
        *("@eadir", "#recycle", "#snapshot", "@tmp", "@recycle", "@recently-snapshot"),  # NAS
        *("__pycache__", METADATA),
    )
)
"""Names, in lower case, that systems leave in folders; they and hidden files are not data."""


class FolderImages(NamedTuple):
    """The content of a folder of images.

    Attributes
    ----------
    images
        uint8 [n, C, H, W].
    labels, folder_of
        int64 [n], which of `class_names` and of `folders` each image is of; None without those.
    notes
        What was left out, as whole sentences.
    captions
        See `read_captions`.
    """

    images: np.ndarray
    labels: np.ndarray | None
    folders: tuple[str, ...] | None
    folder_of: np.ndarray | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    captions: tuple[str, ...] | None


class _File(NamedTuple):
    path: Path
    category: str | None
    client: int


class _Tree(NamedTuple):
    """The image files in a folder, and what else was found there.

    Attributes
    ----------
    classes
        Class name -> the files in its folders that are not read, by kind.
    clients
        Names of the client folders.
    skipped
        All files that are not read, by kind.
    """

    files: list[_File]
    classes: dict[str, Counter[str]]
    clients: tuple[str, ...] | None
    skipped: Counter[str]


def read_folder(config: DataConfig, shape: tuple[int, int, int], own: bool = False) -> FolderImages:
    """Read every image below `config.dir`, in the order of the names.

    The layout is a flat folder of images or one sub-folder per class. With ``partition: folders``
    the first level is one folder per client, each of them laid out like that. Clients are numbered
    in the (plain string) order of their names; so are classes, unless data.class_names says their
    order. Hidden names and `LEFT_BEHIND` are ignored; other files that are not images are counted.

    Parameters
    ----------
    shape
        (C, H, W) that every image must have; other colour modes are converted to C channels.
    own
        The folder is one client's of several, which need not have images of every class.

    Raises
    ------
    ConfigError
        The message names data.dir, the files, what they are, what is expected and how to fix it.
    """
    root = _root(config)
    tree = _listed(root, config.partition == "folders")
    if not tree.files:
        raise _bad(
            root,
            f"holds no image of the kinds {', '.join(EXTENSIONS)}{_but_found(tree)}",
        )
    names = _class_names(root, config, tree, own)
    index = {name: i for i, name in enumerate(names)}
    labels = [index[file.category] for file in tree.files if file.category is not None]
    owners = np.array([file.client for file in tree.files], dtype=np.int64)
    paths = [file.path for file in tree.files]
    captions, unread = read_captions(root, paths)
    return FolderImages(
        images=_decode_all(root, paths, shape, config),
        labels=np.array(labels, dtype=np.int64) if names else None,
        folders=tree.clients,
        folder_of=None if tree.clients is None else owners,
        class_names=names or None,
        notes=_notes(root, tree) + unread,
        captions=captions,
    )


def list_folder(root: Path) -> tuple[list[Path], Counter[str]]:
    """Return the image files of a folder or its class folders, and a count of other files by kind.

    Raises
    ------
    ConfigError
        The folder cannot be listed, or its layout is not one that is read.
    """
    tree = _listed(root, by_client=False)
    return [file.path for file in tree.files], tree.skipped


def counted(skipped: Mapping[str, int]) -> str:
    """Return a count as in `40 .tiff, 2 .gif`, the most frequent kind first."""
    kinds = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in kinds)


def _notes(root: Path, tree: _Tree) -> tuple[str, ...]:
    if not tree.skipped:
        return ()
    total = tree.skipped.total()
    return (
        f"{root} has {total} file{'s' if total > 1 else ''} beside the {len(tree.files)} images "
        f"that were not read: {counted(tree.skipped)}. Images are read from "
        f"{', '.join(EXTENSIONS)}; convert others that you want to train on.",
    )


def _but_found(tree: _Tree) -> str:
    return f" (and found {counted(tree.skipped)}: convert them)" if tree.skipped else ""


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


def _class_names(root: Path, config: DataConfig, tree: _Tree, own: bool) -> tuple[str, ...]:
    """Return the classes in the order of their labels, after every check; () without classes."""
    found = sorted(tree.classes)
    with_images = {file.category for file in tree.files}
    for name in found:
        skipped = tree.classes[name]
        if name not in with_images and (skipped or not own):
            what = f" (but {counted(skipped)})" if skipped else ""
            raise _bad(
                root,
                f"has the class folder {name!r} with no image in it{what}; looked for "
                f"{', '.join(EXTENSIONS)}. Put images there, or remove the folder",
            )
    if config.class_names is None:
        _check_number(root, config.classes, len(found))
        return tuple(found)
    wanted = tuple(unicodedata.normalize("NFC", name) for name in config.class_names)
    if unknown := [name for name in found if name not in wanted]:
        raise _bad(
            root,
            f"has the class folder {unknown[0]!r}, which is not in data.class_names = "
            f"{', '.join(config.class_names)}; rename or remove it, or change data.class_names",
        )
    missing = [name for name in wanted if name not in found]
    if missing and (not own or not found):
        raise _bad(
            root,
            f"has no class folder {missing[0]!r}, which is in data.class_names; sort the images "
            "into a folder per class, or change data.class_names. Images without classes need "
            "model.conditional=false and data.class_names=null",
        )
    return wanted


def _check_number(root: Path, wanted: int | None, found: int) -> None:
    if wanted is None or wanted == found:
        return
    has = f"{found} class folders" if found else "no class folders"
    raise _bad(
        root,
        f"has {has}, but data.classes = {wanted}; "
        + (f"set data.classes to {found}" if found else f"{WITHOUT_CLASSES} and data.classes=null")
        + f", or sort the images into {wanted} folders",
    )


def _listed(root: Path, by_client: bool) -> _Tree:
    try:
        return _scan_clients(root) if by_client else _scan_client(root, root, 0)
    except OSError as error:
        raise _bad(root, f"cannot be listed ({error})") from error


def _scan_clients(root: Path) -> _Tree:
    """Return the tree of a folder with one folder per client."""
    loose, folders, skipped = _entries(root)
    if loose:
        raise _bad(
            root,
            f"holds {loose[0].name!r} beside the client folders, and data.partition = 'folders' "
            "cannot tell whose it is; move it into the folder of a client",
        )
    files: list[_File] = []
    classes: dict[str, Counter[str]] = defaultdict(Counter)
    for client, folder in enumerate(folders):
        part = _scan_client(root, folder, client)
        if not part.files:
            raise _bad(
                root, f"has the client folder {folder.name!r} with no image in it{_but_found(part)}"
            )
        files += part.files
        for name, kinds in part.classes.items():
            classes[name] += kinds
        skipped += part.skipped
    if classes and any(file.category is None for file in files):
        flat = next(folders[file.client].name for file in files if file.category is None)
        raise _bad(
            root,
            f"has class sub-folders in some client folders and none in {flat!r}; use them in "
            "all, or, where not every image has a class, in none and model.conditional=false",
        )
    return _Tree(files, classes, tuple(folder.name for folder in folders), skipped)


def _scan_client(root: Path, folder: Path, client: int) -> _Tree:
    """Return the tree of a flat folder, or of one with class sub-folders."""
    loose, folders, skipped = _entries(folder)
    if loose and folders:
        raise _bad(
            root,
            f"holds {loose[0].name!r} and the sub-folder {folders[0].name!r} side by side in "
            f"{folder.name!r}; use class sub-folders only, or, where not every image has a class, "
            "images only and model.conditional=false",
        )
    files = [_File(path, None, client) for path in loose]
    classes: dict[str, Counter[str]] = {}
    for category in folders:
        images, deeper, others = _entries(category)
        if deeper:
            raise _bad(
                root,
                f"is one level too deep at {str(deeper[0].relative_to(root))!r}; expected images "
                "in one folder per class. If the first level is one folder per client, set "
                "data.partition = 'folders'",
            )
        # file systems spell the same accented name in two ways
        name = unicodedata.normalize("NFC", category.name)
        files += [_File(path, name, client) for path in images]
        classes[name] = classes.get(name, Counter()) + others
        skipped += others
    return _Tree(files, classes, None, skipped)


def _entries(folder: Path) -> tuple[list[Path], list[Path], Counter[str]]:
    """Return the images and sub-folders directly in `folder`, and a count of its other files."""
    images, folders, others = [], [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif not entry.is_file() and os.path.exists(entry):
                others["device or pipe"] += 1
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
            else:
                others[Path(entry).suffix.lower() or "without extension"] += 1
    # names are sorted and not paths, which takes a second for 50,000 of them
    paths, deeper = ([folder / name for name in sorted(names)] for names in (images, folders))
    return paths, deeper, others


def _decode_all(
    root: Path, paths: list[Path], shape: tuple[int, int, int], config: DataConfig
) -> np.ndarray:
    """Return the files as one array [n, C, H, W]; all files that cannot be used end in one
    error.
    """
    how = {key: getattr(config, key) for key in ("background", "crop", "resize", "pad")}
    what = [str(root.resolve()), *map(str, shape), json.dumps(how), PIL.__version__, FORMAT]
    state = _hash(f"{path}|{_stamp(path)}" for path in paths)
    chunks = partial(_decoded, root, paths, shape, config)
    return decoded(_hash(what), state, (len(paths), *shape), chunks)


def _stamp(path: Path) -> str:
    """Return what changes when a file does; a file with an old date still has a new ctime."""
    try:
        stat = path.stat()
    except OSError:  # to be named with the others that cannot be read
        return "none"
    return f"{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def _hash(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(os.fsencode(line) + b"\0")
    return digest.hexdigest()[:32]


def _decoded(
    root: Path, paths: list[Path], shape: tuple[int, int, int], config: DataConfig
) -> Iterator[np.ndarray]:
    """Decode the files in order, a chunk at a time; raise the error after all were looked at."""
    problems: list[tuple[Path, str]] = []

    def decode(part: list[Path]) -> np.ndarray:
        images = np.empty((len(part), *shape), dtype=np.uint8)
        for i, path in enumerate(part):
            try:
                images[i] = fitted(path, shape, config)
            except BadImage as problem:
                problems.append((path, str(problem)))
        return images

    # PIL decodes outside the interpreter lock, so a few threads help
    threads = min(4, usable_cores())
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for start in range(0, len(paths), threads * CHUNK):
            cuts = range(start, min(start + threads * CHUNK, len(paths)), CHUNK)
            yield from pool.map(decode, [paths[cut : cut + CHUNK] for cut in cuts])
    if problems:
        problems.sort()
        raise _bad(root, "\n".join(_explain(root, problems, len(paths), shape)))


def fitted(source: Path | bytes, shape: tuple[int, int, int], config: DataConfig) -> np.ndarray:
    channels, height, width = shape
    changed = config.side is not None or config.crop is not None
    image = read_image(source, config.background, None if changed else (width, height))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    found = fit(pixels, config)
    if found.shape != shape:
        raise BadImage(f"is {image.width}x{image.height} pixels")
    return found


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
        f"data.size to the side that all images have, or have the run change them: {HOW}. "
        "Replace or remove broken ones"
    )
