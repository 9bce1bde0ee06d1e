"""Equation 6's factors: second moments of a layer's inputs and output gradients, and what their inverse powers do to a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from backmatch.newton_schulz import inverse_roots

_TOGETHER = 2**24
"""Entries of the matrices whose roots are taken at the same time, with some eight times the memory for a while."""

_CONDITION = 40_000
"""Ratio that :func:`backmatch.newton_schulz.inverse_roots` inverts in full: of a block's eigenvalues, of mean 1, summed up, to the damping.

A block that holds more than its share of a wide layer's mean may go beyond: its smallest eigenvalues count as larger.
"""


def second_moment(rows: Tensor, blocks: int, taps: int = 1) -> Tensor:
    """``Σ x xᵀ`` over the rows x, within blocks of equal width only: ``[n, d]`` to ``[blocks, w, w]``, padded with zeros.

    With 0 blocks the mean of the diagonal, which is the mean eigenvalue, 0-dim. With taps the C of ``[d/taps, d/taps]`` for which ``C ⊗ I``
    is nearest to it: the mean over what is equal in the last, fastest part of the index.
    """
    if blocks == 0:
        return rows.square().sum() / rows.shape[1]
    cut = blocked(by_taps(rows, taps).flatten(0, 1), 1, blocks).unflatten(1, (blocks, -1)).transpose(0, 1)
    return cut.mT @ cut if taps == 1 else cut.mT @ cut / taps


def moment_shape(width: int, blocks: int) -> tuple[int, ...]:
    """Of what :func:`second_moment` returns."""
    return () if blocks == 0 else (blocks, -(-width // blocks), -(-width // blocks))


def mean_eigenvalue(moment: Tensor, size: int) -> Tensor:
    """Of a second moment of this width, 0-dim."""
    return moment if moment.ndim == 0 else moment.diagonal(dim1=-2, dim2=-1).sum() / size


def inverse_powers(
    moments: Sequence[Tensor], sizes: Sequence[int], *, power: float, damping: float, previous: Sequence[Tensor]
) -> list[Tensor]:
    """:func:`inverse_power` of each; on a GPU, where eigenvalues are slow and waited for, square roots of damped ones by products."""
    found = list(previous)
    together: dict[object, list[int]] = {}
    for i, (moment, size) in enumerate(zip(moments, sizes, strict=True)):
        if _by_products(moment, power, damping):
            together.setdefault((moment.shape[-1], moment.device), []).append(i)
        else:
            found[i] = inverse_power(moment, size, power=power, damping=damping, previous=previous[i])
    for chosen in together.values():
        blocks = [len(moments[i]) for i in chosen]
        means = torch.cat([mean_eigenvalue(moments[i], sizes[i]).expand(len(moments[i])) for i in chosen]).view(-1, 1, 1)
        at_once = max(1, _TOGETHER // moments[chosen[0]][0].numel())
        stacks = [torch.cat([moments[i] for i in chosen]), means, torch.cat([previous[i] for i in chosen])]
        parts = zip(*(stack.split(at_once) for stack in stacks), strict=True)
        roots = torch.cat([_damped_roots(part, mean, before, damping) for part, mean, before in parts])
        for i, root in zip(chosen, roots.split(blocks), strict=True):
            found[i] = root
    return found


def is_without_waiting(moment: Tensor, power: float, damping: float) -> bool:
    """Whether :func:`inverse_powers` takes this moment's without the host ever waiting for the device."""
    return moment.ndim == 0 or _by_products(moment, power, damping)


def _by_products(moment: Tensor, power: float, damping: float) -> bool:
    return (
        moment.is_cuda and moment.dtype == torch.float32 and moment.ndim > 0 and power == 0.5 and moment.shape[-1] <= damping * _CONDITION
    )


def _damped_roots(stack: Tensor, means: Tensor, previous: Tensor, damping: float) -> Tensor:
    """``(M + λ m I)^(−1/2)`` of each M with its m, ``[k, 1, 1]``; what it had where that is not finite, decided on the device."""
    relative = stack / means
    relative.diagonal(dim1=1, dim2=2).add_(damping)
    found = inverse_roots(relative) / means.sqrt()
    return torch.where(found.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True), found, previous)


