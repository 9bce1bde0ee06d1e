"""Second moments and constants as 0-dim tensors outside the graph, in float32 or wider."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Layer: TypeAlias = Any  # a module whose attributes depend on its kind, which torch declares as Tensor | Module


def widened(x: Tensor) -> Tensor:
    """``x`` outside the graph and in a dtype fit to sum in: half precision and integers become float32, float64 stays."""
    return x.detach().to(accumulation_dtype(x))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def square_sum(x: Tensor) -> Tensor:
    """Sum of squares, 0-dim."""
    return widened(x).square().sum()


def constant(value: float, like: Tensor) -> Tensor:
    """``value`` as a 0-dim tensor on the device of ``like``."""
    return torch.full((), value, dtype=accumulation_dtype(like), device=like.device)


def every(x: Tensor, limit: int) -> Tensor:
    """Evenly spaced entries along dimension 0: all of them if there are at most ``limit``, else no fewer than half of that."""
    return x[:: max(1, -(-x.shape[0] // limit))]
