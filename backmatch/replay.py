"""Work on a GPU recorded once and started by one call of the host, where starting its kernels one by one would have the GPU wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replay:
    """Does work again and again; as a CUDA graph once it has been asked for twice alike.

    A graph reads and writes the memory that it was recorded with. So work may keep nothing but what it writes into tensors that were
    there before, and all that the host decides by, and where those tensors lie, must be told apart by a key.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[Tensor] = []

    def run(self, work: Callable[[Sequence[Tensor]], None], inputs: Sequence[Tensor], key: object) -> None:
        """Do ``work(inputs)``.

        Args:
            work: Leaves its inputs as they are.
            inputs: What may lie elsewhere every time: it is copied to where the graph reads it.
            key: Equal where the same graph does.
        """
        if key != self._key:
            # As it comes: it may not come again, and what it sets up once does not belong in a graph.
            self._graph, self._held = None, []
            work(inputs)
            self._key = key
            return
        if self._graph is None:
            self._held = [torch.empty_like(tensor) for tensor in inputs]
            self._graph = torch.cuda.CUDAGraph()
            # What other threads do, such as a loader that pins memory, is no part of it and does no harm.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                work(self._held)
        torch._foreach_copy_(self._held, list(inputs))
        self._graph.replay()
