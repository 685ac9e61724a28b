"""Federated training of an affine score on Gaussian workers, judged by the sampler's exact KL.

    python benchmarks/affine_federation.py [--plot docs/results/theory-federation.png]

theta is one affine map per step, eps(x, u_k) = W_k x + b_k (score -eps / sigma_k), so F_n, its
gradient, L, the best theta and KL(q_{n,delta} || p_{n,t_K}) are all exact, and local steps (7) use
the exact gradient (sigma_1 = 0). Masks cover every coordinate of theta: F none; R random; T top-k;
C whole coordinates of the data (rows and columns of W_k, entries of b_k), rolling. Aggregation is
MaskedMean, masks are the project's recipes. Two step sizes: the largest that Lemma 4.6 allows at
level S, and 1 / L. The bound has constant 1, C_1 exact, sigma_2 the largest seen (a lower
estimate of the supremum).
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.config.training import PruningConfig
from fed_diffusion.diffusion.partitions import kappa_minimal, loss_weights
from fed_diffusion.diffusion.process import sigma
from fed_diffusion.masks.families import derive, family_of
from fed_diffusion.masks.levels import level_ratios
from fed_diffusion.masks.mask import Masks, Scattered, mask_of, pruning_error
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.masks.spaces import Layout, Space
from fed_diffusion.theory import gaussian
from fed_diffusion.theory.bound import (
    Bound,
    Data,
    Steps,
    Training,
    largest_eta,
    lemma_4_5,
    lemma_4_6,
    lemma_4_10,
    theorem_4_11,
)

D, K, T, DELTA = 14, 40, 3.0, 1e-2
N, S, R = 10, 5, 150
METHODS = {
    "F": PruningConfig(),
    "R": PruningConfig(kind="random", scope="all"),
    "T": PruningConfig(kind="topk", scope="all"),
    "C": PruningConfig(kind="channels", choice="rolling"),
}
COLOURS = {"F": "#8a8f98", "R": "#cc4b4b", "T": "#3d85c6", "C": "#d9822b"}
PLACES = {"level S": level_ratios("S", N), "all at 0.75": (0.75,) * N}
SHOWN = (0, 1, 3, 10, 30, 100, R)
U = kappa_minimal(T, DELTA, K)
STEPS = Steps.of(U)
LAYOUT = Layout(
    spaces={"x": Space(groups=D, size=1)},
    shapes={"W": (K, D, D), "b": (K, D)},
    axes={"W": ((), ("x",), ("x",)), "b": ((), ("x",))},
)


class Workers:
    """N Gaussians with means and covariances of their own, and the exact loss on each."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        common = 0.5 * self._normal(D)
        self.mu = common + 0.2 * self._normal(N, D)
        root = self._normal(D, D) + 0.5 * self._normal(N, D, D)
        self.cov = 0.05 * torch.eye(D, dtype=torch.float64) + root @ root.mT / (1.25 * D)
        a, s = torch.exp(-U[:-1]), sigma(U[:-1])
        means = a[:, None] * self.mu[:, None]
        V = torch.stack([gaussian.noised_covariance(cov, U[:-1]) for cov in self.cov])
        # Q = E[(x, 1) (x, 1)^T] and E[eps (x, 1)^T] = [sigma I | 0], per worker and step
        self.Q = torch.ones(N, K, D + 1, D + 1, dtype=torch.float64)
        self.Q[..., :D, :D] = V + means[..., :, None] * means[..., None, :]
        self.Q[..., :D, D] = self.Q[..., D, :D] = means
        self.C = torch.zeros(K, D, D + 1, dtype=torch.float64)
        self.C[..., :D] = s[:, None, None] * torch.eye(D, dtype=torch.float64)
        self.weights = loss_weights(U)[:, None, None]
        self.L = float((2 * self.weights[:, :, 0] * torch.linalg.eigvalsh(self.Q)).max())
        self.C1 = [gaussian.dsm_constant(torch.linalg.eigvalsh(cov), U) for cov in self.cov]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def first_theta(self) -> dict[str, Tensor]:
        return {"W": 0.05 * self._normal(K, D, D).float(), "b": 0.05 * self._normal(K, D).float()}

    def loss(self, theta: Tensor) -> Tensor:
        """F_n (5) of one theta [K, d, d + 1]: [N]."""
        terms = ((theta @ self.Q) * theta - 2 * theta * self.C).sum((2, 3)) + D
        return (self.weights[:, 0, 0] * terms).sum(1)

    def gradient(self, thetas: Tensor) -> Tensor:
        """grad F_n at each worker's own theta, or at one for all: [N, K, d, d + 1]."""
        return 2 * self.weights * (thetas @ self.Q - self.C)

    def best(self) -> gaussian.AffineScore:
        """The affine score of least F: the exact one of the pooled moments."""
        mean = self.mu.mean(0)
        second = (self.cov + self.mu[:, :, None] * self.mu[:, None]).mean(0)
        return gaussian.exact_affine_score(mean, second - mean.outer(mean), U)

    def divergences(self, score: gaussian.AffineScore) -> list[float]:
        """KL(q_{n,delta} || p_{t_K}) of every worker; the sampler's law is the same for all."""
        law = gaussian.affine_moments(score, U)
        return [
            gaussian.kl_full(*gaussian.noised_gaussian(mu, cov, U[-1]), *law)
            for mu, cov in zip(self.mu, self.cov, strict=True)
        ]

    def own(self) -> float:
        """Mean KL with each worker's own exact score: what the steps alone cost."""
        pairs = zip(self.mu, self.cov, strict=True)
        return statistics.mean(
            gaussian.affine_kl(mu, cov, gaussian.exact_affine_score(mu, cov, U), U)
            for mu, cov in pairs
        )

    def excess(self, score: gaussian.AffineScore) -> list[float]:
        """F_n + C_1 of every worker."""
        pairs = zip(self.mu, self.cov, strict=True)
        return [gaussian.score_error(mu, cov, score, U) for mu, cov in pairs]


