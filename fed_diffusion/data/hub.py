"""Data sets of the package datasets: names on the Hub, and local files in parquet or folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.config.section import HUB
from fed_diffusion.data.decode import BadImage
from fed_diffusion.data.decoded import decoded
from fed_diffusion.data.fit import HOW
from fed_diffusion.data.image_folder import CHUNK, FORMAT, SHOWN, fitted
from fed_diffusion.data.image_set import ImageSet

INSTALL = "pip install 'fed-diffusion[hf]'"
TYPICAL = {"image": ("image", "img"), "label": ("label", "labels")}
"""The usual names of columns, where several could be meant."""
TEXTS = ("text", "caption", "captions")
"""The usual names of the column of captions."""


def load_hub(config: DataConfig, shape: tuple[int, int, int], split: str, own: bool) -> ImageSet:
    """Load what data.name = hf:NAME-OR-PATH names.

    The images are in the column of type Image, the classes in that of type ClassLabel, or in the
    column `label`, as whole numbers from 0 or as names. Captions are in the first column of `TEXTS`
    that holds texts, or lists of them, of which the first counts.

    Parameters
    ----------
    split
        test, or train; a set of one split has all its images there.
    own
        The images are one client's of several, which need not have some of every class.

    Raises
    ------
    ConfigError
        The package is missing; there is no such set, split or column; an image cannot be used.
    """
    splits = _opened(config.name)
    if split not in splits and len(splits) > 1:
        raise ConfigError(
            f"data.name = {config.name!r} has no split {split!r}; it has {', '.join(splits)}."
        )
    rows = splits.get(split) or next(iter(splits.values()))
    image = _column(config.name, rows, "image")
    if image is None:
        raise ConfigError(
            f"data.name = {config.name!r} has no column of images; its columns are "
            f"{', '.join(rows.column_names)}."
        )
    label = _column(config.name, rows, "label")
    labels, names = (None, None) if label is None else _labels(config, rows, label, own)
    images = torch.from_numpy(_images(config, shape, rows, image))
    try:
        made = ImageSet(images, name=config.name, captions=_captions(rows))
        return made if labels is None else replace(made, labels=labels, class_names=names)
    except ValueError as error:
        raise ConfigError(f"data.name = {config.name!r}: {error}.") from error


def has_test(config: DataConfig) -> bool:
    """Whether the set has a test split of its own."""
    splits = _opened(config.name)
    return len(splits) > 1 and "test" in splits


def _opened(name: str) -> dict[str, Any]:
    """The splits of a set by name, none of their images decoded."""
    if find_spec("datasets") is None:
        raise ConfigError(f"data.name = {name!r} needs the package datasets: {INSTALL}.")
    import datasets

    source = name.removeprefix(HUB)
    path = Path(source).expanduser()
    try:
        if path.is_dir() and any((path / f"{kind}.json").is_file() for kind in SAVED):
            found = datasets.load_from_disk(str(path))
        elif path.is_file():
            found = datasets.load_dataset(str(path.parent), data_files=path.name)
        else:
            found = datasets.load_dataset(str(path) if source[:1] in ("~", ".", "/") else source)
    except Exception as error:  # no such set, no network, a damaged file: datasets says which
        raise ConfigError(
            f"data.name = {name!r} cannot be opened ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Give a name on the Hub, as in hf:ylecun/mnist, or a "
            "parquet file, a folder of them, a folder of images or a saved data set, as in "
            "hf:./mine."
        ) from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


SAVED = ("dataset_dict", "state")
"""The files that tell a folder of `save_to_disk`."""


def _column(name: str, rows: Any, what: str) -> str | None:
    """The column of the images or of the classes; None where there is none."""
    import datasets

    kind = datasets.Image if what == "image" else datasets.ClassLabel
    found = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    usual = [column for column in TYPICAL[what] if column in (found or rows.column_names)]
    if len(found) > 1 and not usual:
        raise ConfigError(
            f"data.name = {name!r} has several columns of type {kind.__name__}: "
            f"{', '.join(found)}. Rename the one that is meant to {what!r}, or load the set by a "
            "function of yours (data.name=your_module:function)."
        )
    if what == "image":
        return (usual or found or [None])[0] if found else None
    return (usual or found or [None])[0]


def _labels(
    config: DataConfig, rows: Any, column: str, own: bool
) -> tuple[torch.Tensor, tuple[str, ...] | None]:
    """The label of each image, and the names of the classes where they have some."""
    given = rows[column][:]
    if (missing := sum(value is None for value in given)) > 0:
        raise ConfigError(
            f"data.name = {config.name!r}: its column {column!r} is empty in {missing} rows; give "
            "each image a class, or set model.conditional=false for a set without that column."
        )
    values = np.asarray(given)
    feature = rows.features[column]
    if (names := getattr(feature, "names", None)) is not None:
        names = tuple(map(str, names))
    elif values.dtype.kind in "US":
        names, values = np.unique(values, return_inverse=True)
        names = tuple(map(str, names))
    elif values.dtype.kind not in "iu":
        raise ConfigError(
            f"data.name = {config.name!r}: its column {column!r} holds {values.dtype} values; "
            "classes are whole numbers from 0, or names."
        )
    wanted = config.class_names
    if own and wanted is None and names is not None and config.classes not in (None, len(names)):
        raise ConfigError(
            f"data.name = {config.name!r} has {len(names)} classes ({', '.join(names[:5])}), and "
            f"data.classes = {config.classes}: nodes would number them in different ways. Set "
            "data.class_names for the run."
        )
    if wanted is not None and names is not None:
        used = {names[value] for value in np.unique(values[values >= 0])}
        if odd := sorted(used - {*wanted}):
            raise ConfigError(
                f"data.name = {config.name!r} has images of the class {odd[0]!r}, which is not one "
                f"of data.class_names = {list(wanted)}."
            )
        place = {name: number for number, name in enumerate(wanted)}
        values = np.asarray([place[names[value]] if value >= 0 else value for value in values])
    names = wanted or names
    return torch.from_numpy(values.astype(np.int64)), names


def _captions(rows: Any) -> tuple[str, ...] | None:
    """The caption of each image, empty where it has none; None without a column of texts."""
    for column in (name for name in TEXTS if name in rows.column_names):
        given = [
            (value or [None])[0] if isinstance(value, list) else value for value in rows[column]
        ]
        if any(given) and all(isinstance(value, str | None) for value in given):
            return tuple((value or "").strip() for value in given)
    return None


def _images(config: DataConfig, shape: tuple[int, int, int], rows: Any, column: str) -> np.ndarray:
    """The images of a column, decoded once for all processes; see `decoded`."""
    import datasets

    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    how = {key: getattr(config, key) for key in ("background", "crop", "resize", "pad")}
    what = json.dumps([config.name, shape, how, PIL.__version__, FORMAT])
    key, state = (sha256(text.encode()).hexdigest()[:32] for text in (what, rows._fingerprint))
    chunks = partial(_decoded, config, shape, rows, column)
    return decoded(key, state, (len(rows), *shape), chunks)


def _decoded(
    config: DataConfig, shape: tuple[int, int, int], rows: Any, column: str
) -> Iterator[np.ndarray]:
    problems = []
    for start in range(0, len(rows), CHUNK):
        files = rows[start : start + CHUNK][column]
        images = np.empty((len(files), *shape), dtype=np.uint8)
        for i, file in enumerate(files):
            try:
                if file is None or not (file["bytes"] or file["path"]):
                    raise BadImage("is missing")
                images[i] = fitted(file["bytes"] or Path(file["path"]), shape, config)
            except BadImage as problem:
                problems.append(f"  image {start + i} {problem}")
        yield images
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n".join(problems[:SHOWN])
        raise ConfigError(
            f"data.name = {config.name!r} has {len(problems)} images of {len(rows)} that cannot be "
            f"used:\n{listed}{more}\nExpected 8-bit images of {shape[2]}x{shape[1]} pixels "
            f"(data.size = {shape[1]}). Set data.size to the side that all images have, or have "
            f"the run change them: {HOW}."
        )
