"""Steps of matrices apart: their leading singular directions, followed and held to a length, and the rest. Knows nothing of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from backmatch.distributed import Share, share_of, sum_over_shares

AXES = 6
"""Singular directions that are followed of each matrix: in bfloat16 they take 3 floats per entry of its shorter side."""

_FLOOR = 1e-6
"""Of squared lengths of unit vectors: more than what rounding makes of nothing, where one lies among those before it."""

_TRACE = 1e-30
"""Of old axes in the rows that new ones come from: nothing, but to a row of zeros."""

_REST = 4.0
"""How many times the limit of the leading singular values is one for all others."""

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
        c ← min(c, 4·limit / min_i ‖U v_i‖)
        U ← c (U − Σ_i U v_i v_iᵀ) + Σ_i min(1, limit/‖U v_i‖) U v_i v_iᵀ

    A leading singular value σ becomes ``min(σ, limit)`` where v_i is its singular vector. The others, which are then below the last of
    these, get the mean square that they would have if none led, but none comes above four times the limit. There is no other where
    s is k. Of a square matrix right singular vectors are followed, so held steps depend on how it is stored. Of sharded matrices no
    rank needs more than it holds: four sums over ranks at most, of k vectors of each, serve all together.

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
        squares = [image.square().sum(dim=1) for image in images]
        totals = [norm.square() for norm in torch._foreach_norm([side.tall for side in sides])]
        cuts = [side.long_cut for side in sides] + [side.long_cut or side.short_cut for side in sides]
        found = sum_over_shares([*squares, *totals], cuts)
        widths, limits = [side.across.numel() for side in sides], [lead.limit.to(totals[0]) for _, lead in held]
        factors, taken = _lengths(found[: len(held)], found[len(held) :], widths, limits)
        for side, new, image, share in zip(sides, axes, images, taken, strict=True):
            side.subtract(image * share[: len(image)].unsqueeze(1), side.part_of(new))
        torch._foreach_mul_([side.tall for side in sides], factors)
        for (update, lead), side, before, new in zip(held, sides, old, axes, strict=True):
            if update.dtype != dtype or not update.is_contiguous():  # what was worked on is a copy
                update.copy_((side.tall if side.is_tall else side.tall.mT).view_as(update))
            lead.axes.copy_(new if keep is None else torch.where(keep, before, new))


def _lengths(
    leading: list[Tensor], totals: list[Tensor], widths: list[int], limits: list[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """c of every matrix, and what part of each of its leading directions, ``[6]``, is to go before all is multiplied by that.

    Args:
        leading: Squares of every matrix's images, one for each axis.
        totals: Squares of all of it, 0-dim.
        widths: Of its shorter side.
        limits: 0-dim.
    """
    squares = torch.stack([pad(each, (0, AXES - len(each))) if len(each) < AXES else each for each in leading])
    even = torch.stack(torch._foreach_mul(totals, [1.0 - len(each) / width for each, width in zip(leading, widths, strict=True)]))
    # Nothing, or nothing but what leads, is as even as can be.
    rest = torch.where(even > 0, (torch.stack(totals) - squares.sum(dim=1)) / even, 1.0).nan_to_num(1.0)
    bounds = torch.stack(limits)
    last = torch.stack([each.amin() for each in leading]).sqrt()
    factors = rest.clamp(1.0 / _FURTHEST**2, 1.0).rsqrt().fmin(_REST * bounds / last)
    kept = (bounds.unsqueeze(1) / squares.sqrt()).clamp_max(1.0).nan_to_num(1.0)  # 0/0: no limit to nothing
    return factors.unbind(), (1.0 - (kept / factors.unsqueeze(1)).nan_to_num(0.0)).unbind()  # 0/0: a limit of 0 leaves nothing


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

    def subtract(self, images: Tensor, axes: Tensor) -> None:
        """Take products of some images with the part of their axes that multiplied it off the matrix, in place."""
        left, right = (images.mT, axes) if self.is_tall else (axes.mT, images)
        (self.tall if self.is_tall else self.tall.mT).addmm_(left, right, alpha=-1.0)

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
    if not tensors[0].is_cpu:
        return by_elimination(tensors, old)
    # Where a row is 0 the trace of the old one is all of it, and a factorisation knows no scale of rows. (Not by the alpha of
    # torch.add, which torch.compile of 2.13 loses after a product.)
    return [torch.linalg.qr((tensor + _TRACE * before).mT).Q.mT for tensor, before in zip(tensors, old, strict=True)]


def by_elimination(tensors: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """The same in kernels that never wait, as a library's factorisation may, which then no graph takes in: Cholesky QR.

    Twice, as once leaves rows that were nearly parallel neither orthogonal nor of length 1 (Fukaya et al. 2014).
    """
    rows = list(tensors)
    for _ in range(2):
        lengths = [torch.linalg.vector_norm(row, dim=1, keepdim=True) for row in rows]
        rows = [torch.where(length > 0, row / length, before) for length, row, before in zip(lengths, rows, old, strict=True)]
        factors: dict[int, Tensor] = {}
        for count in {len(each): None for each in rows}:
            alike = [i for i, each in enumerate(rows) if len(each) == count]
            # Here and below not by products, which TF32 would round to more than the floor.
            grams = torch.stack([(rows[i].unsqueeze(1) * rows[i]).sum(dim=2) for i in alike])
            grams.diagonal(dim1=1, dim2=2).add_(_FLOOR)
            factors |= dict(zip(alike, eliminated(grams).unbind(), strict=True))
        rows = [(factors[i].unsqueeze(2) * each).sum(dim=1) for i, each in enumerate(rows)]
    return rows


def eliminated(grams: Tensor) -> Tensor:
    """``L⁻¹`` of ``L Lᵀ``, of each of a stack of small matrices, by Gaussian elimination, in kernels that never wait."""
    count = grams.shape[1]
    rows = torch.cat([grams, torch.eye(count, device=grams.device, dtype=grams.dtype).expand_as(grams)], dim=2)
    for i in range(count - 1):
        pivot = rows[:, i : i + 1]
        rows[:, i + 1 :] -= rows[:, i + 1 :, i : i + 1] * (pivot / pivot[:, :, i : i + 1])
    return rows[:, :, count:] * rows.diagonal(dim1=1, dim2=2).rsqrt().unsqueeze(2)
