"""Ranks that share their gradients share what is read off them: two of them are one process on the whole batch."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from backmatch import BackMatchSGD

pytestmark = pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="torch has no gloo")

RANKS, STEPS, DEADLINE = 2, 12, 90.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 3, 2), nn.Flatten(), nn.LayerNorm(15), nn.Linear(15, 3)
    return nn.Sequential(*layers).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (8,), generator=generator)


def train(net: nn.Module, optimizer: BackMatchSGD, samples: slice) -> None:
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[samples]), y[samples]).backward()
        optimizer.step()


def results(net: nn.Module, optimizer: BackMatchSGD) -> dict[str, list[Tensor]]:
    read = {"responses": optimizer.responses(), "paces": optimizer.paces(), "weights": dict(net.named_parameters())}
    return {name: [value.detach().clone() for value in values.values()] for name, values in read.items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # A file to meet at instead of a port, which another process may take.
    store = distributed.FileStore(f"{folder}/store", RANKS)
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, pg_options=options)
    try:
        net = DistributedDataParallel(network())
        optimizer = BackMatchSGD(net, 0.01)
        train(net, optimizer, slice(4 * rank, 4 * rank + 4))
        torch.save(results(net, optimizer), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    ranks = spawn(work, (str(tmp_path),), nprocs=RANKS, join=False)
    assert ranks is not None
    deadline = time.monotonic() + DEADLINE
    try:
        while not ranks.join(timeout=1.0):
            assert time.monotonic() < deadline, f"the ranks took more than {DEADLINE} s"
    finally:
        for process in ranks.processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    assert_close(first, second, rtol=0.0, atol=0.0)
    net = network()
    optimizer = BackMatchSGD(net, 0.01)
    train(net, optimizer, slice(0, 8))
    assert_close(first, results(net, optimizer), rtol=1e-9, atol=1e-12)
    assert all(not torch.equal(a, b) for a, b in zip(first["weights"], network().parameters(), strict=True))
