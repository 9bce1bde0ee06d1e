"""The step's length and its update, against their formulas on numbers that can be checked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from backmatch.step import bounded_change, paced_sgd, step_length


def test_length_is_that_of_all_tensors_together() -> None:
    params, grads = [torch.tensor([3.0, 4.0]), torch.tensor([[6.0], [0.0]])], [torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [2.0]])]
    size, change = step_length(params, grads, [torch.tensor(2.0), torch.tensor([[1.0], [0.5]])], lr=0.1)
    assert_close(size, torch.tensor(61**0.5))
    assert_close(change, torch.tensor(0.1 * 102**0.5))


@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 3, 1)])
def test_length_with_a_pace_for_units_of_any_dimension(shape: tuple[int, ...]) -> None:
    grad, pace = torch.randn(4, 3, 2, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    _, change = step_length([torch.ones_like(grad)], [grad], [pace], lr=1.0)
    assert_close(change, (grad * pace).norm())


@pytest.mark.parametrize(
    ("size", "change", "factor"),
    [(10.0, 0.05, 1.0), (10.0, 0.2, 0.5), (0.0, 5.0, 1.0), (10.0, 0.0, 1.0), (10.0, math.inf, 0.0)],
)
def test_change_is_bounded(size: float, change: float, factor: float) -> None:
    assert_close(bounded_change(torch.tensor(size), torch.tensor(change), limit=0.01), torch.tensor(factor))


def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (4,), (2, 3, 2)]
    params, grads, buffers = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(3))
    paces = [torch.rand(s, generator=generator, dtype=torch.float64) for s in ((3, 1), (), (2, 1, 1))]
    return params, grads, buffers, paces


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_update_follows_the_equations(lr: float | Tensor, nesterov: bool, maximize: bool, foreach: bool) -> None:
    params, grads, buffers, paces = tensors()
    expected = []
    for p, g, b, r in zip(*tensors(), strict=True):
        paced = r * g * (-1 if maximize else 1)
        b = 0.9 * b + paced
        expected.append((p * (1 - 0.1 * 0.02) - 0.1 * (paced + 0.9 * b if nesterov else b), b))
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.02, "maximize": maximize, "foreach": foreach}
    paced_sgd(params, grads, buffers, paces, finite=torch.tensor(True), lr=lr, **settings)  # type: ignore[arg-type]
    assert_close([params, buffers], [[p for p, _ in expected], [b for _, b in expected]])
    assert_close(grads, tensors()[1])


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_a_pace_beyond_float16_gives_the_product_within_it(shape: tuple[int, ...]) -> None:
    param, grad = torch.ones(3, 2, dtype=torch.float16), torch.full((3, 2), 1e-6, dtype=torch.float16)
    pace, buffer = torch.full(shape, 3e5), torch.zeros(3, 2, dtype=torch.float16)
    settings: dict[str, Any] = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "maximize": False, "foreach": None}
    paced_sgd([param], [grad], [buffer], [pace], finite=torch.tensor(True), lr=0.5, **settings)
    paced = (grad.double() * 3e5).half()
    torch.testing.assert_close(buffer, paced)
    torch.testing.assert_close(param, 1 - paced / 2)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_nothing_changes_where_a_gradient_is_not_finite(nesterov: bool, foreach: bool) -> None:
    params, grads, buffers, paces = tensors()
    grads[1][2] = math.nan
    grads[2][0] = math.inf
    size, change = step_length(params, grads, paces, lr=0.1)
    assert (bool(size.isfinite()), bool(change.isfinite())) == (True, False)
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.02, "maximize": False, "foreach": foreach}
    paced_sgd(params, grads, buffers, paces, finite=change.isfinite(), lr=0.1, **settings)  # type: ignore[arg-type]
    before = tensors()
    assert all(torch.equal(p, q) for p, q in zip(params + buffers, before[0] + before[2], strict=True))
