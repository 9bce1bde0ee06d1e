"""Statistics against closed forms."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

from benchmarks.verdicts import Losses, Verdict, deviation_of, loss_ratios, mean_of, mean_ranks, verdict, welch


def test_welch_with_equal_variances_is_students_interval() -> None:
    # 3 and 3 values of variance 1: 4 degrees of freedom, t = 2.776445, standard error √(2/3).
    assert welch([0.0, 1.0, 2.0], [3.0, 4.0, 5.0]) == pytest.approx(
        (-3 - 2.776445 * math.sqrt(2 / 3), -3 + 2.776445 * math.sqrt(2 / 3)), rel=1e-6
    )


def test_welch_with_one_spread_has_the_degrees_of_freedom_of_that_side() -> None:
    # v₂ = 0: df = n₁ − 1 = 2, t = 4.302653, standard error √(1/3).
    low, high = welch([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    assert (low, high) == pytest.approx((-4.302653 / math.sqrt(3), 4.302653 / math.sqrt(3)), rel=1e-6)


def test_welch_without_spread_is_the_difference() -> None:
    assert welch([1.0, 1.0], [3.0, 3.0]) == (-2.0, -2.0)
    with pytest.raises(ValueError, match="Invalid number of values: 1 and 2"):
        welch([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "win"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "loss"),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "tie"),
        ([1.0, 1.0], [1.0, 1.0], "tie"),
        ([9.0, 9.0, 9.0], [1.0, 1.0, None], "win"),
        ([1.0, None, None], [9.0, None, 9.0], "loss"),
        ([1.0, None], [None, 9.0], "tie"),
        ([1.0], [2.0], "tie"),
    ],
)
def test_verdicts(ours: Losses, theirs: Losses, expected: Verdict) -> None:
    assert verdict(ours, theirs) == expected


def test_a_failure_leaves_no_mean() -> None:
    assert mean_of([1.0, 3.0]) == 2.0
    assert deviation_of([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert mean_of([1.0, None]) is None
    assert deviation_of([1.0, None]) is None
    assert deviation_of([1.0]) is None


def test_ratios_are_to_the_lowest_of_each_task() -> None:
    means = {"a": {"x": 1.0, "y": 2.0, "z": None}, "b": {"x": 6.0, "y": 3.0, "z": 3.0}}
    assert loss_ratios(means) == {"x": [1.0, 2.0], "y": [1.0, 2.0], "z": [1.0, math.inf]}


def test_ranks_share_ties_and_put_failures_last() -> None:
    losses = {"a": {"x": [1.0, 1.0], "y": [2.0, 1.0], "z": [None, None]}}
    ranks = mean_ranks(losses)
    assert [ranks[name][0] for name in "xyz"] == [1.25, 1.75, 3.0]
    assert ranks["z"] == (3.0, 3.0, 3.0)
    low, high = ranks["x"][1:]
    assert (low, high) == (1.0, 1.5)  # both seeds drawn are the first, or both the second, a quarter of the time each


def test_ranks_average_over_tasks() -> None:
    losses: dict[str, dict[str, Losses]] = {"a": {"x": [1.0], "y": [2.0]}, "b": {"x": [2.0], "y": [1.0]}}
    assert mean_ranks(losses) == {"x": (1.5, 1.0, 2.0), "y": (1.5, 1.0, 2.0)}
