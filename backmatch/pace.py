"""Responses to paces: one multiplier on the learning rate per parameter tensor, or per output unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_UNIT_FLOOR = 0.01
_RANGE = 87.0
"""float32 holds e^±87: paces stay within, as a median of float64 layers may lie where those of float32 would be 0 or infinite."""


def layer_paces(responses: Sequence[Tensor], sizes: Sequence[Tensor] | None, *, power: float, bound: float) -> list[Tensor]:
    r"""Equation 4's rates at any power, in absolute or relative coordinates, bounded.

    With response ``s = m_W·M`` and size w (root mean square of the entries) of a tensor or output unit:

        raw  = s^(−power)                        absolute; the paper's rate at power 1, SGD at power 0
        raw  = w^(2 − 2·power) · s^(−power)      relative (eq. 4c); the paper's rate at power 1 too
        pace = clip(raw, m/bound, m·bound)       m = median of raw (geometric mean over units) over the
                                                 tensors that respond at all

    Relative coordinates match the *relative* change ω = θ/w, whose gradient is w·g and whose response is w²·s:
    ``Δθ = w·(w²s)^(−power)·w·g``. Weights before a normalisation are scale-free (g ∝ 1/w, s ∝ 1/w²); there the paper's rate
    moves every layer by the same relative amount whatever w is. Absolute coordinates lose that below power 1, relative ones
    keep it (docs/derivation.md, sections 3.5 and 3.7).

    When a layer dies and the responses below it vanish, no pace leaves the bound around the median; and no unit's response w²s
    counts for less than a hundredth of its tensor's, as one that is dead on these samples may live on the next. The median, not
    the mean: a bias before a BatchNorm has hardly a response, and would drag a mean along. And not of those without any: below a head
    that starts at zero nothing has a gradient in the first step, and paces of 1/√0 would be the middle.

    Args:
        responses: One per tensor, 0-dim or one entry per output unit.
        sizes: Positive, each shaped like its response; None for absolute coordinates.
        power: Exponent in [0, 1].
        bound: Largest factor from the median, at least 1.

    Returns:
        One pace per tensor, shaped like its response; exactly 1 in absolute coordinates at power 0. At power 1/2 in relative
        coordinates ``pace·g/w`` has no unit: lr is the relative change per step of a tensor whose gradient is as large as
        that of one sample under an output gradient of size 1.
    """
    if sizes is None:
        sizes = [torch.ones_like(response) for response in responses]
    relative = [size.square() * response for size, response in zip(sizes, responses, strict=True)]
    logs = [
        2.0 * _log(size) - power * _log(response.maximum(_UNIT_FLOOR * response.mean()))
        for size, response in zip(sizes, relative, strict=True)
    ]
    spread = math.log(bound)
    reach = max(0.0, _RANGE - spread)
    centre = live_median([log.mean() for log in logs], responses).nan_to_num(0.0).clamp(-reach, reach)
    return [log.clamp(centre.to(log) - spread, centre.to(log) + spread).exp() for log in logs]


def live_median(values: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """Median of the 0-dim ``values``, one per tensor, over those that respond at all; NaN if none does. On the first one's device."""
    living = [torch.where(response.mean() > 0, value, math.nan) for value, response in zip(values, responses, strict=True)]
    return torch.stack([value.to(values[0]) for value in living]).nanmedian()


def follow(average: Tensor, count: Tensor, measured: Tensor, ok: Tensor, *, beta: float) -> None:
    """A moving average that starts as a plain mean, so that the first measurement does not stand for the rest. In place.

    Args:
        average: What is averaged; any value while ``count`` is 0.
        count: Measurements so far, 0-dim.
        measured: A new one, shaped like ``average``.
        ok: 0-dim, bool; where False nothing changes, as one bad batch must not stay in the average for ever.
        beta: Weight of the old average once there are 1/(1 − beta) measurements.
    """
    weight = (1.0 / (count + 1.0)).clamp_min(1.0 - beta) * ok
    average.lerp_(torch.where(ok, measured, average), weight.to(average.dtype))
    count.add_(ok)


def layer_sizes(squares: Sequence[Tensor], fan_ins: Sequence[int | None], *, floor: float = 0.5) -> list[Tensor]:
    """Root mean squares of tensors or units, with a floor, so that what starts small or at zero can leave it.

    An output unit with n inputs keeps the variance of white inputs if its entries have the size ``1/√n``; it counts as at least
    ``floor`` of that. Weights that start smaller on purpose (at zero in adapters, at 0.02 in transformers) are meant to grow. Vectors
    (biases, weights of normalisations) have no scale-free direction and often start at 0 or 1 whatever the network; all of them take
    the typical size, the median over the matrices.

    Args:
        squares: Mean squares, 0-dim or one entry per output unit.
        fan_ins: Inputs n that drive one output unit of each; None for a vector.
        floor: Smallest size, relative to ``1/√n``.

    Returns:
        One size per tensor, shaped like its mean square; all 1 in a network without matrices.
    """
    own = [
        None if fan_in is None else square.sqrt().clamp_min(floor / math.sqrt(fan_in))
        for square, fan_in in zip(squares, fan_ins, strict=True)
    ]
    matrices = [size.square().mean().sqrt() for size in own if size is not None]
    typical = _median(matrices) if matrices else None
    return [
        size if size is not None else torch.ones_like(square) if typical is None else typical.to(square).expand_as(square)
        for size, square in zip(own, squares, strict=True)
    ]


def _median(values: Sequence[Tensor]) -> Tensor:
    """Of 0-dim tensors, which may lie on several devices; on the first one's."""
    return torch.stack([value.to(values[0]) for value in values]).median()


def _log(value: Tensor) -> Tensor:
    """Finite for 0, and where w²s overflowed."""
    limits = torch.finfo(value.dtype)
    return value.clamp(limits.tiny, limits.max).log()
