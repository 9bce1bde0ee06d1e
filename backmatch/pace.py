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
    tensors = _Tensors(responses)
    response = tensors.joined(responses)
    size = torch.ones_like(response) if sizes is None else tensors.joined(sizes)
    relative = size.square() * response
    # Of w²s that overflow, the mean is infinite.
    floor = tensors.spread((_UNIT_FLOOR * tensors.means(relative)).clamp_max(torch.finfo(relative.dtype).max))
    log = 2.0 * _log(size) - power * _log(relative.maximum(floor))
    width = math.log(bound)
    reach = max(0.0, _RANGE - width)
    centre = _live_median(tensors.means(log), tensors.means(response)).nan_to_num(0.0).clamp(-reach, reach)
    return tensors.split(log.clamp(centre - width, centre + width).exp())


def live_median(values: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """Median of the 0-dim ``values``, one per tensor, over those that respond at all; NaN if none does. On the first one's device."""
    tensors = _Tensors(responses)
    return _live_median(_Tensors(values).joined(values), tensors.means(tensors.joined(responses)))


def follow(average: Tensor, count: Tensor, measured: Tensor, ok: Tensor, *, beta: float) -> None:
    """A moving average that starts as a plain mean, so that the first measurement does not stand for the rest. In place.

    Args:
        average: What is averaged; any value while ``count`` is 0.
        count: Measurements so far, 0-dim.
        measured: A new one, shaped like ``average``.
        ok: 0-dim, bool; where False nothing changes, as one bad batch must not stay in the average for ever.
        beta: Weight of the old average once there are 1/(1 − beta) measurements.
    """
    average.lerp_(torch.where(ok, measured, average), _weight(count, ok, beta).to(average.dtype))
    count.add_(ok)


def follow_all(averages: Sequence[Tensor], counts: Sequence[Tensor], measured: Sequence[Tensor], ok: Tensor, *, beta: float) -> None:
    """:func:`follow` for many small averages at once."""
    tensors = _Tensors(averages)
    average, new = tensors.joined(averages), tensors.joined(measured)
    ok, count = ok.to(average.device), torch.stack([count.to(average.device) for count in counts])
    weight = tensors.spread(_weight(count, ok, beta).to(average.dtype))
    torch._foreach_copy_(list(averages), tensors.split(average.lerp(torch.where(ok, new, average), weight)))
    torch._foreach_copy_(list(counts), list((count + ok).unbind()))


def _weight(count: Tensor, ok: Tensor, beta: float) -> Tensor:
    return (1.0 / (count + 1.0)).clamp_min(1.0 - beta) * ok


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
    tensors = _Tensors(squares)
    lowest = [0.0 if fan_in is None else floor / math.sqrt(fan_in) for fan_in in fan_ins]
    matrices = [i for i, fan_in in enumerate(fan_ins) if fan_in is not None]
    joined = tensors.joined(squares)
    size = joined.sqrt().maximum(tensors.spread(_sent(lowest, joined.device, joined.dtype)))
    typical = tensors.means(size.square())[_sent(matrices, joined.device)].sqrt().median() if matrices else joined.new_ones(())
    is_matrix = _sent([fan_in is not None for fan_in in fan_ins], joined.device)
    return tensors.split(torch.where(tensors.spread(is_matrix), size, typical))


class _Tensors:
    """Small tensors one after the other in a vector: a few kernels do what would take a few for every tensor.

    In the widest of their dtypes, on the device of the first; parts go back to where they came from.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._like = tensors
        self._lengths = [tensor.numel() for tensor in tensors]
        self._device = tensors[0].device
        self._dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        self._counts = _sent(self._lengths, self._device)
        numbers = torch.arange(len(tensors), device=self._device)
        self._owner = numbers.repeat_interleave(self._counts, output_size=sum(self._lengths))

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """One entry for each of theirs, ``tensors`` being shaped like those at the beginning."""
        return torch.cat([tensor.reshape(-1).to(self._device, self._dtype) for tensor in tensors])

    def means(self, joined: Tensor) -> Tensor:
        """Of every tensor's entries."""
        sums = torch.zeros(len(self._lengths), device=self._device, dtype=torch.float64).index_add_(0, self._owner, joined.double())
        return (sums / self._counts).to(joined.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """Every tensor's value at each of its entries."""
        return values[self._owner]

    def split(self, joined: Tensor) -> list[Tensor]:
        """Back to tensors of the shapes, dtypes and devices at the beginning."""
        parts = joined.split(self._lengths)
        return [part.reshape(like.shape).to(like.device, like.dtype) for part, like in zip(parts, self._like, strict=True)]


def _sent(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of them on ``device``; from pinned memory to a GPU, as an ordinary copy would wait for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _live_median(values: Tensor, responses: Tensor) -> Tensor:
    return torch.where(responses > 0, values, math.nan).nanmedian()


def _log(value: Tensor) -> Tensor:
    """Finite for 0, and where w²s overflowed."""
    limits = torch.finfo(value.dtype)
    return value.clamp(limits.tiny, limits.max).log()
