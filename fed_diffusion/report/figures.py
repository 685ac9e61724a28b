"""The figures that stand for a run in a table of a sweep, or of runs that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Scale = Literal["judged", "held out", "loss", "fact"]
"""What has to be equal for two values to compare.

This is the judge and what it saw, or the data and the times at which the loss is taken, or nothing.
"""


@dataclass(frozen=True)
class Figure:
    """A figure: its name, its value in a run's results, and how it is written."""

    key: str
    title: str
    value: Callable[[Mapping[str, Any]], Any]
    digits: int
    scale: Scale = "fact"

    def written(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


def _quality(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda results: _figure(results["quality"], key)


def _quality_by(judge: str, key: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return a figure of one of quality's `others`; None if the run was not shown to that judge."""
    return lambda results: _figure((results["quality"].get("others") or {}).get(judge, {}), key)


def _figure(found: Mapping[str, Any], key: str) -> Any:
    value = found.get(key)
    return value[0] if isinstance(value, list) else value  # [mean, deviation over splits]


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
OF_OTHERS = (("inception_score", "IS", 2), ("fid", "FID", 2), ("fid_floor", "FID floor", 2))


def columns_of(results: Sequence[Mapping[str, Any]]) -> tuple[Figure, ...]:
    """Return `FIGURES`, and after them those of every further judge, named after the judge."""
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys(result["quality"].get("others") or {})
    return FIGURES + tuple(
        Figure(f"{key}_{name}", f"{title} by {name}", _quality_by(name, key), digits, "judged")
        for name in names
        for key, title, digits in OF_OTHERS
    )
