"""Steps of matrices apart: their leading singular directions, followed and held to a length, and the rest. Knows nothing of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backmatch.distributed import Share, share_of, sum_over_shares

AXES = 6
"""Singular directions that are followed of each matrix: in bfloat16 they take 3 floats per entry of its shorter side."""

_FLOOR = 1e-6
"""Of squared lengths of unit vectors: what is left of one that lies among those before it does not decide where it points."""

_FURTHEST = 10.0
"""How much longer the rest of a step becomes, at most, for what its leading directions take of its length."""


class Lead(NamedTuple):
    """What of the step of a matrix ``[m, n]``, or of a tensor ``[m, …]`` as one of n columns, is held.

    Attributes:
        param: Whose step it is; a sharded one too.
        axes: ``[k, min(m, n)]``, orthonormal rows near the leading singular vectors of the shorter side; of any floating dtype.
        limit: What no leading singular value exceeds, 0-dim.
    """

    param: Tensor
    axes: Tensor
    limit: Tensor


def first_axes(p: Tensor) -> Tensor:
    """Rows to start from, ``[min(6, m, n), min(m, n)]``, without structure of their own; by a formula, as torch.compile has no seeds."""
    width = min(p.shape[0], p.numel() // p.shape[0])
    if width <= AXES:
        return torch.eye(width, device=p.device, dtype=torch.bfloat16)
    numbers = torch.arange(1, width + 1, device=p.device, dtype=torch.float64)
    phases = torch.outer(numbers[:AXES], numbers.square()) * ((math.sqrt(5.0) - 1.0) * math.pi)
    found = phases.cos()
    return _orthonormal([found], [found])[0].to(torch.bfloat16)


def hold(updates: Sequence[Tensor], leads: Sequence[Lead | None], *, keep: Tensor | None = None) -> None:
    r"""Set the lengths of two parts of a matrix U apart, in place: of its leading singular directions, and of all others.

    With rows v of ``lead.axes``, k of them, and s the shorter side, one orthogonal iteration (Golub and Van Loan 2013, section 8.2.4),

        c = √( (1 − k/s) / (1 − Σ_i ‖U v_i‖² / ‖U‖²) )                     from 1 to 10
        U ← c (U − Σ_i U v_i v_iᵀ) + Σ_i min(1, limit/‖U v_i‖) U v_i v_iᵀ

    The others get the mean square that they would have if none led; c is 1 where s is k. A leading singular value σ becomes
    ``min(σ, limit)`` where v_i is its singular vector. Of sharded matrices no rank needs more than it holds: four sums over ranks at
    most, of k vectors of each, serve all together.

    Args:
        updates: What this rank holds of each U, ``[m, …]``; on one device, of one dtype.
        leads: None for what is left as it is. Axes are overwritten by the new ones, to serve the next step, whose U is much like this one.
        keep: 0-dim, bool; where True the axes stay as they are. None for False.
    """
    held = [(update, lead) for update, lead in zip(updates, leads, strict=True) if lead is not None]
    if not held:
        return
    dtype = torch.promote_types(updates[0].dtype, torch.float32)
    with torch.autocast(updates[0].device.type, enabled=False):
        sides = [_Side.of(update.to(dtype), lead.param) for update, lead in held]
        old = [lead.axes.to(dtype) for _, lead in held]
        axes = _orthonormal(_backwards(sides, _images(sides, old)), old)
        images = _images(sides, axes)
        leading = [image.square().sum(dim=1) for image in images]
        totals = [torch.linalg.vector_norm(update, dtype=dtype).square() for update, _ in held]
        cuts = [side.long_cut for side in sides] + [side.long_cut or side.short_cut for side in sides]
        squares = sum_over_shares([*leading, *totals], cuts)
        for i, ((update, lead), side, new, image) in enumerate(zip(held, sides, axes, images, strict=True)):
            factor = _lengthened(squares[i], squares[len(held) + i], side.across.numel())
            lengths = squares[i].sqrt()
            kept = (lead.limit.to(lengths) / lengths).clamp_max(1.0).nan_to_num(1.0)  # 0/0: no limit to nothing
            apart = side.without(image * (1.0 - kept / factor).unsqueeze(1), side.part_of(new))
            update.copy_(apart.mul_(factor).view_as(update))
            lead.axes.copy_(new if keep is None else torch.where(keep, old[i], new))


def _lengthened(leading: Tensor, total: Tensor, width: int) -> Tensor:
    """c of one matrix, of squares of its leading directions and of all of it."""
    even = 1.0 - len(leading) / width
    if even == 0.0:
        return torch.ones_like(total)
    rest = (1.0 - leading.sum() / total) / even
    return rest.clamp(1.0 / _FURTHEST**2, 1.0).rsqrt().nan_to_num(1.0)  # 0/0: of nothing


class _Side(NamedTuple):
    """What this rank holds of a matrix, its shorter side across; and which side is cut, if any.

    Attributes:
        tall: ``[m, n]``, or the transpose of a wide matrix.
        is_tall: Whether it is not the transpose.
        across: The shape of the whole shorter side, ``p.shape[1:]`` or ``p.shape[:1]``.
        long_cut: This rank's share, where the longer side is cut.
        short_cut: The same of the shorter side.
    """

    tall: Tensor
    is_tall: bool
    across: torch.Size
    long_cut: Share | None
    short_cut: Share | None

    @classmethod
    def of(cls, update: Tensor, p: Tensor) -> _Side:
        matrix, share = update.flatten(1), share_of(p)
        is_tall = p.shape[0] >= p.numel() // p.shape[0]
        cuts = (share, None) if share is not None and (share.dim == 0) == is_tall else (None, share)
        return cls(matrix if is_tall else matrix.mT, is_tall, p.shape[1:] if is_tall else p.shape[:1], *cuts)

    def without(self, images: Tensor, axes: Tensor) -> Tensor:
        """The matrix, less the products of some images with the part of their axes that multiplied it."""
        left, right = (images.mT, axes) if self.is_tall else (axes.mT, images)
        return torch.addmm(self.tall if self.is_tall else self.tall.mT, left, right, alpha=-1.0)

    def part_of(self, axes: Tensor) -> Tensor:
        """What of whole axes multiplies what this rank holds."""
        if self.short_cut is None:
            return axes
        return self._cut(axes).flatten(1)

    def whole(self, part: Tensor) -> Tensor:
        """Axes with zeros for what other ranks hold."""
        if self.short_cut is None:
            return part
        axes = part.new_zeros(len(part), self.across.numel())
        cut = self._cut(axes)
        cut.copy_(part.view_as(cut))
        return axes

    def _cut(self, axes: Tensor) -> Tensor:
        assert self.short_cut is not None
        along = self.short_cut.dim if self.is_tall else 1
        return axes.view(len(axes), *self.across).narrow(along, self.short_cut.start, self.short_cut.size)


def _images(sides: Sequence[_Side], axes: Sequence[Tensor]) -> list[Tensor]:
    """``U v`` of every axis in a row, along what this rank holds of the longer side."""
    images = [side.part_of(each) @ side.tall.mT for side, each in zip(sides, axes, strict=True)]
    return sum_over_shares(images, [side.short_cut for side in sides])


def _backwards(sides: Sequence[_Side], images: Sequence[Tensor]) -> list[Tensor]:
    """``Uᵀ`` of every image, in rows."""
    rows = [side.whole(image @ side.tall) for side, image in zip(sides, images, strict=True)]
    return sum_over_shares(rows, [side.long_cut or side.short_cut for side in sides])


def _orthonormal(tensors: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """An orthonormal basis of the rows of each, of the first i of the first i; those of ``old`` where one is 0."""
    rows = []
    for tensor, before in zip(tensors, old, strict=True):
        lengths = torch.linalg.vector_norm(tensor, dim=1, keepdim=True)
        rows.append(torch.where(lengths > 0, tensor / lengths, before))
    factors: dict[int, Tensor] = {}
    for count in {len(each): None for each in rows}:
        alike = [i for i, each in enumerate(rows) if len(each) == count]
        # Here and below not by products, which TF32 would round to more than the floor.
        grams = torch.stack([(rows[i].unsqueeze(1) * rows[i]).sum(dim=2) for i in alike])
        grams.diagonal(dim1=1, dim2=2).add_(_FLOOR)
        factors |= dict(zip(alike, _inverse_factors(grams).unbind(), strict=True))
    return [(factors[i].unsqueeze(2) * each).sum(dim=1) for i, each in enumerate(rows)]


def _inverse_factors(grams: Tensor) -> Tensor:
    """``L⁻¹`` of ``L Lᵀ``, of each of a stack."""
    if not grams.is_cpu:
        return eliminated(grams)  # a library's factorisation may wait for the GPU, and then no graph takes it in
    eye = torch.eye(grams.shape[1], dtype=grams.dtype).expand_as(grams)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(grams).L, eye, upper=False)


def eliminated(grams: Tensor) -> Tensor:
    """The same by Gaussian elimination of small matrices, in kernels that never wait."""
    count = grams.shape[1]
    rows = torch.cat([grams, torch.eye(count, device=grams.device, dtype=grams.dtype).expand_as(grams)], dim=2)
    for i in range(count - 1):
        pivot = rows[:, i : i + 1]
        rows[:, i + 1 :] -= rows[:, i + 1 :, i : i + 1] * (pivot / pivot[:, :, i : i + 1])
    return rows[:, :, count:] * rows.diagonal(dim1=1, dim2=2).rsqrt().unsqueeze(2)
