"""A judge of the user's own: what evaluation.extractor may name beside the built-in networks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config.schema import EvaluationConfig
from fed_diffusion.evaluation.public import PUBLIC

BUILT_IN: dict[str, Any] = {"auto": None, "inception": None, "classifier": None, **PUBLIC}
"""The built-in judges by name; `choice` says what auto is, and `extractors` makes the others."""
KEY = "evaluation.extractor"
BATCH = 64


class Judge(Protocol):
    """A judge turns images into features and logits, from which the quality figures are computed.

    FID, KID, precision and recall compare its features of generated and of real images; the
    Inception Score reads its logits. Figures compare only with others of the same judge.

    Attributes
    ----------
    name
        The name under which the figures are shown.
    sha256
        The hash of its weights, for the record: other weights are another judge.
    """

    name: str
    sha256: str

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]:
        """Look at images.

        Parameters
        ----------
        images
            uint8 [n, C, H, W], values 0 to 255, on the judge's device; n is at most 64.

        Returns
        -------
        features, logits
            Floating point [n, d] and [n, classes], finite, of each image by itself.
        """
        ...


class JudgeFactory(Protocol):
    """What evaluation.extractor names: a class of judges, or a function that makes one.

    Parameters
    ----------
    config
        The section `evaluation` of the configuration, as if this were its only judge: `extractor`
        is its name, and `weights` an absolute path or None.
    device
        Where the judge is to compute.
    """

    def __call__(self, config: EvaluationConfig, device: torch.device, /) -> Judge: ...


def factory_of(config: EvaluationConfig) -> JudgeFactory:
    """Return the judge, public or the user's own, that evaluation.extractor names."""
    factory: JudgeFactory = resolve(KEY, str(config.extractor), BUILT_IN)
    return factory


def made(config: EvaluationConfig, device: torch.device) -> Judge:
    """Return what `factory_of` makes; raise `ConfigError` where it cannot be made."""
    factory = factory_of(config)
    with blamed(KEY, str(config.extractor)):
        judge = factory(config, device)
        for key in ("name", "sha256"):
            if not (isinstance(value := getattr(judge, key, None), str) and value):
                raise TypeError(f"its {key} is {value!r}, not a text")
    return judge


def look(judge: Judge, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a judge's features and logits of any number of images, on the CPU as float32.

    Raises
    ------
    TypeError
    The judge does not return what `Judge` says.
    """
    seen = [_looked(judge, some.to(device)) for some in images.split(BATCH)]
    features, logits = zip(*seen, strict=True)
    return torch.cat(features), torch.cat(logits)


@torch.no_grad()
def _looked(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    given = judge(images)
    if not (isinstance(given, tuple) and len(given) == 2):
        raise TypeError(f"it returns a {type(given).__name__} instead of (features, logits)")
    for what, layer in zip(("features", "logits"), given, strict=True):
        good = isinstance(layer, Tensor) and layer.is_floating_point() and layer.ndim == 2
        if not good or len(layer) != len(images):
            got = f"{layer.dtype} {list(layer.shape)}" if isinstance(layer, Tensor) else type(layer)
            raise TypeError(f"its {what} of {len(images)} images are {got}, not [n, d] floats")
    features, logits = (layer.detach().float().cpu() for layer in given)
    return features, logits


def check_judge(config: EvaluationConfig, shape: tuple[int, ...], device: torch.device) -> None:
    """Make a judge of `factory_of`'s and show it two images [C, H, W] = shape.

    Raises
    ------
    ConfigError
    The message names evaluation.extractor and what went wrong.
    """
    judge = made(config, device)
    with blamed(KEY, str(config.extractor)):
        look(judge, torch.zeros((2, *shape), dtype=torch.uint8), device)
