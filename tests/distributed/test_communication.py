"""What goes over the wire, and when: against the formulas of benchmarks/scaling.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from backmatch.contract import is_due
from benchmarks.scaling import Matrix, Network, bytes_sent, factors, ring, units
from tests.distributed.ranks import needs_gloo, on_ranks
from tests.distributed.test_same_result import OPTIMIZERS, network, sharded, train

pytestmark = [needs_gloo, pytest.mark.timeout(120)]

RANKS, STEPS, INTERVAL = 2, 22, 5
NET = Network([Matrix(8, 7), Matrix(5, 25), Matrix(3, 17)], embedding_rows=11 + 4, vectors=6)
"""The tests' network: three layers that are matched, a bias as a column; a table, and a transposed convolution like one; vectors."""
FLOATS = 8 / 4
"""The network has float64 parameters; the formulas count float32."""


def job(layout: str, name: str) -> list[list[list[int]]]:
    """Per step the number of elements of every collective of ours, by kind: sums, then exchanges (those that leave this rank)."""
    counted: list[list[list[int]]] = []
    reduce, exchange = distributed.all_reduce, distributed.all_to_all_single

    def counting_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted[-1][0].append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def counting_exchange(output: Tensor, given: Tensor, sizes: list[int], sent: list[int], *args: Any, **kwargs: Any) -> Any:
        counted[-1][1].append(sum(sent) - sent[distributed.get_rank()])
        return exchange(output, given, sizes, sent, *args, **kwargs)

    distributed.all_reduce, distributed.all_to_all_single = counting_reduce, counting_exchange
    net: nn.Module = DistributedDataParallel(network()) if layout == "ddp" else sharded(network())
    kind, settings = OPTIMIZERS[name]
    optimizer = kind(net, 0.01, interval=INTERVAL, **settings)
    for step in range(STEPS):
        counted.append([[], []])
        train(net, optimizer, range(step, step + 1), rank=distributed.get_rank(), ranks=RANKS)
    return counted


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["sgd", "kron"])
def test_sums_and_exchanges(layout: str, name: str, tmp_path: Path) -> None:
    found = on_ranks(RANKS, job, tmp_path / "ranks", layout, name)
    # Sums at every step: of each unit its gradient's size and its own; of a matched weight or bias whether it is finite.
    small = 2 * (NET.embedding_rows + 3) + 6 if name == "kron" else 2 * units(NET)
    for step, counts in enumerate(found[0]):
        sums = [] if layout == "ddp" else [small]
        if name == "kron" and is_due(step, INTERVAL):
            counters = 2 * len(NET.matrices) + 4
            sums = [factors(NET, 1024) + counters] + ([factors(NET, 1024)] if layout == "ddp" else []) + sums
        assert counts[0] == sums, (step, counts[0], sums)
        assert len(counts[1]) == (2 if (layout, name) == ("fsdp", "kron") else 0)
    if layout == "fsdp" and name == "kron":
        exchanged = sum(sum(rank[-1][1]) for rank in found) / RANKS * 8
        promised = bytes_sent(NET, RANKS, sharded=True, interval=INTERVAL, widest=1024)["BackMatch"]
        promised -= ring(factors(NET, 1024), RANKS) / INTERVAL + ring(2 * NET.embedding_rows, RANKS)
        assert exchanged == pytest.approx(promised * FLOATS, rel=0.25)  # shards are uneven: 5 and 3 rows do not halve