def inverse_power(moment: Tensor, size: int, *, power: float, damping: float, previous: Tensor) -> Tensor:
    r"""``(M + λ·(tr M / d)·I)^(−p)``, symmetric, by eigenvalues.

    An M that is not finite, or all zeros, keeps the power it had, decided on the device. Damping keeps a singular M
    from being inverted. Eigenvalues below what rounding leaves of the largest count as that much, so that no rounding error is blown up.

    Args:
        moment: M, ``[blocks, w, w]``, or 0-dim for a multiple of the identity.
        size: d, without the padding.
        power: p.
        damping: λ, relative to the mean eigenvalue.
        previous: The power so far, of M's shape.
    """
    if moment.ndim == 0:
        found = (moment * (1.0 + damping)).pow(-power)
        return torch.where(moment.isfinite() & found.isfinite(), found, previous)
    mean = mean_eigenvalue(moment, size)
    ok = moment.isfinite().all()
    decomposed = _eigh(torch.where(ok, moment, torch.eye(moment.shape[-1], device=moment.device, dtype=moment.dtype)))
    if decomposed is None:
        return previous
    values, vectors = decomposed
    # Padding has the eigenvalue 0, and meets zeros of the gradient alone.
    floor = torch.finfo(moment.dtype).eps * values[..., -1:]
    scaled = vectors * (values.maximum(floor) + damping * mean).pow(-power).unsqueeze(-2)
    with torch.autocast(moment.device.type, enabled=False):
        found = scaled @ vectors.mT
    return torch.where(ok & found.isfinite().all(), found, previous)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and vectors, in float64 where float32 does not converge, as with many equal eigenvalues; None where that fails too."""
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
        except torch.linalg.LinAlgError:
            continue
    return None


def matched(stack: Tensor, input_powers: Tensor, output_powers: Tensor) -> Tensor:
    """``B^(−p) G A^(−p)`` of each of a stack of gradients: eq. 6 at p = 1.

    Args:
        stack: Each G by rows, taps and channels, ``[k, d_out, t, d_in/t]``, both sides :func:`blocked`. With taps A is ``C ⊗ I``.
        input_powers: Of each A, or C, ``[k, blocks, w, w]``, or ``[k]`` for multiples of the identity.
        output_powers: The same of each B.

    Returns:
        A tensor of the stack's shape.
    """
    k, rows, taps, columns = stack.shape
    if output_powers.ndim == 1:
        stack = stack * output_powers.view(k, 1, 1, 1)
    else:
        stack = torch.bmm(output_powers.flatten(0, 1), stack.reshape(k * output_powers.shape[1], -1, taps * columns))
    if input_powers.ndim == 1:
        return (stack.view(k, -1, 1) * input_powers.view(k, 1, 1)).view(k, rows, taps, columns)
    flat = stack.view(k, rows * taps, columns)
    if input_powers.shape[1] == 1:
        return torch.bmm(flat, input_powers.squeeze(1)).view(k, rows, taps, columns)
    found = torch.empty_like(flat)
    width = input_powers.shape[-1]
    for block, power in enumerate(input_powers.unbind(1)):
        part = slice(block * width, (block + 1) * width)
        found[:, :, part] = torch.bmm(flat[:, :, part], power)
    return found.view(k, rows, taps, columns)


def blocked(x: Tensor, dim: int, blocks: int, multiple: int = 1) -> Tensor:
    """A dimension cut as :func:`second_moment` cuts it, every block padded with zeros to a multiple of so many entries.

    Args:
        x: Any tensor.
        dim: Which dimension, from 0.
        blocks: How many blocks; of 0 blocks there is one.
        multiple: Products of widths that are no multiples of 8 are slow on a GPU.
    """
    blocks, size = max(1, blocks), x.shape[dim]
    width = -(-size // blocks)
    x = _padded(x, dim, blocks * width - size)
    missing = -width % multiple
    return _padded(x.unflatten(dim, (blocks, width)), dim + 1, missing).flatten(dim, dim + 1) if missing else x


def unblocked(x: Tensor, dim: int, blocks: int, size: int) -> Tensor:
    """The inverse of :func:`blocked`, to a dimension of this size."""
    blocks = max(1, blocks)
    width = -(-size // blocks)
    if x.shape[dim] != blocks * width:
        x = x.unflatten(dim, (blocks, -1)).narrow(dim + 1, 0, width).flatten(dim, dim + 1)
    return x.narrow(dim, 0, size)


def _padded(x: Tensor, dim: int, missing: int) -> Tensor:
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x


def by_taps(rows: Tensor, taps: int) -> Tensor:
    """``[n, c·taps]``, or any shape of as many entries behind n, to ``[n, taps, c]``."""
    return rows.reshape(rows.shape[0], -1, taps).transpose(1, 2)
