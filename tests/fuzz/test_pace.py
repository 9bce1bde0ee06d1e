"""Paces and running averages, for any responses and sizes that floating numbers can hold."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from backmatch.pace import follow, layer_paces

_RESPONSES = st.just(0.0) | st.floats(1e-45, 3e38)
_SIZES = st.floats(1e-6, 1e6)


@given(
    drawn=st.lists(st.lists(st.tuples(_RESPONSES, _SIZES), min_size=1, max_size=4), min_size=1, max_size=5),
    power=st.floats(0.0, 1.0),
    bound=st.floats(1.0, 1e3),
    relative=st.booleans(),
    double=st.booleans(),
)
def test_paces_are_finite_and_within_bound_of_the_median_of_what_responds(
    drawn: list[list[tuple[float, float]]], power: float, bound: float, relative: bool, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    responses, sizes = ([torch.tensor([pair[i] for pair in units], dtype=dtype) for units in drawn] for i in (0, 1))
    paces = layer_paces(responses, sizes if relative else None, power=power, bound=bound)
    free = layer_paces(responses, sizes if relative else None, power=power, bound=1e30)
    living = [pace.double().log().mean() for pace, response in zip(free, responses, strict=True) if response.mean() > 0]
    limit = 87.0 - math.log(bound)  # where float32 ends
    centre = torch.stack(living).median().clamp(-limit, limit) if living else torch.zeros(())
    for pace, response in zip(paces, responses, strict=True):
        assert pace.isfinite().all()
        assert (pace > 0).all()
        assert (pace.shape, pace.dtype) == (response.shape, dtype)
        assert (pace.double().log() - centre).abs().max() <= math.log(bound) + 1e-4 * (1 + abs(float(centre)))


@given(
    measured=st.lists(st.sampled_from([0.0, 1.0, 2.0, 1e30, math.nan, math.inf]), min_size=1, max_size=8),
    beta=st.floats(0.0, 0.99),
)
def test_averages_stay_within_what_was_measured_and_pass_over_what_is_not_finite(measured: list[float], beta: float) -> None:
    average, count = torch.zeros(()), torch.zeros(())
    for value in measured:
        follow(average, count, torch.tensor(value), torch.tensor(math.isfinite(value)), beta=beta)
    kept = [value for value in measured if math.isfinite(value)]
    assert count == len(kept)
    assert min(kept, default=0.0) * (1 - 1e-5) <= float(average) <= max(kept, default=0.0) * (1 + 1e-5)
