"""Images as uint8 tensors, and how they are split over the clients."""

from __future__ import annotations

from fed_diffusion.data.augment import augmentation
from fed_diffusion.data.captions import captions_of
from fed_diffusion.data.datasets import (
    Loader,
    class_count,
    content_hash,
    image_shape,
    load_dataset,
    named_classes,
    tell,
    to_uint8,
    to_unit,
)
from fed_diffusion.data.image_set import ImageSet
from fed_diffusion.data.own import load_own
from fed_diffusion.data.partition import Share, Split, partition, shares_of, split_holdout

__all__ = [
    "ImageSet",
    "Loader",
    "Share",
    "Split",
    "augmentation",
    "captions_of",
    "class_count",
    "content_hash",
    "image_shape",
    "load_dataset",
    "load_own",
    "named_classes",
    "partition",
    "shares_of",
    "split_holdout",
    "tell",
    "to_uint8",
    "to_unit",
]