def join(theta: dict[str, Tensor]) -> Tensor:
    """[W | b], [K, d, d + 1]."""
    return torch.cat([theta["W"], theta["b"][..., None]], 2)


def as_score(theta: dict[str, Tensor]) -> gaussian.AffineScore:
    s = sigma(U[:-1])
    return gaussian.AffineScore(
        -theta["W"].double() / s[:, None, None], -theta["b"].double() / s[:, None]
    )


def masks_of(method: str, ratios: tuple[float, ...], theta: dict, r: int, seed: int) -> list[Masks]:
    """Every client's mask of round r, as one of single weights."""
    family = family_of(METHODS[method], seed)
    weak = {n: keep for n, keep in enumerate(ratios) if keep < 1}
    recipes = family.plan(r, weak, theta, LAYOUT)
    made = [derive(family, recipes.get(n, Recipe()), theta, LAYOUT) for n in range(len(ratios))]
    return [{k: Scattered(mask.dense()) for k, mask in masks.items()} for masks in made]


@dataclass
class Seen:
    """What the bound reads, over the rounds so far, and what was measured after a round."""

    w2: float = 0.0
    gamma_star: int = N
    sigma2: float = 0.0
    gradient_norm: float = 0.0


@dataclass(frozen=True)
class Point:
    """After some rounds: exact KL and excess of every worker, their bounds, Lemma 4.6's sides."""

    round: int
    kl: list[float]
    excess: list[float]
    proved: list[Bound]
    printed: list[Bound]
    seen: Seen
    lemma_4_6: tuple[float, float]


def train(
    workers: Workers, method: str, ratios: tuple[float, ...], eta: float, seed: int
) -> list[Point]:
    theta = first = workers.first_theta()
    seen, points = Seen(), []
    for r in range(R + 1):
        if r in SHOWN:
            points.append(look(workers, theta, first, seen, eta, r))
        gradients = workers.gradient(join(theta).double())
        whole = gradients.mean(0)
        spread = float((gradients - whole).square().sum((1, 2, 3)).max()) ** 0.5
        masks = masks_of(method, ratios, theta, r, seed)
        mean = MaskedMean(theta, workers=N)
        dense = [{n: mask_of(x, n, value).dense() for n, value in theta.items()} for x in masks]
        m = torch.stack([join(x) for x in dense]).float()
        local = (join(theta) * m).double()
        for _ in range(S):
            local = local - eta * workers.gradient(local) * m
        for n in range(N):
            mean.add({"W": local[n, ..., :D], "b": local[n, ..., D]}, masks[n])
        seen = Seen(
            max(seen.w2, *(pruning_error(x, theta) for x in masks)),
            min(seen.gamma_star, mean.coverage.gamma()),
            max(seen.sigma2, spread),
            seen.gradient_norm + float(whole.square().sum()),
        )
        theta = mean.result()
    return points


