"""A small network, its batches, and the plain loop that every framework must equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from backmatch import BackMatchSGD

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS: dict[str, Any] = {"lr": 0.2, "estimator": "probe", "interval": 4, "samples": 4}
"""Measurements at every step up to 8, then at 10, 12, 15, 16, 20, 24, ...: not at 9 and 18, where one and two epochs end."""

BATCHES = 9
"""Of an epoch."""


def network() -> nn.Sequential:
    """Without dropout: loaders of frameworks draw from the random state that it would share."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def dataset(batches: int = BATCHES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(8 * batches, 6, generator=generator), torch.randint(0, 3, (8 * batches,), generator=generator))


def loader(batches: int = BATCHES) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of 8, in order."""
    return DataLoader(dataset(batches), 8)


def plain(
    net: nn.Module,
    optimizer: BackMatchSGD,
    *,
    epochs: int = 2,
    accumulate: int = 1,
    clip: float | None = None,
    scheduler: LRScheduler | None = None,
    autocast: bool = False,
) -> None:
    """The loop of PyTorch's tutorials."""
    net.train()
    for _ in range(epochs):
        for index, (x, y) in enumerate(loader(6 if accumulate > 1 else BATCHES)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = net(x)
            (cross_entropy(output.float(), y) / accumulate).backward()
            if (index + 1) % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()


def trained(
    net: nn.Module | None = None,
    *,
    epochs: int = 2,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: bool = False,
    **settings: Any,
) -> BackMatchSGD:
    """The optimizer after the plain loop, which holds the network."""
    net = network() if net is None else net
    optimizer = BackMatchSGD(net, **SETTINGS | settings)
    plain(net, optimizer, epochs=epochs, accumulate=accumulate, clip=clip, autocast=autocast)
    return optimizer


def assert_same(optimizer: BackMatchSGD, expected: BackMatchSGD, **tolerance: float) -> None:
    """Measured responses, paces, momentum and weights, and buffers of the networks; bit for bit unless a tolerance is given."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    assert len(expected.responses()) == len(tensors(expected))
    for read in (BackMatchSGD.responses, BackMatchSGD.paces):
        assert_close(list(read(optimizer).values()), list(read(expected).values()), **tolerance)
    momenta = [[o.state[p]["momentum_buffer"] for p in tensors(o)] for o in (optimizer, expected)]
    assert_close(*momenta, **tolerance)
    assert_close(tensors(optimizer), tensors(expected), **tolerance)
    assert_close(buffers(optimizer), buffers(expected), **tolerance)


def tensors(optimizer: BackMatchSGD) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def buffers(optimizer: BackMatchSGD) -> list[Tensor]:
    assert optimizer._model is not None
    return list(optimizer._model.buffers())


def run_example(name: str) -> str:
    """What an example prints; it must end well."""
    run = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return run.stdout
