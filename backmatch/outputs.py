"""What a network puts out: the tensors that count, and how many predictions they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def output_tensors(output: Any) -> list[Tensor]:
    """The floating tensors ``[N, ...]`` of a forward's output; of a mapping with ``logits`` those alone.

    Hugging Face models return losses and caches beside their logits.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    leaves = pytree.tree_leaves(output)
    return [z for z in leaves if isinstance(z, Tensor) and z.is_floating_point() and z.ndim > 0]


def predictions(outputs: Sequence[Tensor]) -> int:
    """How many predictions a loss averages over: the elements of the first output that has any over those of one prediction.

    One prediction is the last dimension of ``[N, C]`` and ``[N, S, C]``, dimension 1 of ``[N, C, H, W, ...]`` as convolutions put it
    out, and one number of ``[N]``. So a language model has a prediction per token, whether it merges samples and positions or not.
    """
    z = next((z for z in outputs if z.numel()), None)
    if z is None:
        return 0
    if z.ndim == 1:
        return z.shape[0]
    return z.numel() // z.shape[-1 if z.ndim <= 3 else 1]
