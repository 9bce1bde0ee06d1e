"""Responses to paces: one multiplier on the learning rate per parameter tensor, or per output unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_UNIT_FLOOR = 0.01
_RANGE = 87.0
"""float32 holds e^±87: paces stay within, as a median of float64 layers may lie where those of float32 would be 0 or infinite."""


class Joined:
    """Small tensors one after the other in a vector: a few kernels do what would take a few for every tensor.

    In the widest of their dtypes, on the device of the first; parts go back to where they came from.

    Attributes:
        values: All their entries.
    """

    def __init__(self, values: Tensor, layout: _Layout) -> None:
        self.values = values
        self._layout = layout

    @property
    def lengths(self) -> list[int]:
        """How many entries each tensor has."""
        return self._layout.lengths

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Joined:
        """These, which there must be one of at least."""
        layout = _Layout(tensors)
        return cls(layout.join(tensors), layout)

    def like(self, tensors: Sequence[Tensor]) -> Joined:
        """Others of the same shapes; what was made for these on the host and sent serves them too."""
        return Joined(self._layout.join(tensors), self._layout)

    def holding(self, values: Tensor) -> Joined:
        """The same tensors with other entries."""
        return Joined(values, self._layout)

    def means(self) -> Tensor:
        """Of every tensor's entries."""
        layout = self._layout
        sums = torch.zeros(len(layout.like), device=layout.device, dtype=torch.float64).index_add_(0, layout.owner, self.values.double())
        return (sums / layout.counts).to(self.values.dtype)

    def scaled(self, factors: Sequence[float]) -> Joined:
        """Every tensor times its own factor."""
        return self.holding(self.values * self.spread(self.constant(factors, self.values.dtype)))

    def spread(self, values: Tensor) -> Tensor:
        """Every tensor's value at each of its entries."""
        return values.index_select(0, self._layout.owner)

    def constant(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """A tensor of numbers, where the entries are; not to be changed."""
        return self._layout.constant(tuple(values), dtype)

    def split(self) -> list[Tensor]:
        """Back to tensors of the shapes, dtypes and devices at the beginning."""
        parts = _unflatten_dense_tensors(self.values, self._layout.like)
        if self.values.dtype == self._layout.kept:
            return list(parts)
        return [part.to(like.device, like.dtype) for part, like in zip(parts, self._layout.like, strict=True)]

    def as_kept(self) -> Joined:
        """With entries as they will be once split."""
        return self if self.values.dtype == self._layout.kept else self.like(self.split())


class _Layout:
    """Where each of some tensors stands in the vector that they are joined in."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.like = tensors
        self.device = tensors[0].device
        self._dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        # In which nothing is rounded, or sent anywhere, on the way back; None if something always is.
        self.kept = tensors[0].dtype if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1 else None
        self._constants: dict[object, Tensor] = {}
        self.lengths = [tensor.numel() for tensor in tensors]
        self.counts = self.constant(tuple(self.lengths), torch.int64)
        numbers = torch.arange(len(tensors), device=self.device)
        self.owner = numbers.repeat_interleave(self.counts, output_size=sum(self.lengths))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return _flatten_dense_tensors([tensor.to(self.device, self._dtype) for tensor in tensors])

    def constant(self, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        if (values, dtype) not in self._constants:
            sent = torch.tensor(values, dtype=dtype, device="cpu")  # whatever torch.set_default_device says
            # From pinned memory to a GPU, as an ordinary copy would wait for it.
            sent = sent.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else sent.to(self.device)
            self._constants[values, dtype] = sent
        return self._constants[values, dtype]


def layer_paces(responses: Joined, sizes: Joined | None, *, power: float, bound: float) -> Joined:
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
        responses: Of every tensor, 0-dim or one entry per output unit.
        sizes: Positive, each shaped like its response; None for absolute coordinates.
        power: Exponent in [0, 1].
        bound: Largest factor from the median, at least 1.

    Returns:
        One pace per tensor, shaped like its response; exactly 1 in absolute coordinates at power 0. At power 1/2 in relative
        coordinates ``pace·g/w`` has no unit: lr is the relative change per step of a tensor whose gradient is as large as
        that of one sample under an output gradient of size 1.
    """
    size = torch.ones_like(responses.values) if sizes is None else sizes.values
    relative = responses.holding(size.square() * responses.values)
    # Of w²s that overflow, the mean is infinite.
    floor = relative.spread((_UNIT_FLOOR * relative.means()).clamp_max(torch.finfo(size.dtype).max))
    log = relative.holding(2.0 * _log(size) - power * _log(relative.values.maximum(floor)))
    width = math.log(bound)
    reach = max(0.0, _RANGE - width)
    centre = live_median(log.means(), responses.means()).nan_to_num(0.0).clamp(-reach, reach)
    return log.holding(log.values.clamp(centre - width, centre + width).exp())


def live_median(values: Tensor, responses: Tensor) -> Tensor:
    """Median of ``values``, one per tensor, over those whose response is not 0; NaN if none is."""
    return torch.where(responses > 0, values, math.nan).nanmedian()


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


def follow_all(averages: Sequence[Tensor], counts: Sequence[Tensor], measured: Joined, ok: Tensor, *, beta: float) -> Joined:
    """:func:`follow` for many small averages at once; gives the new ones as they are kept, each in its own dtype's precision."""
    old = measured.like(averages)
    count = torch.stack([count.to(old.values.device) for count in counts])
    ok = ok.to(old.values.device)
    weight = old.spread(_weight(count, ok, beta).to(old.values.dtype))
    new = old.holding(old.values.lerp(torch.where(ok, measured.values, old.values), weight)).as_kept()
    torch._foreach_copy_(list(averages), new.split())
    torch._foreach_copy_(list(counts), list((count + ok).unbind()))
    return new


def follow_each(
    averages: Sequence[Sequence[Tensor]], counts: Sequence[Tensor], measured: Sequence[Sequence[Tensor]], ok: Tensor, *, beta: float
) -> None:
    """:func:`follow` for averages of any size, those of a row sharing its count and its entry of ``ok``, ``[rows]``."""
    count = torch.stack(list(counts))
    for row, new, taken, weight in zip(averages, measured, ok.unbind(), _weight(count, ok, beta).unbind(), strict=True):
        for average, value in zip(row, new, strict=True):
            average.lerp_(torch.where(taken, value, average), weight.to(average.dtype))
    torch._foreach_copy_(list(counts), list((count + ok).unbind()))


def _weight(count: Tensor, ok: Tensor, beta: float) -> Tensor:
    return (1.0 / (count + 1.0)).clamp_min(1.0 - beta) * ok


def layer_sizes(squares: Joined, fan_ins: Sequence[int | None], *, floor: float = 0.5) -> Joined:
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
    dtype = squares.values.dtype
    lowest = [0.0 if fan_in is None else floor / math.sqrt(fan_in) for fan_in in fan_ins]
    matrices = [i for i, fan_in in enumerate(fan_ins) if fan_in is not None]
    size = squares.values.sqrt().maximum(squares.spread(squares.constant(lowest, dtype)))
    means = squares.holding(size.square()).means()
    typical = means[squares.constant(matrices, torch.int64)].sqrt().median() if matrices else means.new_ones(())
    is_matrix = squares.constant([fan_in is not None for fan_in in fan_ins], torch.bool)
    return squares.holding(torch.where(squares.spread(is_matrix), size, typical))


def decay_shares(squares: Joined, floors: Sequence[float]) -> Joined:
    """``max(0, 1 − f²/w²)``: how much of the weight decay a tensor or output unit of size w takes.

    A step whose length is relative to the weights lets them grow like a random walk, by a constant factor in as many steps, where
    gradients are mostly noise; decay has to hold that (docs/derivation.md, section 3.9). What starts small on purpose it would keep from
    growing to where entries of ``1/√n`` keep the variance, so it ends at f.

    Args:
        squares: Mean squares w², 0-dim or one entry per output unit.
        floors: f of each tensor; 0 where all decays, infinite where nothing does.

    Returns:
        One share per tensor, from 0 to 1, shaped like its mean square.
    """
    lowest = squares.constant([floor * floor for floor in floors], squares.values.dtype)
    shares = 1.0 - squares.spread(lowest) / squares.values
    return squares.holding(shares.nan_to_num(0.0).clamp_min(0.0))  # squares may be 0, or infinite


def _log(value: Tensor) -> Tensor:
    """Finite for 0, and where w²s overflowed."""
    limits = torch.finfo(value.dtype)
    return value.clamp(limits.tiny, limits.max).log()
