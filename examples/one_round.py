"""One round of the paper in plain PyTorch: equations (7) to (10) on 8x8 digits, nothing hidden.

    python examples/one_round.py

Four workers, two of them with half of the weights; a small network; the exponential integrator.
The library does the same with real networks, real machines and every check in place.
"""

import math

import torch
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
N, S, R, eta = 4, 60, 40, 0.3  # workers, local steps, rounds, step size of SGD
T, delta, K = 4.0, 1e-2, 60  # the forward process runs to T; sampling stops at delta

# Data stays with its worker: images in [-1, 1], d = 64.
images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
workers = images.split(math.ceil(len(images) / N))

# A partition of time u_0 = T > ... > u_K = delta and the weights gamma_k / sigma_k^2 of (5).
u = torch.exp(torch.linspace(math.log(T), math.log(delta), K + 1))
gamma = u[:-1] - u[1:]
weight = gamma / -torch.expm1(-2 * u[:-1])

network = nn.Sequential(nn.Linear(64 + 8, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU())
network.append(nn.Linear(256, 64))


def eps_theta(x, u):
    """Return the network's noise estimate; the score is s_theta = -eps_theta / sigma_u."""
    log_ratio = 0.5 * torch.log(torch.expm1(2 * u))
    angle = log_ratio[:, None] * torch.tensor([0.25, 0.5, 1.0, 2.0])
    v = network(torch.cat([x, angle.sin(), angle.cos()], 1))
    return torch.exp(-u)[:, None] * v + torch.sqrt(-torch.expm1(-2 * u))[:, None] * x


def f_n(x0):
    """Return the stochastic loss: an unbiased estimate of (5) / (Z d), k drawn with p_k ~
    weight_k.
    """
    k = torch.multinomial(weight, len(x0), replacement=True)
    eps = torch.randn_like(x0)
    x_u = torch.exp(-u[k])[:, None] * x0 + torch.sqrt(-torch.expm1(-2 * u[k]))[:, None] * eps
    return (eps_theta(x_u, u[k]) - eps).square().mean()


def load(theta):
    for parameter, value in zip(network.parameters(), theta, strict=True):
        parameter.data.copy_(value)


theta = [p.detach().clone() for p in network.parameters()]  # theta_0
for r in range(R):
    sums = [torch.zeros_like(p) for p in theta]
    counts = [torch.zeros_like(p) for p in theta]
    losses = []
    for n in range(N):
        keep = 1.0 if n < N // 2 else 0.5
        mask = [(torch.rand_like(p) < keep).float() if p.dim() > 1 else torch.ones_like(p)
                for p in theta]  # fmt: skip
        load([p * m for p, m in zip(theta, mask, strict=True)])  # theta_{r,n,0} = theta_r * m
        for _ in range(S):
            x0 = workers[n][torch.randint(len(workers[n]), (64,))]
            loss = f_n(x0)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():  # (7): theta <- theta - eta grad f_n(theta, xi) * m
                for p, g, m in zip(network.parameters(), gradients, mask, strict=True):
                    p -= eta * g * m
            losses.append(loss.item())
        for total, count, p, m in zip(sums, counts, network.parameters(), mask, strict=True):
            total += p.detach() * m
            count += m
    # (8): each coordinate is the mean over those who trained it; nobody did -> theta_r stays
    theta = [torch.where(c > 0, s / c.clamp(min=1), p)
             for s, c, p in zip(sums, counts, theta, strict=True)]  # fmt: skip
    if (r + 1) % 10 == 0:
        gamma_r = int(min(c.min() for c in counts))
        print(f"round {r + 1}: loss {sum(losses) / len(losses):.3f}, Gamma_r {gamma_r}")

load(theta)
with torch.no_grad():  # (9), (10): from Y ~ N(0, I), each step solved exactly (Appendix B)
    y = torch.randn(6, 64)
    for k in range(K):
        g = float(gamma[k])
        score = -eps_theta(y, u[k].expand(6)) / math.sqrt(-math.expm1(-2 * float(u[k])))
        y = math.exp(g) * y + 2 * math.expm1(g) * score
        y = y + math.sqrt(math.expm1(2 * g)) * torch.randn_like(y)

for row in ((y.reshape(6, 8, 8) + 1) * 4.5).clamp(0, 9).round().int().transpose(0, 1):
    print("   ".join("".join(" .:-=+*#%@"[v] for v in image) for image in row))