def look(workers: Workers, theta: dict, first: dict, seen: Seen, eta: float, r: int) -> Point:
    """KL and bounds of theta_r, as if the run had ended here."""
    score = as_score(theta)
    start, now = workers.loss(join(first).double()), workers.loss(join(theta).double())
    drift = float((join(theta) - join(first)).double().norm())
    F0 = float(start.mean())
    bounds: dict[str, list[Bound]] = {"as_proved": [], "as_printed": []}
    for n in range(N):
        t = Training(
            N=N, S=S, R=max(r, 1), eta=eta, L=workers.L, sigma1=0.0, sigma2=seen.sigma2,
            w2=seen.w2, gamma_star=seen.gamma_star, F0=F0, Fn0=float(start[n]), drift=drift,
        )  # fmt: skip
        data = Data(D, float(workers.mu[n].square().sum() + workers.cov[n].trace()))
        for variant in ("as_proved", "as_printed"):
            C1 = workers.C1[n]
            bounds[variant].append(theorem_4_11(data, STEPS, t, C1=C1, variant=variant))
    sides = (seen.gradient_norm / max(r, 1), sum(lemma_4_6(t, float(now.mean()))))
    kl, excess = workers.divergences(score), workers.excess(score)
    return Point(r, kl, excess, bounds["as_proved"], bounds["as_printed"], seen, sides)


def mean_of(values: list[float]) -> float:
    return statistics.fmean(values)


def table(heading: list[str], rows: list[list[str]]) -> None:
    for row in [heading, ["---"] * len(heading), *rows]:
        print(f"| {' | '.join(row)} |")
    print()


def report(place: str, step: str, eta: str, runs: dict[str, list[list[Point]]]) -> None:
    """One table of the last rounds (means over seeds), one of the KL over rounds, the orders."""
    print(f"{place}, {step}: {eta}\n")
    rows, course = [], []
    for method, seeds in runs.items():
        last = [points[-1] for points in seeds]

        def over(of, last=last) -> str:
            return f"{mean_of([of(point) for point in last]):.4g}"

        rows.append(
            [
                method,
                over(lambda p: mean_of(p.kl)),
                over(lambda p: max(p.kl)),
                over(lambda p: mean_of(p.excess)),
                over(lambda p: mean_of([b.total for b in p.proved])),
                over(lambda p: max(b.total for b in p.proved)),
                over(lambda p: mean_of([b.total for b in p.printed])),
                over(lambda p: p.seen.w2),
                str(min(p.seen.gamma_star for p in last)),
                over(lambda p: p.seen.sigma2),
                over(lambda p: p.lemma_4_6[0]),
                over(lambda p: p.lemma_4_6[1]),
            ]
        )
        for name, of in (("mean", mean_of), ("largest", max)):
            cells = [
                f"{mean_of([of(points[i].kl) for points in seeds]):.4g}" for i in range(len(SHOWN))
            ]
            course.append([f"{method}, {name}", *cells])
    heading = ["masks", "KL mean", "KL largest", "F_n + C_1", "bound mean", "bound largest"]
    heading += ["as printed", "w²", "Gamma*", "sigma_2", "Lemma 4.6, left", "its right side"]
    table(heading, rows)
    table(["exact KL after round", *map(str, SHOWN)], course)
    measures = {
        "exact KL": lambda p: mean_of(p.kl),
        "F_n + C_1": lambda p: mean_of(p.excess),
        "the bound": lambda p: mean_of([b.total for b in p.proved]),
    }
    for name, of in measures.items():
        orders = Counter(
            ordered({method: of(seeds[seed][-1]) for method, seeds in runs.items()})
            for seed in range(len(runs["F"]))
        )
        print(f"- order by {name}: " + "; ".join(f"{o} ({n} seeds)" for o, n in orders.items()))
    some = runs["R"][0][-1].proved[0]
    failed = [f"{c.name} ({c.says})" for c in some.conditions if not c.holds]
    print(f"- conditions that fail for R: {'; '.join(failed) or 'none'}\n")


