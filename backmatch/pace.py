"""Responses to paces: one multiplier on the learning rate per parameter tensor, or per output unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def paces(responses: Sequence[Tensor], grad_squares: Sequence[Tensor], *, power: float, bound: float) -> list[Tensor]:
    r"""Equation 4's rates, bounded, and scaled so that the whole step is as long as SGD's.

    With response ``s_b = m_W,b · M_b`` and averaged squared gradient ``G_b = E‖g_b‖²`` of tensor b:

        raw_b  = s_b^(−power)                          the paper's rate at power 1; SGD at power 0
        r_b    = clip(raw_b, m/bound, m·bound)         m = median over the tensors of raw (geometric mean over units)
        pace_b = c·r_b,  c = √(Σ_b G_b / Σ_b r_b² G_b)

    Only the ratios between layers come from the method (docs/derivation.md, section 5); c is free. This choice keeps the
    Euclidean length of the whole gradient, so a learning rate that suits SGD is a good start, and it depends neither on
    the units of the output nor on the number of samples. When a layer dies and the responses below it vanish, no pace
    grows beyond ``bound²`` times another.

    Args:
        responses: One per tensor, 0-dim or one entry per output unit.
        grad_squares: Squared gradients summed over what one entry of the response covers; shaped like it.
        power: Exponent in [0, 1].
        bound: Largest factor from the median, at least 1.

    Returns:
        One pace per tensor, shaped like its response; exactly 1 at power 0.
    """
    if power == 0.0:
        return [torch.ones_like(response) for response in responses]
    logs = [-power * response.clamp_min(torch.finfo(response.dtype).tiny).log() for response in responses]
    # The median: a bias before a BatchNorm has no response at all, and would drag a mean along.
    centre = torch.stack([log.mean() for log in logs]).median()
    spread = math.log(bound)
    rates = [(log - centre).clamp(-spread, spread).exp() for log in logs]
    length = torch.stack([square.sum() for square in grad_squares]).sum()
    paced = torch.stack([(rate.square() * square).sum() for rate, square in zip(rates, grad_squares, strict=True)]).sum()
    factor = torch.where(paced > 0, (length / paced).sqrt(), torch.ones_like(paced))
    return [factor * rate for rate in rates]
