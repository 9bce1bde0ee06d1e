"""Orthogonal factors and inverse square roots of many matrices by products alone, which a GPU neither waits for nor takes one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

_QUINTICS = ((8.2165, -23.712, 17.2123), (3.8764, -2.8352, 0.5321), (3.1432, -2.3104, 0.4736), (2.1678, -1.5211, 0.3881))
"""a, b, c of the polynomials ``aσ + bσ³ + cσ⁵`` that one after another come nearest to 1 on 0.005 ≤ σ ≤ 1.

All are of σ/1.01: beyond its interval the first grows steeply, and rounding, that of narrow dtypes above all, leads there.
"""

_CLOSING = ((15 / 8, -10 / 8, 3 / 8), (15 / 8, -10 / 8, 3 / 8))
"""Near 1 each leaves the cube of what was missing: from a tenth to below a float32's rounding."""


def orthogonalised(stacks: Sequence[Tensor]) -> list[Tensor]:
    """The nearest orthogonal matrix to each of some stacks, roughly: singular vectors are kept, singular values come close to 1.

    Newton-Schulz iterations as in Muon (K. Jordan 2024) by the best polynomial of each step (Amsel et al. 2025, arXiv 2505.16932), of
    values over ``‖(X Xᵀ)²‖^¼``. That is above the largest and near it, and comes at no cost; over ``‖X‖``, which many alike make much
    larger, one step more would be needed. Those values come to lie between 0.89 and 1.09 where they began above 0.005; on a GPU, where
    float32 is multiplied in bfloat16 as Muon does, by up to 0.02 further apart.

    Args:
        stacks: Of each X, ``[k, m, n]``, float32 or float64; all of one dtype, on one device.

    Returns:
        ``[k, m, n]`` of each; 0 for 0. Of their dtype, but on a GPU bfloat16 for float32.
    """
    return _in_bfloat16(stacks) if _are_narrowed(stacks) else [_in_own_dtype(stack) for stack in stacks]


def _are_narrowed(stacks: Sequence[Tensor]) -> bool:
    return stacks[0].is_cuda and stacks[0].dtype == torch.float32


