"""Embeddings: rows of a table, chosen by indices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backmatch.layers.moments import accumulation_dtype

KINDS = (nn.Embedding,)


def gain(module: nn.Embedding, x: Tensor) -> Tensor:
    """Indices have no derivative.

    Raises:
        ValueError: Always; nothing below an embedding asks for its gain.
    """
    raise ValueError("Invalid layer: Embedding reads indices, which have no derivative, so it has no gain. Ask for its curvature.")


def curvature(module: nn.Embedding, x: Tensor) -> dict[str, Tensor]:
    r"""Mean eigenvalue of the table's local Hessian: tokens per sample / rows, exact (docs/derivation.md section 3).

    The Hessian is diagonal and holds how often each row is used; this is its mean over rows, however uneven their use.
    Tokens equal to ``padding_idx`` are not counted: they send no gradient.

    Args:
        module: The layer, table ``[rows, d]``.
        x: Indices, ``[N, ...]``.

    Returns:
        m_W of ``weight``, 0-dim.

    Raises:
        NotImplementedError: If ``max_norm`` is set: every forward then rewrites the table.
    """
    if module.max_norm is not None:
        raise NotImplementedError("Embedding with max_norm has no rule: its forward rewrites the table. Use max_norm=None.")
    counted = torch.ones_like(x, dtype=torch.bool) if module.padding_idx is None else x != module.padding_idx
    tokens = torch.count_nonzero(counted).to(accumulation_dtype(module.weight))
    return {"weight": tokens / (x.shape[0] * module.num_embeddings)}
