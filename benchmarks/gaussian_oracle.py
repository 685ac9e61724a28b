"""The sampler's exact KL on Gaussian data beside the bound of Theorem 4.11, by partition, K and d.

    python benchmarks/gaussian_oracle.py [--plot docs/results/theory-oracle.png]

Data N(mu, diag(lambda)) as images have: lambda_i proportional to 1/i with mean 1/4, mu = -0.05 in
every coordinate; T = 4.13, delta = 1e-3, the exact score. The bound is Lemmas 4.5 and 4.10 with
constant 1; nothing is trained here, so its other terms are 0 (F_n + C_1 = 0 for an exact score).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fed_diffusion.diffusion.partitions import PARTITIONS, loss_weights
from fed_diffusion.diffusion.samplers import exponential_integrator
from fed_diffusion.theory import gaussian, mixture
from fed_diffusion.theory.bound import Data, Steps, lemma_4_5, lemma_4_10

T, DELTA = 4.13, 1e-3
STEPS = (50, 100, 200, 300, 500, 1000, 2000, 4000)
DIMENSIONS = (2, 12, 48, 192, 768, 3072)
LARGEST = DIMENSIONS[-1]
COLOURS = ("#3d85c6", "#d9822b", "#2b8a5a", "#8a8f98", "#cc4b4b", "#8e63b5")
Table = dict[tuple[str, int, int], tuple[float, float]]
"""(partition, K, d) -> exact KL, bound."""


def images_like(d: int) -> tuple[Tensor, Tensor]:
    """Mean and eigenvalues [d]."""
    lam = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    return torch.full((d,), -0.05, dtype=torch.float64), lam * (d / 4 / lam.sum())


def bound(u: Tensor, d: int) -> float:
    mu, lam = images_like(d)
    data = Data(d, float(mu.square().sum() + lam.sum()))
    return sum(lemma_4_5(data, Steps.of(u))) + lemma_4_10(data, T)


def measure() -> Table:
    wanted = {(K, LARGEST) for K in STEPS} | {(K, d) for K in (300, 1000) for d in DIMENSIONS}
    return {
        (name, K, d): (gaussian.sampler_kl(*images_like(d), u), bound(u, d))
        for name, partition in PARTITIONS.items()
        for K, d in sorted(wanted)
        for u in [partition(T, DELTA, K)]
    }


def slope(x: tuple[int, ...], y: list[float]) -> float:
    """Of log y over log x, least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def table(heading: list[str], rows: list[list[str]]) -> None:
    for row in [heading, ["---"] * len(heading), *rows]:
        print(f"| {' | '.join(row)} |")
    print()


def print_by_steps(of: Table) -> None:
    late = tuple(K for K in STEPS if K >= 500)
    for index, title in enumerate(("Exact KL, nats", "Bound, constant 1, nats")):
        print(f"{title}, d = {LARGEST}\n")
        rows = []
        for name in PARTITIONS:
            values = [of[name, K, LARGEST][index] for K in STEPS]
            fitted = slope(late, values[-len(late) :])
            rows.append([name, *(f"{value:.4g}" for value in values), f"{fitted:.2f}"])
        table(["partition", *(f"K = {K}" for K in STEPS), "slope from K = 500"], rows)


def print_by_dimension(of: Table, K: int = 1000) -> None:
    print(f"Exact KL at K = {K}, nats; slopes of the KL and of the bound in d\n")
    rows = []
    for name in PARTITIONS:
        kl, most = zip(*(of[name, K, d] for d in DIMENSIONS), strict=True)
        slopes = [f"{slope(DIMENSIONS, list(values)):.2f}" for values in (kl, most)]
        rows.append([name, *(f"{value:.3g}" for value in kl), *slopes])
    table(["partition", *(f"d = {d}" for d in DIMENSIONS), "KL's slope", "bound's slope"], rows)


