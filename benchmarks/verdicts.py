"""What counts as better: Welch intervals, wins, performance profiles and ranks, from the final losses of seeds.

A value of None is a run that failed. Nothing here drops it: a failure is worse than every loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["win", "tie", "loss"]
Losses = Sequence[float | None]

LEVEL = 0.95


def mean_of(values: Losses) -> float | None:
    """None if one is: without the runs that failed, a mean would flatter."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def deviation_of(values: Losses) -> float | None:
    """Sample standard deviation (n − 1); None of fewer than two, or if one failed."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def welch(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    r"""95 % interval of the difference of means, ours less theirs, whatever the two variances.

    ``d ± t·√(v₁/n₁ + v₂/n₂)`` with Welch and Satterthwaite's degrees of freedom. Runs of a seed share data and initial weights, which
    this does not use: most of the spread is what optimizers make of them, and a paired interval of three differences is no narrower.

    Raises:
        ValueError: If a side has fewer than two values.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"Invalid number of values: {len(ours)} and {len(theirs)}. An interval needs two on each side.")
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    squares = [statistics.variance(side) / len(side) for side in (ours, theirs)]  # of the standard errors
    if not any(squares):
        return difference, difference
    freedom = sum(squares) ** 2 / sum(square**2 / (len(side) - 1) for square, side in zip(squares, (ours, theirs), strict=True))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(sum(squares))
    return difference - half, difference + half


def verdict(ours: Losses, theirs: Losses) -> Verdict:
    """Whether ours is lower beyond the spread. Fewer failures win; as many on both sides, if any, are a tie, and so is one seed."""
    failures = [sum(value is None for value in values) for values in (ours, theirs)]
    if failures[0] != failures[1]:
        return "win" if failures[0] < failures[1] else "loss"
    if failures[0] or min(len(ours), len(theirs)) < 2:
        return "tie"
    low, high = welch(*([value for value in values if value is not None] for values in (ours, theirs)))
    return "win" if high < 0 else "loss" if low > 0 else "tie"


def loss_ratios(means: Mapping[str, Mapping[str, float | None]]) -> dict[str, list[float]]:
    """Optimizer → on every task, its final loss over the lowest of all, sorted; infinite where it failed.

    The performance profile (Dolan and Moré 2002) at τ is the share of these that are at most τ.
    """
    ratios: dict[str, list[float]] = {}
    for by_optimizer in means.values():
        best = min((mean for mean in by_optimizer.values() if mean is not None), default=math.nan)
        for name, mean in by_optimizer.items():
            ratios.setdefault(name, []).append(math.inf if mean is None else mean / best)
    return {name: sorted(values) for name, values in ratios.items()}


def mean_ranks(losses: Mapping[str, Mapping[str, Losses]], *, resamples: int = 2000) -> dict[str, tuple[float, float, float]]:
    """Optimizer → its rank (1 is lowest, equals share theirs) averaged over tasks and seeds, and a 95 % bootstrap interval.

    The bootstrap draws tasks, and seeds within each, anew: both are samples of what could have been run.

    Args:
        losses: Task → optimizer → final loss by seed; on every task the same optimizers, and as many seeds for all.
        resamples: Number of draws.
    """
    names = list(next(iter(losses.values())))
    ranks = []
    for by_optimizer in losses.values():
        table = np.array([[math.inf if value is None else value for value in by_optimizer[name]] for name in names])
        ranks.append(stats.rankdata(table, axis=0))  # [optimizers, seeds]
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        chosen = [ranks[index] for index in generator.integers(len(ranks), size=len(ranks))]
        draws.append(np.mean([task[:, generator.integers(task.shape[1], size=task.shape[1])].mean(1) for task in chosen], axis=0))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    middle = np.mean([task.mean(1) for task in ranks], axis=0)
    return {name: (float(middle[i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}
