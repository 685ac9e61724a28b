"""A tracker of the user's own: a diary in plain text, with the images as files of their own.

    fed-diffusion run digits --set trackers=examples.own_tracker:Diary
    fed-diffusion run digits --set trackers=[csv,examples.own_tracker:Diary]

The contract is `fed_diffusion.Tracker`: made with the configuration, then told how the run goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.config import Config


class Diary:
    """This tracker writes diary.txt and diary-<round>.pt into the run directory."""

    def __init__(self, config: Config):
        self.title = f"{config.preset}, {config.rounds} rounds with {config.clients} clients"

    def begin(self, run: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        self.run = run
        self.file = (run / "diary.txt").open("w", encoding="utf-8")
        print(self.title, file=self.file)
        for line in lines:  # of a run that goes on: what was done before
            self.round(line)

    def round(self, line: Mapping[str, Any]) -> None:
        print(f"round {line['round']}: loss {line['loss']:.4f}", file=self.file, flush=True)

    def images(self, round: int, images: Tensor) -> None:
        torch.save(images, self.run / f"diary-{round:04d}.pt")

    def end(self, results: Mapping[str, Any] | None) -> None:
        how = "ended early" if results is None else f"FID {results['quality']['fid']}"
        print(how, file=self.file)
        self.file.close()