def ordered(values: dict[str, float]) -> str:
    """Best first; within a thousandth of the one before, or as infinite, counts as equal."""
    groups: list[list[str]] = []
    before = -1.0
    for method, value in sorted(values.items(), key=lambda pair: pair[1]):
        if value == before or value <= before * 1.001:
            groups[-1].append(method)
        else:
            groups.append([method])
        before = value
    return " < ".join(" = ".join(sorted(group)) for group in groups)


def plot(
    all_runs: dict[tuple[str, str], dict[str, list[list[Point]]]], best: float, path: Path
) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, ((place, step), runs) in zip(panels.flat, all_runs.items(), strict=True):
        for method, seeds in runs.items():
            kl = [mean_of([mean_of(points[i].kl) for points in seeds]) for i in range(len(SHOWN))]
            most = [
                mean_of([mean_of([b.total for b in points[i].proved]) for points in seeds])
                for i in range(len(SHOWN))
            ]
            axes.plot(SHOWN[1:], kl[1:], color=COLOURS[method], label=method, marker=".")
            axes.plot(SHOWN[1:], most[1:], "--", color=COLOURS[method])
        axes.axhline(best, color="#555555", linewidth=0.8, linestyle=":", label="best affine score")
        axes.set(xscale="log", yscale="log", title=f"{place}, {step}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        axes.set_xlabel("rounds")
    for axes in panels[:, 0]:
        axes.set_ylabel("nats, mean over workers")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Exact KL(q_{n,δ} ‖ p) (solid) and Theorem 4.11 (dashed)", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="write the figure here")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    everyone = [Workers(seed) for seed in range(arguments.seeds)]
    best = [workers.divergences(workers.best()) for workers in everyone]
    own = mean_of([workers.own() for workers in everyone])
    print(f"seeds 0 to {arguments.seeds - 1}; theta has {K * D * (D + 1)} coordinates; means over")
    print(f"seeds. Best affine score: KL mean {mean_of([mean_of(b) for b in best]):.4g}, largest")
    print(
        f"{mean_of([max(b) for b in best]):.4g}; its F_n + C_1 on average "
        f"{mean_of([mean_of(w.excess(w.best())) for w in everyone]):.4g}. Each worker's own exact"
    )
    w = everyone[0]
    M2 = float(w.mu[0].square().sum() + w.cov[0].trace())
    rest = sum(lemma_4_5(Data(D, M2), STEPS)) + lemma_4_10(Data(D, M2), T)
    print(f"score: {own:.4g}. Lemmas 4.5 and 4.10: {rest:.4g} (worker 0, seed 0).\n")
    steps = {"eta of Lemma 4.6": largest_eta(1.0, S, N, 6), "eta = 1 / L": 1.0}
    all_runs = {}
    for place, ratios in PLACES.items():
        for step, share in steps.items():
            runs: dict[str, list[list[Point]]] = {method: [] for method in METHODS}
            for seed, workers in enumerate(everyone):
                for method in METHODS:
                    if (
                        method == "F" and place != "level S"
                    ):  # no masks, so the same wherever they are
                        runs[method] = all_runs["level S", step][method]
                        continue
                    workers.generator.manual_seed(1000 + seed)
                    eta = share / workers.L
                    runs[method].append(train(workers, method, ratios, eta, seed))
            all_runs[place, step] = runs
            report(place, step, f"{share:.4g} / L, L = {everyone[0].L:.4g} (seed 0)", runs)
    if arguments.plot:
        plot(all_runs, mean_of([mean_of(b) for b in best]), arguments.plot)


if __name__ == "__main__":
    main()
