from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from backmatch import pace
from backmatch.pace import Joined

RESPONSES = [torch.tensor(4.0), torch.tensor([[1.0], [16.0]]), torch.tensor(0.25)]
SIZES = [torch.tensor(0.5), torch.tensor([[2.0], [1.0]]), torch.tensor(3.0)]


def layer_paces(responses: list[Tensor], sizes: list[Tensor] | None, *, power: float, bound: float) -> list[Tensor]:
    return pace.layer_paces(Joined.of(responses), None if sizes is None else Joined.of(sizes), power=power, bound=bound).split()


def layer_sizes(squares: list[Tensor], fan_ins: list[int | None], *, floor: float = 0.5) -> list[Tensor]:
    return pace.layer_sizes(Joined.of(squares), fan_ins, floor=floor).split()


def test_power_zero_in_absolute_coordinates_is_sgd() -> None:
    found = layer_paces(RESPONSES, None, power=0.0, bound=10.0)
    assert all(torch.equal(rate, torch.ones_like(rate)) for rate in found)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_absolute_paces_are_powers_of_the_response(power: float) -> None:
    found = layer_paces(RESPONSES, None, power=power, bound=1e6)
    assert_close(found, [response**-power for response in RESPONSES])


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
def test_relative_paces_do_not_depend_on_the_scale_of_scale_free_weights(power: float) -> None:
    # Scaling a scale-free weight by k divides its gradient by k and its response by k²; the step must scale by k.
    scales = [torch.tensor(3.0), torch.tensor([[0.1], [7.0]]), torch.tensor(1.0)]
    before = layer_paces(RESPONSES, SIZES, power=power, bound=1e9)
    after = layer_paces(
        [response / k**2 for response, k in zip(RESPONSES, scales, strict=True)],
        [size * k for size, k in zip(SIZES, scales, strict=True)],
        power=power,
        bound=1e9,
    )
    assert_close([rate / k for rate, k in zip(after, scales, strict=True)], [rate * k for rate, k in zip(before, scales, strict=True)])


def test_both_coordinates_agree_at_the_papers_power() -> None:
    assert_close(layer_paces(RESPONSES, SIZES, power=1.0, bound=1e6), layer_paces(RESPONSES, None, power=1.0, bound=1e6))


@pytest.mark.parametrize("dead", [0.0, 1e-38, 1e30])
def test_a_dead_layer_is_bounded(dead: float) -> None:
    found = torch.stack(layer_paces([torch.tensor(dead), *(torch.tensor(1.0) for _ in range(3))], None, power=1.0, bound=5.0))
    assert found.isfinite().all()
    assert math.isclose(max(found[0] / found[1], found[1] / found[0]), 5.0, rel_tol=1e-5)


def test_the_median_is_that_of_the_tensors_that_respond() -> None:
    dead = [torch.tensor(0.0), torch.tensor([[0.0], [0.0]]), torch.tensor(0.0, dtype=torch.float64)]
    found = layer_paces([*dead, torch.tensor(4.0), torch.tensor(0.25)], None, power=1.0, bound=5.0)
    assert_close(found[3:], [torch.tensor(0.25), torch.tensor(1.25)])  # m is 0.25, the lower one
    assert_close(found[:3], [torch.full_like(response, 1.25) for response in dead])
    assert_close(layer_paces(dead, None, power=1.0, bound=5.0), [torch.full_like(response, 5.0) for response in dead])


@pytest.mark.parametrize("response", [1e-200, 1e200])
def test_float32_layers_among_float64_ones_beyond_their_range_keep_finite_paces(response: float) -> None:
    wide = [torch.tensor(response, dtype=torch.float64)] * 2
    found = layer_paces([*wide, torch.tensor(0.0), torch.tensor(1.0)], None, power=1.0, bound=100.0)
    assert all(pace.isfinite() and pace > 0 for pace in found)


def test_a_response_that_overflows_in_relative_coordinates_keeps_paces_positive() -> None:
    found = layer_paces([torch.tensor(3e38), torch.tensor([[1e38], [1.0]])], [torch.tensor(10.0), torch.ones(2, 1)], power=0.5, bound=5.0)
    assert all(pace.isfinite().all() and (pace > 0).all() for pace in found)


def test_a_unit_without_response_counts_a_hundredth_of_its_tensor() -> None:
    found = layer_paces([torch.tensor([[0.0], [2.0]]), torch.tensor(1.0)], None, power=1.0, bound=1e6)
    assert_close(found[0], torch.tensor([[100.0], [0.5]]))


def test_sizes_have_a_floor_and_vectors_the_typical_one() -> None:
    squares = [torch.tensor([[4.0], [0.0]]), torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0)]
    found = layer_sizes(squares, [25, None, 16, 100], floor=0.5)
    typical = 1.0  # the median of sqrt((4 + 0.01) / 2), 1 and 0.05
    expected = [torch.tensor([[2.0], [0.1]]), torch.tensor(typical), torch.tensor(1.0), torch.tensor(0.05)]
    assert_close(found, expected)


def test_sizes_without_matrices() -> None:
    assert layer_sizes([torch.tensor(4.0)], [None]) == [torch.tensor(1.0)]


def test_decay_stops_at_a_floor_and_leaves_vectors() -> None:
    squares = [torch.tensor([[4.0], [0.02], [0.0]]), torch.tensor(7.0), torch.tensor(math.inf), torch.tensor(math.inf)]
    found = pace.decay_shares(Joined.of(squares), [0.1, math.inf, math.inf, 0.125]).split()
    expected = [torch.tensor([[1.0 - 0.01 / 4.0], [0.5], [0.0]]), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0)]
    assert_close(found, expected)


def test_averages_are_given_as_they_are_kept() -> None:
    """A response that float64 would hold and its own float32 rounds to 0 counts as none in this step, as it will in the next."""
    averages = [torch.zeros((), dtype=torch.float32), torch.zeros(2, dtype=torch.float64)]
    counts = [torch.zeros(()) for _ in averages]
    measured = Joined.of([torch.tensor(0.0, dtype=torch.float32), torch.zeros(2, dtype=torch.float64)])
    measured = measured.holding(torch.tensor([1e-50, 1e-50, 1.0], dtype=torch.float64))
    new = pace.follow_all(averages, counts, measured, torch.tensor(True), beta=0.9)
    assert averages[0] == 0.0
    assert averages[1][0] == 1e-50
    assert_close(new.values, torch.tensor([0.0, 1e-50, 1.0], dtype=torch.float64), rtol=0, atol=0)
