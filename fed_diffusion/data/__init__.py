"""Images as uint8 tensors, and how they are split over the clients."""

from __future__ import annotations

from fed_diffusion.data.augment import augmentation
from fed_diffusion.data.datasets import (
    Loader,
    class_count,
    content_hash,
    image_shape,
    load_dataset,
    tell,
    to_uint8,
    to_unit,
    with_class_names,
)
from fed_diffusion.data.image_set import ImageSet
from fed_diffusion.data.own import load_own
from fed_diffusion.data.partition import Split, partition, split_holdout

__all__ = [
    "ImageSet",
    "Loader",
    "Split",
    "augmentation",
    "class_count",
    "content_hash",
    "image_shape",
    "load_dataset",
    "load_own",
    "partition",
    "split_holdout",
    "tell",
    "to_uint8",
    "to_unit",
    "with_class_names",
]