def print_lemmas(K: int = 300) -> None:
    mu, lam = images_like(LARGEST)
    data = Data(LARGEST, float(mu.square().sum() + lam.sum()))
    print(f"Lemma by lemma at K = {K}, d = {LARGEST}, nats\n")
    rows = []
    for name, partition in PARTITIONS.items():
        u = partition(T, DELTA, K)
        left, right = gaussian.discretisation_error(lam, u), sum(lemma_4_5(data, Steps.of(u)))
        cells = [f"{Steps.of(u).kappa:.4g}", f"{gaussian.sampler_kl(mu, lam, u):.4g}"]
        cells += [f"{left:.4g}", f"{right:.4g}", f"{left / right:.2g}"]
        cells += [f"{-gaussian.dsm_constant(lam, u):.0f}"]
        cells += [f"{LARGEST * float(loss_weights(u).sum()):.0f}"]
        rows.append([name, *cells])
    heading = ["partition", "kappa", "exact KL", "Lemma 4.5, left side", "its right side", "ratio"]
    table([*heading, "-C_1", "Z d"], rows)
    start, end = torch.tensor([T, DELTA], dtype=torch.float64)
    final = gaussian.continuous_moments(mu, lam, T, DELTA)
    limit = gaussian.kl_diagonal(*gaussian.noised_moments(mu, lam, end), *final)
    print(
        f"KL(q_T || N(0, I)) = {gaussian.prior_kl(mu, lam, start):.4g} nats; Lemma 4.10 allows "
        f"{lemma_4_10(data, T) / 2:.4g}; {limit:.2g} of it are left at delta (K to infinity).\n"
    )


def print_simulation(n: int = 100_000, d: int = 8, K: int = 50) -> None:
    """The sampler itself against the recursion: its moments' deviations in standard errors."""
    mu, lam = images_like(d)
    generator = torch.Generator().manual_seed(0)
    off = []
    for partition in PARTITIONS.values():
        u = partition(T, DELTA, K)
        y = torch.randn((n, d), generator=generator, dtype=torch.float64)
        y = exponential_integrator(gaussian.gaussian_score(mu, lam), y, u, generator=generator)
        mean, var = gaussian.sampler_moments(mu, lam, u)
        off += [(y.mean(0) - mean) / (var / n).sqrt(), (y.var(0) / var - 1) / math.sqrt(2 / n)]
    errors = torch.cat(off)
    print(
        f"{n} simulated samples, d = {d}, K = {K}, all partitions: {len(errors)} means and "
        f"variances are off by {errors.square().mean().sqrt():.2f} standard errors in the root "
        f"mean square, {errors.abs().max():.2f} at most.\n"
    )


def print_mixture() -> None:
    """Data that are not Gaussian: quadrature, path space, and the bound."""
    data = mixture.Mixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
        torch.tensor([[0.1], [0.05]], dtype=torch.float64),
    )
    print("0.3 N(-1, 0.1) + 0.7 N(1, 0.05), T = 3, delta = 0.01, kappa_minimal, nats\n")
    rows = []
    for K in (25, 50, 100):
        u = PARTITIONS["kappa_minimal"](3.0, 1e-2, K)
        of = Data(1, data.second_moment())
        path = mixture.path_space_bound(
            data, data.score, u, 20_000, torch.Generator().manual_seed(0)
        )
        kl = mixture.quadrature_kl(data, data.score, u)
        whole = sum(lemma_4_5(of, Steps.of(u))) + lemma_4_10(of, 3.0)
        rows.append([str(K), f"{kl:.4g}", f"{path.value:.4f} ± {path.error:.4f}", f"{whole:.3f}"])
    table(["K", "KL by quadrature", "path space", "bound"], rows)


def plot(of: Table, path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, colour in zip(PARTITIONS, COLOURS, strict=True):
        for index, style in enumerate(("-", "--")):
            by_K = [of[name, K, LARGEST][index] for K in STEPS]
            by_d = [of[name, 1000, d][index] for d in DIMENSIONS]
            label = name if index == 0 else None
            axes[0].plot(STEPS, by_K, style, color=colour, label=label)
            axes[1].plot(DIMENSIONS, by_d, style, color=colour)
    axes[0].set(xlabel=f"steps K (d = {LARGEST})", ylabel="nats")
    axes[1].set(xlabel="dimension d (K = 1000)")
    for panel in axes:
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("KL(q_δ ‖ p) of the sampler: exact (solid) and the bound (dashed)", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="write the figure here")
    arguments = parser.parse_args()
    of = measure()
    print_by_steps(of)
    print_by_dimension(of)
    print_lemmas()
    print_mixture()
    print_simulation()
    if arguments.plot:
        plot(of, arguments.plot)


if __name__ == "__main__":
    main()
