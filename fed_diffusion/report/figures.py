"""The figures that stand for a run in a table: a sweep's, and those of runs that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Scale = Literal["judged", "held out", "loss", "fact"]
"""What has to be equal for two values to compare: the judge and what it saw, the data and the
times that the loss is taken at, or nothing."""


@dataclass(frozen=True)
class Figure:
    """A figure: what it is called, its value in a run's results, and how it is written."""

    key: str
    title: str
    value: Callable[[Mapping[str, Any]], Any]
    digits: int
    scale: Scale = "fact"

    def written(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


def _quality(key: str) -> Callable[[Mapping[str, Any]], Any]:
    def value(results: Mapping[str, Any]) -> Any:
        found = results["quality"].get(key)
        return found[0] if isinstance(found, list) else found  # [mean, deviation over splits]

    return value


FIGURES = (
    Figure("inception_score", "IS", _quality("inception_score"), 2, "judged"),
    Figure("fid", "FID", _quality("fid"), 2, "judged"),
    Figure("fid_floor", "FID floor", _quality("fid_floor"), 2, "judged"),
    Figure("kid", "KID", _quality("kid"), 4, "judged"),
    Figure("loss", "loss", lambda r: r["loss"], 4, "loss"),
    Figure("holdout_loss", "held-out loss", lambda r: r["holdout_loss"], 4, "held out"),
    Figure("gamma_star", "Γ*", lambda r: r["gamma_star"], 0),
    Figure("megabytes_up", "MB up", lambda r: r["bytes_up"] / 1e6, 1),
    Figure("seconds", "seconds", lambda r: r["seconds"]["train"], 0),
)
