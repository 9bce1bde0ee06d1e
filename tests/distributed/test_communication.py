"""What goes over the wire, and when: against the formulas of benchmarks/scaling.py."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from backmatch.contract import is_due
from benchmarks.scaling import Matrix, Network, bytes_sent, factors, held_sums, ring, units
from tests.distributed.ranks import needs_gloo, on_ranks
from tests.distributed.test_same_result import OPTIMIZERS, network, sharded, train

pytestmark = [needs_gloo, pytest.mark.timeout(120)]

RANKS, STEPS, INTERVAL = 2, 22, 5
NAMES = ("sgd", "kron")
NET = Network([Matrix(8, 7), Matrix(5, 24, taps=3), Matrix(3, 17)], embedding_rows=11 + 4, vectors=6)
"""The tests' network: three layers that are matched, a bias as a column but for the convolution's; a table, and a transposed convolution
like one; vectors."""
HELD = [(8, 6), (5, 24), (5, 8), (3, 16)]
"""Its weights but for the table, as matrices whose rows are sharded."""
FLOATS = 8 / 4
"""The network has float64 parameters; the formulas count float32."""


def job(layout: str) -> dict[str, list[list[list[int]]]]:
    """By optimizer, per step the number of elements of every collective of ours: sums, then exchanges (those that leave this rank)."""
    counted: list[list[list[int]]] = []
    reduce, exchange = distributed.all_reduce, distributed.all_to_all_single

    def counting_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted[-1][0].append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def counting_exchange(output: Tensor, given: Tensor, sizes: list[int], sent: list[int], *args: Any, **kwargs: Any) -> Any:
        counted[-1][1].append(sum(sent) - sent[distributed.get_rank()])
        return exchange(output, given, sizes, sent, *args, **kwargs)

    distributed.all_reduce, distributed.all_to_all_single = counting_reduce, counting_exchange
    found = {}
    for name in NAMES:
        net: nn.Module = DistributedDataParallel(network()) if layout == "ddp" else sharded(network())
        kind, settings = OPTIMIZERS[name]
        optimizer = kind(net, 0.01, interval=INTERVAL, **settings)
        counted.clear()
        for step in range(STEPS):
            counted.append([[], []])
            train(net, optimizer, range(step, step + 1), rank=distributed.get_rank(), ranks=RANKS)
        found[name] = list(counted)
    return found


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def counts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    return request.param, on_ranks(RANKS, job, tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.parametrize("name", NAMES)
def test_sums_and_exchanges(counts: tuple[str, list[dict[str, Any]]], name: str) -> None:
    layout, found = counts[0], [rank[name] for rank in counts[1]]
    # Sums at every step: of each unit its gradient's size and its own; of a matched weight or bias whether it is finite.
    small = 2 * (NET.embedding_rows + 4) + 5 if name == "kron" else 2 * units(NET)
    for step, (summed, exchanged) in enumerate(found[0]):
        sums = [] if layout == "ddp" else [small]
        if (layout, name) == ("fsdp", "sgd"):
            sums += [sum(floats) for floats in zip(*(held_sums(*shape) for shape in HELD), strict=True)]
        if name == "kron" and is_due(step, INTERVAL):
            counters = 2 * len(NET.matrices) + 4
            sums = [factors(NET, 1024) + counters] + ([factors(NET, 1024)] if layout == "ddp" else []) + sums
        assert summed == sums, step
        assert len(exchanged) == (2 if (layout, name) == ("fsdp", "kron") else 0)
    if layout == "fsdp" and name == "kron":
        sent = sum(sum(rank[-1][1]) for rank in found) / RANKS * 8
        promised = bytes_sent(NET, RANKS, sharded=True, interval=INTERVAL, widest=1024)["BackMatch"]
        promised -= ring(factors(NET, 1024), RANKS) / INTERVAL + ring(2 * NET.embedding_rows, RANKS)
        assert sent == pytest.approx(promised * FLOATS, rel=0.25)  # shards are uneven: 5 and 3 rows do not halve
