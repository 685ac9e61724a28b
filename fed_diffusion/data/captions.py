"""The captions of images: from a template over the classes' names, or from metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.data.image_set import ImageSet

METADATA = "metadata.jsonl"
"""Lines with file_name, relative to the file's own folder, and text."""


def read_captions(root: Path, images: Sequence[Path]) -> tuple[str, ...] | None:
    """Return the caption of each image, empty where it has none; None where nothing has one.

    The file may lie in the folder itself and in each folder that holds images.

    Raises
    ------
    ConfigError
        A file cannot be read.
    """
    texts: dict[Path, str] = {}
    for folder in sorted({root, *(image.parent for image in images)}):
        file = folder / METADATA
        if file.is_file():
            texts |= _read(file)
    return tuple(texts.get(image, "") for image in images) if texts else None


def _read(file: Path) -> dict[Path, str]:
    found, at = {}, 0
    try:
        for at, line in enumerate(file.read_text("utf-8").splitlines(), 1):  # noqa: B007
            entry = json.loads(line) if line.strip() else {}
            if "text" in entry:
                found[file.parent / str(entry["file_name"])] = str(entry["text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read (line {at}: {type(error).__name__}: {error}). Each line is "
            'an object as in {"file_name": "0.png", "text": "a photo of a cat"}.'
        ) from error
    return found


def captions_of(dataset: ImageSet, data: DataConfig) -> list[str]:
    """Return the caption of each image, as the run wants them.

    Raises
    ------
    ConfigError
        An image has no caption.
    """
    if data.caption is not None:
        if "{}" not in data.caption:
            return [data.caption] * len(dataset)
        if dataset.labels is None:
            raise ConfigError(
                f"data.caption = {data.caption!r} names the class of an image, and these images "
                "have no classes. Sort them into a folder per class, or leave {} out."
            )
        names = dataset.class_names
        labels = dataset.labels.tolist()
        words = [str(label) if names is None else names[label] for label in labels]
        return [data.caption.replace("{}", word) for word in words]
    captions = list(dataset.captions or [""] * len(dataset))
    if missing := captions.count(""):
        raise ConfigError(
            f"model.text needs a caption for each image, and {missing} of {len(captions)} have "
            f"none. Write them into {METADATA} in data.dir, a line for each image as in "
            '{"file_name": "0.png", "text": "a photo of a cat"}, or make them of the names of the '
            "classes with data.caption, as in 'a photo of a {}'."
        )
    return captions