def _in_bfloat16(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Side by side: the norms of all stacks, small numbers, take a few kernels together, and as many for every stack otherwise."""
    counts = [len(stack) for stack in stacks]
    # Powers of two leave what is rounded as it is. Kernels that read one dtype and write another take four times as long as others.
    largest = _norms(stacks, math.inf).clamp_min(torch.finfo(stacks[0].dtype).tiny)
    scales = (torch.frexp(largest).mantissa / largest).bfloat16().split(counts)
    found = [stack.bfloat16().mul_(scale) for stack, scale in zip(stacks, scales, strict=True)]
    grams = [_gram(x) for x in found]
    bounds = _norms([gram @ gram for gram in grams], 2).sqrt().clamp_min(torch.finfo(torch.float32).eps)  # as _bound
    factors = zip(bounds.reciprocal().split(counts), bounds.rsqrt().bfloat16().split(counts), strict=True)
    for i, (of_gram, of_x) in enumerate(factors):
        found[i] = _quintic_step(found[i], grams[i].mul_(of_gram), _QUINTICS[0]).mul_(of_x)
        for quintic in _QUINTICS[1:]:
            found[i] = _quintic_step(found[i], _gram(found[i]), quintic)
    return found


def _quintic_step(x: Tensor, gram: Tensor, quintic: tuple[float, float, float]) -> Tensor:
    """``a X + b G X + c G² X``, each sum within one product, so that only what comes of it is rounded."""
    a, b, c = quintic
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(x, *((x, polynomial) if _is_tall(x) else (polynomial, x)), beta=a)


def _norms(stacks: Sequence[Tensor], order: float) -> Tensor:
    """Of every matrix of all stacks, in float32, ``[sum of k, 1, 1]``."""
    return torch.stack(torch._foreach_norm([x for stack in stacks for x in stack.unbind()], order, torch.float32)).view(-1, 1, 1)


def _in_own_dtype(stack: Tensor) -> Tensor:
    x = stack.mT if _is_tall(stack) else stack
    x = _in_full(x / x.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))  # squares of small numbers would be lost
    return x.mT if _is_tall(stack) else x


def _is_tall(x: Tensor) -> bool:
    return x.shape[1] > x.shape[2]


def _gram(x: Tensor) -> Tensor:
    """Of the shorter side."""
    return x.mT @ x if _is_tall(x) else x @ x.mT


def _first_polynomial(gram: Tensor, square: Tensor, bound: Tensor) -> Tensor:
    """Of values over √bound, in what multiplies X rather than in X: few numbers in place of many."""
    a, b, c = (factor * bound.pow(-power) for factor, power in zip(_QUINTICS[0], (0.5, 1.5, 2.5), strict=True))
    return _on_diagonal((b * gram).addcmul_(c, square), a)


def _in_full(x: Tensor) -> Tensor:
    gram = _symmetric_product(x, x)
    square = _symmetric_product(gram, gram)
    polynomial = _first_polynomial(gram, square, _bound(square))
    if 3 * x.shape[1] > 2 * x.shape[2]:
        x = polynomial @ x
        for quintic in _QUINTICS[1:]:
            x = _polynomial(_symmetric_product(x, x), quintic) @ x
        return x
    # X stays a polynomial of the first Gram matrix times the first X, and small products are cheaper than wide ones. All are symmetric,
    # as polynomials of one matrix commute.
    factor = polynomial
    for quintic in _QUINTICS[1:]:
        gram = _symmetric_product(_symmetric_product(polynomial, gram), polynomial)
        polynomial = _polynomial(gram, quintic)
        factor = _symmetric_product(polynomial, factor)
    return factor @ x


def inverse_roots(stack: Tensor) -> Tensor:
    """``M^(−1/2)`` of each of a stack, without waiting for the device: the iteration of :func:`orthogonalised` for two that are coupled.

    ``Y ← Y p(Z Y)``, ``Z ← p(Z Y) Z`` from ``Y = M/‖M²‖^½`` and ``Z = I`` (Higham 2008, Functions of Matrices, section 6.7, with the
    quintics here): Z Y comes to I, and Z to the inverse root. Two steps that converge cubically follow. For float32 the error is about that
    of an eigendecomposition (relative norm 2e-5 at a condition number of 4,000, docs/experiments.md 30).

    Args:
        stack: Each M, ``[k, n, n]``, symmetric and positive definite, of eigenvalues near enough to 1 to be squared. Those below
            ‖M²‖^½ / 40,000 are inverted as if they were larger.
    """
    with _true_products(), torch.autocast(stack.device.type, enabled=False):
        bound = _bound(stack @ stack)
        y = stack / bound
        z = None
        steps = (*_QUINTICS, *_CLOSING)
        for step, (a, b, c) in enumerate(steps):
            product = y if z is None else z @ y
            polynomial = _on_diagonal(torch.baddbmm(product, product, product, beta=b, alpha=c), a)
            z = polynomial if z is None else polynomial @ z
            if step < len(steps) - 1:
                y = y @ polynomial
        assert z is not None
        return (z + z.mT) / (2.0 * bound.sqrt())


def _true_products() -> AbstractContextManager[None]:
    """Products of float32 in float32 on a GPU too: in TF32, where asked for, the iteration loses three digits and can diverge."""
    return _products("ieee")


def coarse_products() -> AbstractContextManager[None]:
    """Products of float32 in TF32 on a GPU that has it: of 11 bits, and many times as fast. Under a compiler nothing changes.

    It is set for the whole process meanwhile, which a compiler cannot follow.
    """
    return nullcontext() if torch.compiler.is_compiling() else _products("tf32")


@contextmanager
def _products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """What came from ``torch.backends.fp32_precision``, either way, is asked for of CUDA's products themselves from then on."""
    settings = torch.backends.cuda.matmul
    name: str = "fp32_precision"
    value: str | bool = precision
    if not hasattr(settings, name):  # torch < 2.9
        name, value = "allow_tf32", precision == "tf32"
    before = getattr(settings, name)
    if before == value or (precision == "ieee" and before == "none"):
        yield
        return
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def _bound(square: Tensor) -> Tensor:
    """Above the largest eigenvalue of each M, and near it, from M²: ``[k, 1, 1]``."""
    return torch.linalg.vector_norm(square, dim=(1, 2), keepdim=True).sqrt().clamp_min(torch.finfo(square.dtype).eps)


def _polynomial(gram: Tensor, quintic: tuple[float, float, float]) -> Tensor:
    """``a I + b G + c G²``."""
    a, b, c = quintic
    return _on_diagonal((b * gram).add_(_symmetric_product(gram, gram), alpha=c), a)


_HALVED = 512
"""A product that is symmetric and has more rows is worth being put together from its lower half."""


def _symmetric_product(x: Tensor, y: Tensor) -> Tensor:
    """``x yᵀ`` of stacks of which it is known that it comes out symmetric."""
    size = x.shape[1]
    if size <= _HALVED:
        return x @ y.mT
    first, second = slice(size // 2), slice(size // 2, size)
    found = x.new_empty(len(x), size, size)
    for part in (first, second):
        found[:, part, part] = _symmetric_product(x[:, part], y[:, part])
    found[:, second, first] = x[:, second] @ y[:, first].mT
    found[:, first, second] = found[:, second, first].mT
    return found


def _on_diagonal(stack: Tensor, value: float | Tensor) -> Tensor:
    stack.diagonal(dim1=1, dim2=2).add_(value.squeeze(-1) if isinstance(value, Tensor) else value)
    return stack
