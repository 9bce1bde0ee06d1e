"""Moments, their inverse powers and the match against explicit linear algebra, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from backmatch import kron
from backmatch.kron import blocked, inverse_power, inverse_powers, second_moment, unblocked

float64 = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=float64)


def moment(size: int, blocks: int = 1) -> Tensor:
    """Well-conditioned, as :func:`second_moment` gives it."""
    return second_moment(randn(5 * size, size), blocks) / (5 * size)


def dense(cut: Tensor, size: int) -> Tensor:
    """``[blocks, w, w]`` as the matrix it stands for, or a multiple of the identity."""
    return cut * torch.eye(size, dtype=float64) if cut.ndim == 0 else torch.block_diag(*cut)[:size, :size]


def matched(grad: Tensor, input_power: Tensor, output_power: Tensor, taps: int = 1, multiple: int = 1) -> Tensor:
    """Of one gradient ``[d_out, d_in]``."""
    rows, columns = grad.shape
    stack = grad.view(1, rows, -1, taps).transpose(2, 3)
    cuts = [(1, output_power, rows), (3, input_power, columns // taps)]
    powers = []
    for dim, power, _ in cuts:
        if power.ndim:
            stack, missing = blocked(stack, dim, len(power), multiple), -power.shape[-1] % multiple
            power = torch.nn.functional.pad(power, (0, missing, 0, missing))
        powers.append(power[None])
    found = kron.matched(stack, powers[1], powers[0])
    for dim, power, size in cuts:
        found = unblocked(found, dim, len(power) if power.ndim else 0, size)
    return found.transpose(2, 3).reshape(rows, columns)


def power_of(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.pow(-power)) @ vectors.T


@pytest.mark.parametrize(("size", "blocks"), [(6, 1), (6, 2), (6, 6), (7, 2), (7, 3), (7, 4), (1, 1)])
def test_second_moment_is_the_sum_of_outer_products_within_blocks(size: int, blocks: int) -> None:
    rows = randn(9, size)
    found, width = second_moment(rows, blocks), math.ceil(size / blocks)
    assert found.shape == (blocks, width, width)
    whole, expected = sum(torch.outer(x, x) for x in rows), torch.zeros(blocks, width, width, dtype=float64)
    for i in range(size):
        for j in range(size):
            if i // width == j // width:
                expected[i // width, i % width, j % width] = whole[i, j]
    assert_close(found, expected)


def test_without_blocks_the_second_moment_is_its_mean_eigenvalue() -> None:
    rows = randn(9, 6)
    assert_close(second_moment(rows, 0), torch.linalg.eigvalsh(rows.T @ rows).mean())


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
@pytest.mark.parametrize(("size", "blocks"), [(6, 1), (6, 3), (7, 2), (7, 0)])
def test_inverse_power_is_damped_relative_to_the_mean_eigenvalue(power: float, damping: float, size: int, blocks: int) -> None:
    m = moment(size, blocks)
    whole = dense(m, size)
    found = inverse_power(m, size, power=power, damping=damping, previous=torch.full_like(m, math.nan))
    expected = power_of(whole + damping * whole.trace() / size * torch.eye(size, dtype=float64), power)
    assert found.shape == m.shape
    assert_close(dense(found, size), expected)


@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_a_singular_moment_is_damped(damping: float) -> None:
    rows = randn(3, 8)
    m = second_moment(rows, 1)
    found = inverse_power(m, 8, power=1.0, damping=damping, previous=torch.zeros_like(m))
    expected = torch.linalg.inv(m + damping * m[0].trace() / 8 * torch.eye(8, dtype=float64))
    assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("damping", "accuracy"), [(1e-9, 1e-6), (0.0, 1.0)])
def test_rounding_of_a_singular_moment_is_not_blown_up(damping: float, accuracy: float) -> None:
    """Gradients have no part along what the inputs lack, but for rounding: an error of ε over an eigenvalue of ε, at most about 1."""
    rows, deltas = randn(3, 8), randn(3, 5)
    m = second_moment(rows, 1)
    found = inverse_power(m, 8, power=1.0, damping=damping, previous=torch.zeros_like(m))
    change = matched(deltas.T @ rows, found, torch.ones((), dtype=float64))
    expected = deltas.T @ torch.linalg.pinv(rows.T)
    assert (change - expected).norm() < accuracy * expected.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_moment_that_is_not_finite_or_zero_keeps_the_power_before(bad: float, blocks: int, damping: float) -> None:
    m = moment(6, blocks)
    before = torch.randn_like(m)
    if bad == 0.0 or blocks == 0:
        m = m * bad
    else:
        m[0, 1, 1] = bad
    assert_close(inverse_power(m, 6, power=0.5, damping=damping, previous=before), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("together", [1, 2**24])
def test_roots_by_products_are_those_by_eigenvalues(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """What a GPU does; of different widths, blocks and scales, one singular, one not finite, one of zeros."""
    moments = [
        moment(6),
        1e-12 * moment(6),
        moment(7, 2),
        moment(12, 3),
        second_moment(randn(2, 6), 1),
        moment(6) * math.nan,
        0.0 * moment(4),
    ]
    moments = [m.float() for m in moments] + [torch.tensor(4.0)]
    sizes, before = [6, 6, 7, 12, 6, 6, 4, 5], [torch.randn_like(m) for m in moments]
    settings = {"power": 0.5, "damping": 0.1}
    expected = inverse_powers(moments, sizes, previous=before, **settings)
    assert_close(expected, [inverse_power(m, n, previous=p, **settings) for m, n, p in zip(moments, sizes, before, strict=True)])
    monkeypatch.setattr(kron, "_TOGETHER", together)
    monkeypatch.setattr(kron, "_by_products", lambda moment, *_: moment.ndim > 0)
    for narrow in (False, True):  # of the step, as loops may have it in autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            found = inverse_powers(moments, sizes, previous=before, **settings)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), [(4, 6), (5, 7), (7, 3), (1, 1)])
@pytest.mark.parametrize(("output_blocks", "input_blocks"), [(1, 1), (0, 1), (0, 0), (1, 0), (2, 3)])
def test_the_match_solves_the_kronecker_system(d_out: int, d_in: int, output_blocks: int, input_blocks: int) -> None:
    """``(B ⊗ A) vec X = vec G``, vec row by row."""
    a, b, grad = moment(d_in, min(input_blocks, d_in)), moment(d_out, min(output_blocks, d_out)), randn(d_out, d_in)
    inverses = [inverse_power(m, size, power=1.0, damping=0.0, previous=torch.zeros_like(m)) for m, size in ((a, d_in), (b, d_out))]
    expected = torch.linalg.solve(torch.kron(dense(b, d_out), dense(a, d_in)), grad.flatten())
    for multiple in (1, 4):
        assert_close(matched(grad, *inverses, multiple=multiple), expected.reshape(d_out, d_in))


def test_half_powers_applied_twice_are_the_whole() -> None:
    a, b, grad = moment(6), moment(4), randn(4, 6)
    halves = [inverse_power(m, m.shape[-1], power=0.5, damping=0.1, previous=m) for m in (a, b)]
    wholes = [inverse_power(m, m.shape[-1], power=1.0, damping=0.1, previous=m) for m in (a, b)]
    assert_close(matched(matched(grad, *halves), *halves), matched(grad, *wholes))


def test_a_match_does_not_depend_on_units() -> None:
    """Inputs in other units, a = T a', turn the weight into W T: both matches are then the same change, at power 1."""
    rows, deltas, t = randn(30, 5), randn(30, 3), randn(5, 5)
    changes = []
    for x in (rows, rows @ t.T):
        m = second_moment(x, 1)
        changes.append(matched(deltas.T @ x, inverse_power(m, 5, power=1.0, damping=0.0, previous=m), torch.ones((), dtype=float64)))
    assert_close(changes[1] @ t, changes[0])


def test_the_moment_by_taps_is_the_nearest_kronecker_product_with_the_identity() -> None:
    rows = randn(40, 12)
    (found,) = second_moment(rows, 1, taps=3)
    residual = rows.T @ rows - torch.kron(found, torch.eye(3, dtype=float64))
    for i, j in itertools.product(range(4), repeat=2):
        basis = torch.zeros(4, 4, dtype=float64)
        basis[i, j] = 1.0
        assert_close((residual * torch.kron(basis, torch.eye(3, dtype=float64))).sum(), torch.zeros((), dtype=float64))


def test_matching_by_taps_is_that_by_the_kronecker_product() -> None:
    grad, power, other = (randn(*shape) for shape in ((5, 12), (4, 4), (5, 5)))
    expected = other @ grad @ torch.kron(power, torch.eye(3, dtype=float64))
    assert_close(matched(grad, power[None], other[None], taps=3), expected)
