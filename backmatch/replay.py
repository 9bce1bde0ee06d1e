"""Work on a GPU recorded once and started by one call of the host, where starting its kernels one by one would have the GPU wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backmatch.step import kinds_of

_MOST_PATIENT = 64
"""Steps alike, at most, that are waited for before work is recorded again."""


class Replay:
    """Does work again and again; as a CUDA graph once it has been asked for twice alike.

    A graph reads and writes the memory that it was recorded with. So work may keep nothing but what it writes into tensors that were
    there before; all that the host decides by, and where those tensors lie, must be told apart by a key; and what work reads beside
    them must live as long as the key stays the same. To record waits for the device: after each graph that had to go the work must be
    alike twice as often before it is recorded again.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[Tensor] = []
        self._alike = 0
        self._patience = 1

    def run(self, work: Callable[[Sequence[Tensor]], None], inputs: Sequence[Tensor], key: object) -> None:
        """Do ``work(inputs)``.

        Args:
            work: Leaves its inputs as they are.
            inputs: What may lie elsewhere every time, all on one GPU: it is copied to where the graph reads it.
            key: Equal where the same graph does.
        """
        self._alike = self._alike + 1 if key == self._key else 0
        if self._alike == 0 and self._graph is not None:
            self._graph, self._held = None, []
            self._patience = min(_MOST_PATIENT, 2 * self._patience)
        if self._alike < self._patience:
            # As it comes: it may not come again, and what it sets up once does not belong in a graph.
            work(inputs)
            self._key = key
            return
        if self._graph is None:
            self._key = None  # if this fails, all begins anew
            held = [torch.empty_like(tensor) for tensor in inputs]
            self._graph, self._held = _recorded(work, held), held
            self._key = key
        for chosen in kinds_of(inputs):
            torch._foreach_copy_([self._held[i] for i in chosen], [inputs[i] for i in chosen])
        self._graph.replay()


def _recorded(work: Callable[[Sequence[Tensor]], None], inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    device = inputs[0].device
    graph = torch.cuda.CUDAGraph()
    # torch's own stream for this is one for all graphs, on the device that was the current one when it was made. What other threads
    # do, such as a loader that pins memory, is no part of the graph and does no harm.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        work(inputs)
    return graph
