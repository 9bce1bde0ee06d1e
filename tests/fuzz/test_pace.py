"""Paces and running averages, for any responses and sizes that floating numbers can hold."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backmatch.pace import Joined, follow, layer_paces


@st.composite
def measured(draw: st.DrawFn, responses: st.SearchStrategy[float], sizes: st.SearchStrategy[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Responses, zeros among them, and sizes of some tensors with some units each, in one precision or several."""
    units = draw(st.lists(st.lists(st.tuples(st.just(0.0) | responses, sizes), min_size=1, max_size=4), min_size=1, max_size=5))
    dtypes = [draw(st.sampled_from([torch.float32, torch.float64])) for _ in units]
    found = [[torch.tensor([pair[i] for pair in pairs], dtype=dtype) for pairs, dtype in zip(units, dtypes, strict=True)] for i in (0, 1)]
    return found[0], found[1]


POWERS, BOUNDS = st.floats(0.0, 1.0), st.floats(1.0, 1e3)


@given(drawn=measured(st.floats(1e-45, 3e38), st.floats(1e-6, 1e6)), power=POWERS, bound=BOUNDS, relative=st.booleans())
def test_paces_are_positive_and_finite_whatever_is_measured(
    drawn: tuple[list[Tensor], list[Tensor]], power: float, bound: float, relative: bool
) -> None:
    responses, sizes = drawn
    found = Joined.of(responses)
    paces = layer_paces(found, found.like(sizes) if relative else None, power=power, bound=bound).split()
    for pace, response in zip(paces, responses, strict=True):
        assert (pace.shape, pace.dtype) == (response.shape, response.dtype)
        assert pace.isfinite().all()
        assert (pace > 0).all()
    logs = torch.cat([pace.double() for pace in paces]).log()
    assert logs.max() - logs.min() <= 2 * math.log(bound) + 1e-3


@given(drawn=measured(st.floats(1e-20, 1e20), st.floats(1e-3, 1e3)), power=POWERS, bound=BOUNDS, relative=st.booleans())
def test_paces_are_within_bound_of_the_median_of_what_responds(
    drawn: tuple[list[Tensor], list[Tensor]], power: float, bound: float, relative: bool
) -> None:
    responses, sizes = drawn
    joined = Joined.of(responses)
    found, free = (layer_paces(joined, joined.like(sizes) if relative else None, power=power, bound=b).split() for b in (bound, 1e30))
    living = [pace.double().log().mean() for pace, response in zip(free, responses, strict=True) if response.any()]
    centre = torch.stack(living).median() if living else torch.zeros(())
    for pace, raw in zip(found, free, strict=True):
        expected = raw.double().log().clamp(centre - math.log(bound), centre + math.log(bound))
        torch.testing.assert_close(pace.double().log(), expected, rtol=0, atol=1e-3)


@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 1e30, math.nan, math.inf]), min_size=1, max_size=8), beta=st.floats(0.0, 0.99))
def test_averages_stay_within_what_was_measured_and_pass_over_what_is_not_finite(values: list[float], beta: float) -> None:
    average, count = torch.zeros(()), torch.zeros(())
    for value in values:
        follow(average, count, torch.tensor(value), torch.tensor(math.isfinite(value)), beta=beta)
    kept = [value for value in values if math.isfinite(value)]
    assert count == len(kept)
    assert min(kept, default=0.0) * (1 - 1e-5) <= float(average) <= max(kept, default=0.0) * (1 + 1e-5)
