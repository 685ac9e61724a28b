"""How often the 95 % intervals of the figures cover what they are about, on Gaussian features.

    python benchmarks/interval_coverage.py [--repeats 200] [--cases 100,150,6 ...]

A case is the number of generated images, of real images and of features. Generated features are
drawn anew in each repetition; the real ones are drawn once ("held fixed"), or anew too. The truth
is KID's closed form, about which a single reference says nothing, and for the other figures the
mean over all repetitions. A width of 1 is that of estimate -+ 1.96 standard deviations of the
estimates; "before" are the intervals that recall and KID had until they became jackknives.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from fed_diffusion.evaluation.figures import figures, wilson
from fed_diffusion.evaluation.pairs import kernel_sums, kernel_sums_within

CASES = ("100,150,6", "300,300,16", "300,1000,16", "1000,300,16")
SHIFT, SCALE = 0.25, 0.9
FIGURES = ("fid", "inception_score", "kid", "precision", "recall")


def draw(n: int, d: int, stream: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(stream))


def kid_before(kid: float, x: Tensor, y: Tensor) -> list[float]:
    """Student's interval of the KIDs of ten disjoint pairs of groups of at most 1000 images."""
    size = min(1000, len(x) // 10, len(y) // 10)
    found = torch.tensor([_kid(x[i * size :][:size], y[i * size :][:size]) for i in range(10)])
    reach = float(special.stdtrit(9, 0.975)) * float(found.std()) / math.sqrt(10)
    return [kid - reach, kid + reach]


def _kid(x: Tensor, y: Tensor) -> float:
    n, m = len(x), len(y)
    within = kernel_sums_within([x]) / (n * (n - 1)) + kernel_sums_within([y]) / (m * (m - 1))
    return float(within - 2 * kernel_sums([x], [y]) / (n * m))


def expected_kid(d: int) -> float:
    """MMD^2 of N(SHIFT, SCALE^2 I) and N(0, I) under (x.y / d + 1)^3."""
    a, v = d * SHIFT**2, SCALE**2

    def kernel(first: float, second: float, third: float) -> float:
        return third / d**3 + 3 * second / d**2 + 3 * first / d + 1

    third = a**3 + 3 * a * a * v + 3 * v * (a * (a + d * v) + 2 * a * v)
    within = kernel(a, d * v**2 + 2 * a * v + a**2, third)
    return within + kernel(0, d, 0) - 2 * kernel(0, d * v + a, 0)


def measure(n: int, m: int, d: int, repeats: int, fixed: bool) -> dict[str, tuple[float, float]]:
    """{interval: (coverage, width)}."""
    values: dict[str, list[float]] = {name: [] for name in FIGURES}
    intervals: dict[str, list[Any]] = {name: [] for name in FIGURES}
    intervals |= {"kid before": [], "recall before": []}
    for stream in range(1, repeats + 1):
        x = SCALE * draw(n, d, stream) + SHIFT
        y = draw(m, d, 0 if fixed else 10**6 + stream)
        found = figures(x, 3 * x[:, :4], y, stream, torch.device("cpu"))
        for name in FIGURES:
            value = found[name]
            values[name].append(value[0] if isinstance(value, list) else value)
            intervals[name].append(found["intervals"][name])
        intervals["kid before"].append(kid_before(found["kid"], x, y))
        intervals["recall before"].append(wilson(found["recall"], m))
    measured = {}
    for name, pairs in intervals.items():
        figure = name.split()[0]
        low, high = np.array(pairs).T
        truth = expected_kid(d) if figure == "kid" else float(np.mean(values[figure]))
        needed = 2 * 1.96 * float(np.std(values[figure]))
        covered = float(((low <= truth) & (truth <= high)).mean())
        measured[name] = (covered, float((high - low).mean()) / needed)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--cases", nargs="+", default=CASES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ("fid", "inception_score", "kid", "kid before", "precision", "recall", "recall before")
    print(f"| generated, real, features | reference | {' | '.join(names)} |")
    print("|---|---|" + "---|" * len(names))
    for case in arguments.cases:
        n, m, d = map(int, case.split(","))
        for fixed in (True, False):
            found = measure(n, m, d, arguments.repeats, fixed)
            cells = " | ".join(
                "–" if fixed and "kid" in name else f"{found[name][0]:.2f} ({found[name][1]:.1f})"
                for name in names
            )
            print(f"| {n}, {m}, {d} | {'held fixed' if fixed else 'drawn anew'} | {cells} |")


if __name__ == "__main__":
    main()
