"""What the paper reports, to stand beside what is measured here.

Table 2 of "How Distributed Collaboration Influences the Diffusion Model Training? A Theoretical
Perspective" (ICML 2025): Inception Score and FID after 300 rounds with 10 workers. It does not say
how many samples, which split or which extractor weights are behind them.
"""

from __future__ import annotations

TABLE_2: dict[str, dict[str, tuple[float, float]]] = {
    "cifar10": {
        "FedDM-F": (4.59, 73.73),
        "R-FedDM-L": (3.95, 103.59),
        "R-FedDM-M": (4.01, 104.53),
        "R-FedDM-S": (3.60, 111.21),
        "T-FedDM-L": (4.39, 83.75),
        "T-FedDM-M": (4.54, 80.42),
        "T-FedDM-S": (4.31, 84.98),
    },
    "svhn": {
        "FedDM-F": (2.79, 163.36),
        "R-FedDM-L": (2.76, 93.78),
        "R-FedDM-M": (2.60, 127.47),
        "R-FedDM-S": (2.53, 120.57),
        "T-FedDM-L": (2.72, 157.19),
        "T-FedDM-M": (2.55, 146.27),
        "T-FedDM-S": (2.51, 193.84),
    },
    "fashion_mnist": {
        "FedDM-F": (3.58, 87.59),
        "R-FedDM-L": (3.47, 53.70),
        "R-FedDM-M": (3.32, 52.31),
        "R-FedDM-S": (3.46, 49.94),
        "T-FedDM-L": (3.59, 87.85),
        "T-FedDM-M": (3.54, 100.69),
        "T-FedDM-S": (3.63, 109.83),
    },
}
"""The paper's Table 2: data set -> method -> (Inception Score, FID)."""
