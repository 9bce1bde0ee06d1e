from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from backmatch.pace import paces

RESPONSES = [torch.tensor(4.0), torch.tensor([[1.0], [16.0]]), torch.tensor(0.25)]
GRAD_SQUARES = [torch.tensor(2.0), torch.tensor([[0.5], [1.0]]), torch.tensor(3.0)]


def test_power_zero_is_sgd_exactly() -> None:
    assert all(torch.equal(pace, torch.ones_like(pace)) for pace in paces(RESPONSES, GRAD_SQUARES, power=0.0, bound=10.0))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_ratios_are_those_of_equation_4(power: float) -> None:
    first, second, third = paces(RESPONSES, GRAD_SQUARES, power=power, bound=1e6)
    assert_close(first / third, torch.tensor((4.0 / 0.25) ** -power))
    assert_close(second.flatten() / third, torch.tensor([4.0**-power, 64.0**-power]))


@pytest.mark.parametrize("bound", [1.0, 1.5, 1e6])
def test_whole_step_is_as_long_as_the_gradient(bound: float) -> None:
    found = paces(RESPONSES, GRAD_SQUARES, power=1.0, bound=bound)
    paced = sum((pace.square() * square).sum() for pace, square in zip(found, GRAD_SQUARES, strict=True))
    assert_close(paced, torch.tensor(6.5))


def test_units_of_the_output_do_not_matter() -> None:
    scaled = paces([1e4 * response for response in RESPONSES], GRAD_SQUARES, power=0.5, bound=10.0)
    assert_close(scaled, paces(RESPONSES, GRAD_SQUARES, power=0.5, bound=10.0))


@pytest.mark.parametrize("dead", [0.0, 1e-38, 1e30])
def test_a_dead_layer_is_bounded(dead: float) -> None:
    responses = [torch.tensor(dead), *(torch.tensor(1.0) for _ in range(3))]
    found = torch.stack(paces(responses, [torch.tensor(1.0)] * 4, power=1.0, bound=5.0))
    assert found.isfinite().all()
    assert math.isclose(max(found[0] / found[1], found[1] / found[0]), 5.0, rel_tol=1e-5)


def test_vanished_gradients_give_finite_paces() -> None:
    found = paces(RESPONSES, [torch.zeros_like(square) for square in GRAD_SQUARES], power=0.5, bound=10.0)
    assert all(pace.isfinite().all() for pace in found)
