"""Images in memory: what every data set is loaded as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory, with labels and client folders where there are any.

    Attributes
    ----------
    images
        uint8 [n, C, H, W].
    labels
        int64 [n], class indices from 0; None without classes.
    folders
        Names of the client folders, by client index; None unless the set comes in such folders.
    folder_of
        int64 [n], which of `folders` each image is from; None if and only if `folders` is.
    name
        Where the images are from.
    class_names
        Names of the classes, by label; None where they have none.
    notes
        What loading left out, as whole sentences for the user.
    captions
        What each image shows, in words, empty where nothing is said; None without captions.

    Raises
    ------
    ValueError
        Where the types or shapes are not these.
    """

    images: torch.Tensor
    labels: torch.Tensor | None = None
    folders: tuple[str, ...] | None = None
    folder_of: torch.Tensor | None = None
    name: str = ""
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    captions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                "images must be uint8 [n, C, H, W] with values 0 to 255, not "
                f"{self.images.dtype} {list(self.images.shape)}"
            )
        named = None if self.class_names is None else len(self.class_names)
        _check_indices("labels", self.labels, len(self), named)
        if (self.folders is None) != (self.folder_of is None):
            raise ValueError("folders and folder_of must be given together")
        if self.captions is not None and len(self.captions) != len(self):
            raise ValueError(f"{len(self.captions)} captions for {len(self)} images; give each one")
        _check_indices("folder_of", self.folder_of, len(self), len(self.folders or ()))

    def __len__(self) -> int:
        return self.images.shape[0]

    def subset(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> ImageSet:
        """Return a copy of the images at `indices` [m], in that order, with their labels."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return replace(
            self,
            images=self.images[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            folder_of=None if self.folder_of is None else self.folder_of[chosen],
            captions=self.captions and tuple(self.captions[i] for i in chosen.tolist()),
        )

    def per_class(self) -> dict[str, int]:
        """Return class name -> number of images, by label; numbers for classes without names."""
        if self.labels is None:
            return {}
        counts = torch.bincount(self.labels, minlength=len(self.class_names or ())).tolist()
        names = self.class_names or tuple(map(str, range(len(counts))))
        return dict(zip(names, counts, strict=True))

    def facts(self) -> dict[str, Any]:
        """Return what results.json says of the data."""
        return {"images": len(self), "classes": self.per_class(), "notes": list(self.notes)}


def _check_indices(name: str, values: torch.Tensor | None, n: int, limit: int | None) -> None:
    if values is None:
        return
    if values.dtype != torch.int64 or values.shape != (n,):
        raise ValueError(
            f"{name} must be int64 [{n}], one per image, not {values.dtype} {list(values.shape)}"
        )
    if n and name == "labels" and int(values.min()) < 0:
        raise ValueError(
            f"labels must count from 0, found {int(values.min())}: where not every image has a "
            "class, give no labels at all, and set model.conditional=false and data.classes=null"
        )
    if n and (int(values.min()) < 0 or (limit is not None and int(values.max()) >= limit)):
        raise ValueError(
            f"{name} must count from 0{'' if limit is None else f' to {limit - 1}'}, found "
            f"{int(values.min())} to {int(values.max())}"
        )
