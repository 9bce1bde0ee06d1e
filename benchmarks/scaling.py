"""How the optimizers scale on paper: bytes that a rank sends and products that it makes per step, against the number of ranks.

    python benchmarks/scaling.py

Nothing is run. ``tests/distributed/test_communication.py`` counts the bytes of a small network on real ranks against the same formulas.
Sums go as rings: of n bytes each of R ranks sends 2 n (R − 1)/R. Floats have 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from backmatch.leading import AXES

FLOAT = 4
EIGH = 9.0
"""Products of an eigendecomposition with vectors, in units of the cube of its rows (Golub and Van Loan, 8.3)."""


@dataclass(frozen=True)
class Matrix:
    """A layer's weight ``[d_out, d_in]``, how many there are like it, the positions of a sample that share it, and its kernel's taps."""

    d_out: int
    d_in: int
    count: int = 1
    positions: int = 1
    taps: int = 1

    @property
    def widths(self) -> tuple[int, int]:
        """Rows of A, which is of the channels alone, and of B."""
        return self.d_in // self.taps, self.d_out


@dataclass(frozen=True)
class Network:
    matrices: Sequence[Matrix]
    embedding_rows: int = 0
    vectors: int = 0
    """Parameters that are vectors: one number each."""
    batch: int = 1
    """Samples per rank."""


def _resnet50() -> list[Matrix]:
    """He et al. 2015, on 224x224 images."""
    found, c_in = [Matrix(64, 3 * 49, 1, 112 * 112, taps=49)], 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width, side = 64 * 2**stage, 56 // 2**stage
        for block in range(depth):
            found += [Matrix(width, c_in, 1, side**2), Matrix(width, 9 * width, 1, side**2, taps=9), Matrix(4 * width, width, 1, side**2)]
            if block == 0:
                found.append(Matrix(4 * width, c_in, 1, side**2))
            c_in = 4 * width
    return [*found, Matrix(1000, 2048)]


NETWORKS = {
    "ResNet-50": Network(_resnet50(), vectors=107, batch=64),
    "GPT-2 124M": Network(
        [Matrix(2304, 768, 12, 1024), Matrix(768, 768, 12, 1024), Matrix(3072, 768, 12, 1024), Matrix(768, 3072, 12, 1024)],
        embedding_rows=50257 + 1024,
        vectors=98,
        batch=8,
    ),
    "7B": Network(
        [Matrix(4096, 4096, 128, 4096), Matrix(11008, 4096, 64, 4096), Matrix(4096, 11008, 32, 4096), Matrix(32000, 4096, 1, 4096)],
        embedding_rows=32000,
        vectors=65,
        batch=1,
    ),
}
"""GPT-2's head is its embedding, which is looked up and so is not matched; the 7B has the shapes of LLaMA."""


def blocks_of(width: int, widest: int) -> int:
    """Floats of a second moment of so many rows, in diagonal blocks of at most ``widest``."""
    blocks = ceil(width / widest)
    return blocks * ceil(width / blocks) ** 2


def units(network: Network) -> int:
    """Output units and vectors. Of each, sharded, BackMatchSGD sums its gradient's size and its own over ranks, at every step."""
    return sum(matrix.d_out * matrix.count for matrix in network.matrices) + network.embedding_rows + network.vectors


def held_sums(rows: int, columns: int) -> list[int]:
    """Floats of the four sums over ranks by which the step of a matrix with sharded rows is held, see :func:`backmatch.leading.hold`."""
    count = min(AXES, rows, columns)
    return [0, count * columns, 0, count + 1] if rows >= columns else [count * columns, count * rows, count * columns, 1]


def factors(network: Network, widest: int) -> int:
    """Floats of all A and B; of their powers as many again."""
    return sum(blocks_of(width, widest) * m.count for m in network.matrices for width in m.widths)


def weights(network: Network) -> int:
    return sum(m.d_out * m.d_in * m.count for m in network.matrices)


def ring(floats: float, ranks: int) -> float:
    """Bytes that one rank sends for a sum."""
    return 2 * FLOAT * floats * (ranks - 1) / ranks


def bytes_sent(network: Network, ranks: int, *, sharded: bool, interval: int, widest: int) -> dict[str, float]:
    """By one rank per step, beyond what the layout itself sends; refreshes spread over their interval."""
    refresh = ring(factors(network, widest), ranks)
    exchange = 2 * FLOAT * weights(network) / ranks * (ranks - 1) / ranks
    rest = ring(2 * network.embedding_rows, ranks)
    held = sum(matrix.count * sum(held_sums(matrix.d_out, matrix.d_in)) for matrix in network.matrices)
    return {
        "BackMatchSGD": ring(2 * units(network) + held, ranks) if sharded else 0.0,
        "BackMatch": exchange + rest + refresh / interval if sharded else 2 * refresh / interval,
    }


def levelling(low: int, high: int) -> float:
    """Multiplications and additions of :func:`backmatch.newton_schulz.orthogonalised` for one matrix."""
    gram, square, last = symmetric(low, high), symmetric(low, low), 2.0 * low**2 * high
    return gram + 13 * square + last if 2 * high >= 3 * low else 4 * (gram + square + last)


def symmetric(rows: int, length: int) -> float:
    """Of a product ``[rows, rows]`` that comes out symmetric, over so many terms: of its lower half where it is large."""
    return 2.0 * rows**2 * length if rows <= 512 else 2 * symmetric(rows // 2, length) + 2.0 * (rows / 2) ** 2 * length


def products(network: Network, ranks: int, *, sharded: bool, interval: int, rows: int, widest: int) -> dict[str, float]:
    """Multiplications and additions of one rank per step: the network's own, and BackMatch's by what they are for."""
    model = sum(6.0 * m.d_out * m.d_in * m.count * m.positions * network.batch for m in network.matrices)
    step = measure = invert = 0.0
    for m in network.matrices:
        a, b = (ceil(width / ceil(width / widest)) for width in m.widths)
        step += m.count * (2.0 * m.d_out * m.d_in * (a + b) + levelling(*sorted((m.d_in, m.d_out))))
        measure += m.count * 2.0 * min(rows, m.positions * network.batch) * (m.d_in * a + m.d_out * b)
        invert += m.count * (EIGH + 2) * (a**2 * m.widths[0] + b**2 * m.widths[1])
    return {"model": model, "step": step / (ranks if sharded else 1), "measure": measure / interval, "invert": invert / ranks / interval}


def main() -> None:
    settings = {"interval": 20, "rows": 1024, "widest": 384}
    own = ("network", "layout", "ranks")
    sent = ("BackMatchSGD sends, MB", "BackMatch sends, MB", "gradients and weights, MB")
    made = ("network, TFLOP", "match, TFLOP", "measure, TFLOP", "invert, TFLOP")
    heads = (*own, *sent, *made)
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, network in NETWORKS.items():
        for layout in ("DDP", "FSDP2"):
            for ranks in (1, 8, 64):
                sharded = layout == "FSDP2"
                extra = bytes_sent(network, ranks, sharded=sharded, interval=settings["interval"], widest=settings["widest"])
                layout_sends = ring(weights(network), ranks) * (1.5 if sharded else 1.0)  # two gathers and one reduce-scatter
                megabytes = [f"{value / 1e6:.3g}" for value in (*extra.values(), layout_sends)]
                work = products(network, ranks, sharded=sharded, **settings)
                print("| " + " | ".join([name, layout, str(ranks), *megabytes, *(f"{value / 1e12:.3g}" for value in work.values())]) + " |")


if __name__ == "__main__":
    main()
