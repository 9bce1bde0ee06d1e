"""The leading singular directions of the steps of matrices, followed from step to step and held to a length. Knows nothing of networks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

AXES = 6
"""Singular directions that are followed of each matrix: in bfloat16 they take 3 floats per entry of its shorter side."""

_FLOOR = 1e-6
"""Of squared lengths of unit vectors: what is left of one that lies among those before it does not decide where it points."""


class Lead(NamedTuple):
    """What of a matrix ``[m, n]``, or a tensor ``[m, …]`` as one of n columns, is held.

    Attributes:
        axes: ``[k, min(m, n)]``, orthonormal rows near the leading singular vectors of the shorter side; of any floating dtype.
        limit: What no leading singular value exceeds, 0-dim.
    """

    axes: Tensor
    limit: Tensor


def first_axes(p: Tensor) -> Tensor:
    """Rows to start from, ``[min(6, m, n), min(m, n)]``, without structure of their own; by a formula, as torch.compile has no seeds."""
    rows, columns = p.shape[0], p.numel() // p.shape[0]
    width = min(rows, columns)
    if width <= AXES:
        return torch.eye(width, device=p.device, dtype=torch.bfloat16)
    numbers = torch.arange(1, width + 1, device=p.device, dtype=torch.float64)
    phases = torch.outer(numbers[:AXES], numbers.square()) * ((math.sqrt(5.0) - 1.0) * math.pi)
    found = phases.cos()
    return _orthonormal(found, found).to(torch.bfloat16)


def hold(update: Tensor, lead: Lead, *, keep: Tensor | None = None) -> None:
    r"""Shorten the leading singular values of a matrix U to a limit, in place, and follow its singular directions.

    With rows v of ``lead.axes``, one orthogonal iteration (Golub and Van Loan 2013, section 8.2.4) and then

        U ← U − Σ_i max(0, 1 − limit/‖U v_i‖) · (U v_i) v_iᵀ

    which leaves a singular value σ as ``min(σ, limit)`` where v_i is its singular vector, and all others as they are.

    Args:
        update: U, ``[m, …]``.
        lead: Its axes are overwritten by the new ones, to serve the next step, whose U is much like this one.
        keep: 0-dim, bool; where True the axes stay as they are. None for False.
    """
    dtype = torch.promote_types(update.dtype, torch.float32)
    with torch.autocast(update.device.type, enabled=False):
        matrix = update.flatten(1).to(dtype)
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
        old = lead.axes.to(dtype)
        axes = _orthonormal((tall @ old.mT).mT @ tall, old)
        images = tall @ axes.mT
        lengths = torch.linalg.vector_norm(images, dim=0)
        excess = images * (1.0 - lead.limit.to(lengths) / lengths).clamp_min(0.0).nan_to_num(0.0)  # 0/0: no limit to nothing
        shortened = torch.addmm(tall, excess, axes, alpha=-1.0)
    update.copy_((shortened if tall is matrix else shortened.mT).view_as(update))
    lead.axes.copy_(axes if keep is None else torch.where(keep, old, axes))


def _orthonormal(rows: Tensor, old: Tensor) -> Tensor:
    """An orthonormal basis of the rows, of the first i of the first i; those of ``old`` where one is 0."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = torch.where(lengths > 0, rows / lengths, old)
    gram = rows @ rows.mT
    gram.diagonal().add_(_FLOOR)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, rows, upper=False)
