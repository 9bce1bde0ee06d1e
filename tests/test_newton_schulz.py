"""Orthogonal factors and inverse roots against decompositions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from backmatch import newton_schulz
from backmatch.newton_schulz import coarse_products, inverse_roots, orthogonalised

float64 = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=float64)


def levelled(matrix: Tensor) -> Tensor:
    return orthogonalised([matrix[None]])[0][0]


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1)])
def test_orthogonalised_keeps_singular_vectors_and_makes_their_values_alike(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (values > 0.005 * values.pow(8).sum().pow(1 / 8)).all()
    rest = u.T @ levelled(matrix) @ vh.T
    assert_close(rest, torch.diag(rest.diagonal()), rtol=0.0, atol=1e-9)
    assert ((rest.diagonal() > 0.89) & (rest.diagonal() < 1.09)).all()
    assert_close(u @ rest @ vh, levelled(matrix))


def test_orthogonalised_brings_all_values_of_the_stated_range_into_the_interval() -> None:
    values = torch.logspace(math.log10(0.0051), 0.0, 200, dtype=float64)
    for value in values:
        found = levelled(torch.diag(torch.stack([value, torch.ones((), dtype=float64)]))).diagonal()
        assert ((found > 0.89) & (found < 1.09)).all()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalised_zero_is_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    found = levelled(torch.zeros(shape, dtype=dtype))
    assert_close(found, torch.zeros(shape, dtype=dtype), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("shape", [(4, 4), (4, 5), (4, 6), (4, 40), (40, 4), (1, 9), (9, 1), (530, 600), (1100, 521)], ids=str)
def test_levelling_is_the_same_polynomials_of_the_singular_values_by_either_way(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / sigma.pow(8).sum().pow(1 / 8)
    for a, b, c in ((8.2165, -23.712, 17.2123), (3.8764, -2.8352, 0.5321), (3.1432, -2.3104, 0.4736), (2.1678, -1.5211, 0.3881)):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert_close(levelled(matrix), u @ torch.diag(sigma) @ vh, rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(levelled(matrix))
    assert values.min() > 0.89
    assert values.max() < 1.09
    assert_close(levelled(torch.zeros(shape)), torch.zeros(shape))


class Coarse(TorchDispatchMode):
    """Every product of matrices with a relative error, as TF32 has them."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * (1.0 + self.error) if func is torch.ops.aten.bmm.default else found


@pytest.mark.parametrize("error", [-1e-3, -5e-4, 5e-4, 1e-3])
@pytest.mark.parametrize("shape", [(1, 64), (12, 16), (12, 40)], ids=str)
def test_levelling_withstands_coarse_products(shape: tuple[int, int], error: float) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(shape[0], 1), torch.randn(1, shape[1])
    for matrix in (left @ right, left @ right + 1e-4 * torch.randn(shape)):
        with Coarse(error):
            found = levelled(matrix)
        assert torch.linalg.svdvals(found).max() < 1.1


@pytest.mark.parametrize("shape", [(64, 64), (30, 200), (200, 30), (1, 9), (530, 600)], ids=str)
def test_in_bfloat16_levelling_is_hardly_coarser(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    """What a GPU does with float32."""
    u, sigma, vh = torch.linalg.svd(randn(*shape), full_matrices=False)
    sigma = torch.logspace(0, -2, len(sigma), dtype=float64)
    matrix, polar = (u * sigma @ vh).float(), u @ vh
    monkeypatch.setattr(newton_schulz, "_are_narrowed", lambda stacks: True)
    found = levelled(matrix)
    assert found.dtype == torch.bfloat16
    found = found.double()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.88
    assert values.max() < 1.1
    assert (found * polar).sum() > 0.997 * found.norm() * polar.norm()
    assert_close(levelled(torch.zeros(shape)), torch.zeros(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("narrowed", [False, True])
def test_stacks_side_by_side_are_what_each_is_alone(monkeypatch: pytest.MonkeyPatch, narrowed: bool) -> None:
    monkeypatch.setattr(newton_schulz, "_are_narrowed", lambda stacks: narrowed)
    stacks = [torch.randn(3, 8, 20), 1e-12 * torch.randn(1, 20, 8), torch.zeros(2, 4, 4), 1e12 * torch.randn(2, 1, 5)]
    for found, stack in zip(orthogonalised(stacks), stacks, strict=True):
        for alone, matrix in zip(found, stack, strict=True):
            assert_close(alone, levelled(matrix), rtol=1e-5 if not narrowed else 2e-2, atol=1e-6 if not narrowed else 4e-3)


def definite(size: int, condition: float) -> Tensor:
    """Of mean eigenvalue 1, half of the eigenvalues small."""
    q, _ = torch.linalg.qr(randn(size, size))
    values = torch.cat([torch.logspace(0, -1, size - size // 2, dtype=float64), torch.full((size // 2,), 1 / condition, dtype=float64)])
    return q * (values / values.mean()) @ q.T


@pytest.mark.parametrize("dtype", [torch.float32, float64], ids=str)
@pytest.mark.parametrize("condition", [1.0, 100.0, 4_000.0, 10_000.0])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_inverse_roots_are_those_of_the_eigenvalues(size: int, condition: float, dtype: torch.dtype) -> None:
    # Of float32 the entries' own rounding shifts the smallest eigenvalue by as much.
    tolerance = max(2e-6, 2e-8 * condition) if dtype == torch.float32 else 1e-7
    matrices = [definite(size, condition), torch.eye(size, dtype=float64), 3.0 * definite(size, 10.0)]
    found = inverse_roots(torch.stack(matrices).to(dtype))
    assert found.dtype == dtype
    for matrix, root in zip(matrices, found, strict=True):
        values, vectors = torch.linalg.eigh(matrix)
        expected = vectors * values.rsqrt() @ vectors.T
        assert (root - expected).norm() < tolerance * expected.norm()
        assert_close(root, root.T, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_products_leave_the_precision_that_was_asked_for(asked: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        inverse_roots(torch.eye(3)[None])
        assert torch.get_float32_matmul_precision() == asked
        with coarse_products():
            pass
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
