"""Text as the condition of a network: the text encoder and the tokenizer of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.models.described import first_line

INSTALL = "pip install 'fed-diffusion[text]'"
PROBES = (
    "a photo of A CAT",
    "naïve café, l'été: 3.14 + 2 = 5.14!",
    "antidisestablishmentarianism  😀",
)
"""Texts that show how a tokenizer cuts: by its merges, and whether it minds case and accents."""


def width_of(source: str) -> int:
    """The width of the embedded texts, of which only the encoder's configuration is read.

    Raises
    ------
    ConfigError
        There is no such text encoder.
    """
    return int(_config(source).hidden_size)


class TextEncoder:
    """A CLIPTextModel with its tokenizer, which is never trained.

    Raises
    ------
    ConfigError
        They cannot be read.
    """

    def __init__(self, source: str):
        _config(source)
        import transformers

        try:
            self.tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(
                source, subfolder="tokenizer"
            )
            self.model: Any = transformers.CLIPTextModel.from_pretrained(
                source,
                subfolder="text_encoder",
                dtype=torch.float32,
                use_safetensors=True,  # never a pickle
            )
        except Exception as error:  # no file, no network, a damaged file: transformers says which
            raise ConfigError(
                f"model.text = {source!r}: its tokenizer or its text encoder cannot be read "
                f"({type(error).__name__}: {first_line(error)})."
            ) from error
        self.model.requires_grad_(False).eval()

    def values(self) -> dict[str, Tensor]:
        """All that says what a text becomes: the encoder's tensors and the tokenizer's words."""
        most = {"truncation": True, "max_length": self.tokens}
        cut = [list(self.tokenizer(text, **most).input_ids) for text in PROBES]
        words = json.dumps([sorted(self.tokenizer.get_vocab().items()), self.tokens, cut])
        return dict(self.model.state_dict()) | {"words": torch.tensor(list(words.encode()))}

    @property
    def tokens(self) -> int:
        """The tokens that each text has, after it is cut or filled up."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    @property
    def width(self) -> int:
        """The values of each embedded token."""
        return int(self.model.config.hidden_size)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder to a device; returns it."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return float32 [n, tokens, width], as the pipeline of Stable Diffusion does."""
        found = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        embedded: Tensor = self.model(found.input_ids.to(self.model.device))[0]
        return embedded.float()


def _config(source: str) -> Any:
    if find_spec("transformers") is None:
        raise ConfigError(f"model.text needs the package transformers: {INSTALL}.")
    import transformers

    try:
        return transformers.CLIPTextConfig.from_pretrained(source, subfolder="text_encoder")
    except Exception as error:  # transformers raises OSError for most, and others for odd files
        raise ConfigError(
            f"model.text = {source!r} holds no CLIPTextModel: the folder of a pipeline has "
            "text_encoder/ and tokenizer/. A name on the Hub needs a network, or a copy in the "
            f"Hub's cache ({type(error).__name__}: {first_line(error)})."
        ) from error
