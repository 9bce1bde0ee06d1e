"""Work on a GPU recorded once and started by one call of the host, where starting its kernels one by one would have the GPU wait."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backmatch.step import kinds_of

Work: TypeAlias = Callable[[Sequence[Tensor]], None]

_MOST_PATIENT = 64
"""Times alike, at most, that are waited for before work is recorded again."""


class Replay:
    """Does pieces of work again and again, one at a time; as CUDA graphs once they have been asked for twice alike.

    A graph reads and writes the memory that it was recorded with. So work may keep nothing but what it writes into tensors that were
    there before; all that the host decides by, and where those tensors lie, must be told apart by a key; and what work reads beside
    them must live as long as the key stays the same. To record waits for the device: after each graph that had to go the work must be
    alike twice as often before it is recorded again.
    """

    def __init__(self) -> None:
        self._pieces: defaultdict[str, _Piece] = defaultdict(_Piece)
        self._streams: dict[torch.device, Any] = {}

    def run(self, name: str, work: Work, inputs: Sequence[Tensor], key: object) -> None:
        """Do ``work(inputs)``.

        Args:
            name: Of the piece of work.
            work: Leaves its inputs as they are.
            inputs: What may lie elsewhere every time, all on one GPU: it is copied to where the graph reads it.
            key: Equal, for inputs of the same kinds, where the same graph does.
        """
        key = key, [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in inputs]
        self._pieces[name].run(work, inputs, key, partial(self._recorded, work))

    def let_go(self, name: str) -> None:
        """Of the graph of a piece of work, and of what it holds."""
        self._pieces.pop(name, None)

    def _recorded(self, work: Work, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        device = inputs[0].device
        if device not in self._streams:
            # torch's own for this is one for all graphs, on the device that was the current one when it was made.
            self._streams[device] = torch.cuda.Stream(device)
        # What one graph takes while it runs, another may: memory of one pool and one stream.
        pool = next((piece.graph.pool() for piece in self._pieces.values() if piece.graph is not None), None)
        graph = torch.cuda.CUDAGraph()
        # What other threads do, such as a loader that pins memory, is no part of the graph and does no harm.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, stream=self._streams[device], capture_error_mode="thread_local"),
        ):
            work(inputs)
        return graph


class _Piece:
    """One piece of work: its graph, what that reads its inputs from, and how often it was asked for alike."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._key: object = None
        self._held: list[Tensor] = []
        self._alike = 0
        self._patience = 1

    def run(self, work: Work, inputs: Sequence[Tensor], key: object, recorded: Callable[[Sequence[Tensor]], torch.cuda.CUDAGraph]) -> None:
        self._alike = self._alike + 1 if key == self._key else 0
        if self._alike == 0 and self.graph is not None:
            self.graph, self._held = None, []
            self._patience = min(_MOST_PATIENT, 2 * self._patience)
        if self._alike < self._patience:
            # As it comes: it may not come again, and what it sets up once does not belong in a graph.
            work(inputs)
            self._key = key
            return
        if self.graph is None:
            self._key = None  # if this fails, all begins anew
            held = [torch.empty_like(tensor) for tensor in inputs]
            self.graph, self._held = recorded(held), held
            self._key = key
        for chosen in kinds_of(inputs):
            torch._foreach_copy_([self._held[i] for i in chosen], [inputs[i] for i in chosen])
        self.graph.replay()


def places_of(tensors: Iterable[Tensor]) -> list[object]:
    """Where tensors lie, and as what: equal where kernels recorded for these may go on reading and writing them."""
    return [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
