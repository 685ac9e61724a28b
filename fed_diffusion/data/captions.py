"""The captions of images: from a template over the classes' names, or from metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.data.image_set import ImageSet

METADATA = "metadata.jsonl"
"""Lines with file_name, relative to the file's own folder, and text."""


def read_captions(
    root: Path, images: Sequence[Path]
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return the caption of each image, and what could not be read.

    Captions are empty where an image has none, and None where nothing has one. The file may lie in
    the folder itself and in each folder below it, and tells of images below its own. One that
    cannot be read is told and left out: only runs of texts need it, and they miss the captions.
    """
    texts: dict[Path, str] = {}
    unread = []
    holding = {image.parent for image in images}
    between = (p for folder in holding for p in folder.parents if p.is_relative_to(root))
    for folder in sorted({root, *holding, *between}):
        file = folder / METADATA
        try:
            texts |= _read(file) if file.is_file() else {}
        except ConfigError as error:
            unread.append(str(error))
    return tuple(texts.get(image, "") for image in images) if texts else None, tuple(unread)


def _read(file: Path) -> dict[Path, str]:
    found, at = {}, 0
    try:
        for at, line in enumerate(file.read_text("utf-8-sig").split("\n"), 1):  # noqa: B007
            entry = json.loads(line) if line.strip() else {}
            text = entry.get("text")
            if not isinstance(text, str | None):
                raise TypeError(f"the text is {type(text).__name__}, not a text")
            if text is None or not text.strip():
                continue
            path = file.parent / str(entry["file_name"])
            if path.is_relative_to(file.parent):
                found[path] = text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
            '{"file_name": "0.png", "text": "a photo of a cat"} (a set of hf: has them in its '
            "column text or caption), or make them of the names of the classes with data.caption, "
            "as in 'a photo of a {}'."
        )
    return captions
