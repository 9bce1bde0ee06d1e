"""A small network trained by exact back-matching, against SGD at the best of several learning rates.

1. A linear teacher: one step of exact matching is the least-squares solution.
2. A tanh network whose inputs have very different sizes, three seeds: exact matching, and SGD with twenty times as many steps.
   Both rates come from a small grid; SGD is given the best of its grid and the best of its steps on every seed.

Run: python examples/exact_training.py
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from backmatch import exact

STEPS, SGD_STEPS = 10, 200
SGD_RATES = (0.03, 0.1, 0.3, 1.0)


def half_squared_error(z: Tensor, y: Tensor) -> Tensor:
    """Mean over samples, so that δ_B = z − y."""
    return (z - y).square().sum(1).mean() / 2


def tanh_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))


def linear_teacher() -> None:
    x, y = torch.randn(100, 6) * torch.logspace(1, -1, 6), torch.randn(100, 2)
    layer = nn.Linear(6, 2)
    exact.train_step(nn.Sequential(layer), x, y, half_squared_error, lr=1.0)
    with_ones = np.concatenate([x.numpy(), np.ones((100, 1))], axis=1)
    solution = np.linalg.lstsq(with_ones, y.numpy(), rcond=None)[0].T
    found = np.concatenate([layer.weight.detach().numpy(), layer.bias.detach().numpy()[:, None]], axis=1)
    print(f"linear teacher: largest distance to the least-squares solution after one step {abs(found - solution).max():.1e}")
    assert np.allclose(found, solution, atol=1e-4)


def nonlinear_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    white = torch.randn(100, 6)
    teacher = tanh_network()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(2)
        y = teacher(white)
    x = white * torch.logspace(0.5, -1.5, 6)
    start = tanh_network()

    network = copy.deepcopy(start)
    print(f"tanh network, seed {seed}: loss at the start {half_squared_error(network(x), y).item():.4f}")
    # Three layers with parameters move at once, so each makes about a third of the change.
    for _ in range(STEPS):
        exact.train_step(network, x, y, half_squared_error, lr=0.3, solver=exact.Solver(damping=0.01))
    exact_loss = half_squared_error(network(x), y).item()
    print(f"  exact matching, {STEPS} steps: {exact_loss:.4f}")

    sgd_losses = []
    for lr in SGD_RATES:
        network = copy.deepcopy(start)
        optimizer = torch.optim.SGD(network.parameters(), lr)
        losses = []
        for _ in range(SGD_STEPS):
            optimizer.zero_grad()
            loss = half_squared_error(network(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        sgd_losses.append(min(losses))
        print(f"  SGD, lr {lr}, {SGD_STEPS} steps: {sgd_losses[-1]:.4f} at best")
    assert exact_loss < min(sgd_losses)


if __name__ == "__main__":
    torch.manual_seed(0)
    linear_teacher()
    for seed in range(3):
        nonlinear_teacher(seed)
