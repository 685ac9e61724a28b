"""A split of the user's own: the images in order of brightness, the darkest to the first client.

    fed-diffusion run digits --set data.partition=examples.own_split:by_brightness

The contract is `fed_diffusion.Split`: from the images, the number of clients and a source of
randomness it makes one array of indices per client. None of them is empty, and no image is in two
of them. Every process of a run has to come to the same parts, so nothing else may be random.
"""

from __future__ import annotations

import numpy as np

from fed_diffusion import ImageSet


def by_brightness(dataset: ImageSet, clients: int, draw: np.random.Generator) -> list[np.ndarray]:
    """Return equal parts in order of the images' mean value; ties are broken at random."""
    brightness = dataset.images.double().mean(dim=(1, 2, 3)).numpy()
    order = np.lexsort((draw.permutation(len(dataset)), brightness))
    return np.array_split(order, clients)
