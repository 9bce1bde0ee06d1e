"""Pooling over spatial windows: counted from the sizes alone, except for LPPool, whose derivative depends on the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backmatch.layers.moments import Layer, constant, widened

_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_MAX = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_ADAPTIVE_AVERAGE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_LP: tuple[tuple[type[nn.Module], Callable[..., Tensor]], ...] = (
    (nn.LPPool1d, F.avg_pool1d),
    (nn.LPPool2d, F.avg_pool2d),
    (nn.LPPool3d, F.avg_pool3d),
)
KINDS = (*_MAX, *_AVERAGE, *_ADAPTIVE_MAX, *_ADAPTIVE_AVERAGE, *(kind for kind, _ in _LP))


def gain(module: Layer, x: Tensor) -> Tensor:
    r"""Mean-square response of the output to one input element, ``tr(JᵀJ) / dim(x)``, exact for overlapping windows too.

    Max: every output follows one input, a row of J holds a single 1, ``m_z = outputs / inputs``. Average: a row holds n entries
    1/divisor, ``m_z = Σ_outputs n / divisor² / inputs``. LP: ``∂z/∂x_j = (Σ x^p)^(1/p − 1) x_j^(p − 1)``.

    Args:
        module: Max, average, adaptive or LP pooling in 1 to 3 dimensions.
        x: Its input, ``[N, C, spatial...]``.

    Returns:
        m_z, 0-dim, outside the graph.

    Raises:
        ValueError: If ``x`` has no batch dimension.
    """
    spatial = int(type(module).__name__[-2])
    if x.ndim != spatial + 2:
        raise ValueError(f"Invalid input shape: {list(x.shape)}. Must be [N, C, {spatial} spatial sizes].")
    for kind, average in _LP:
        if isinstance(module, kind):
            return _lp_gain(module, x, average)
    value = 1.0
    for i, length in enumerate(x.shape[2:]):
        value *= _squares(module, i, length) / length
    divisor = getattr(module, "divisor_override", None)
    if divisor is not None:
        value /= divisor**2
    return constant(value, x)


def _squares(module: Layer, i: int, length: int) -> float:
    """``Σ`` of squared entries of J along spatial dimension i; J is the product over dimensions."""
    if isinstance(module, (*_ADAPTIVE_MAX, *_ADAPTIVE_AVERAGE)):
        outputs = _at(module.output_size, i)
        outputs = length if outputs is None else outputs
        if isinstance(module, _ADAPTIVE_MAX):
            return outputs
        return sum(1 / (-(-(p + 1) * length // outputs) - p * length // outputs) for p in range(outputs))
    kernel, padding = _at(module.kernel_size, i), _at(module.padding, i)
    stride = _at(module.stride, i)
    reach = (_at(module.dilation, i) if isinstance(module, _MAX) else 1) * (kernel - 1)
    room = length + 2 * padding - reach - 1
    outputs = (-(-room // stride) if module.ceil_mode else room // stride) + 1
    if module.ceil_mode and (outputs - 1) * stride >= length + padding:
        outputs -= 1  # a window must begin inside the input or the padding before it
    if isinstance(module, _MAX):
        return outputs
    total = 0.0
    for begin in range(-padding, outputs * stride - padding, stride):
        inputs = min(begin + kernel, length) - max(begin, 0)
        if getattr(module, "divisor_override", None) is not None:
            total += inputs
        elif module.count_include_pad:
            total += inputs / (min(begin + kernel, length + padding) - begin) ** 2
        else:
            total += 1 / inputs
    return total


def _lp_gain(module: Layer, x: Tensor, average: Callable[..., Tensor]) -> Tensor:
    p = float(module.norm_type)
    x = widened(x)

    def window_sum(values: Tensor) -> Tensor:
        kernel = module.kernel_size
        size = math.prod(kernel) if isinstance(kernel, tuple) else kernel ** (x.ndim - 2)
        return average(values, kernel, module.stride, 0, module.ceil_mode) * size

    power = window_sum(x.pow(p))
    slopes = power.pow(2 / p - 2) * window_sum(x.abs().pow(2 * p - 2))
    # A window that ends outside (ceil_mode) has its sum stretched to its whole size, once in each factor of a slope's square.
    for i, length in enumerate(x.shape[2:]):
        kernel = _at(module.kernel_size, i)
        begin = torch.arange(power.shape[2 + i], device=x.device) * (kernel if module.stride is None else _at(module.stride, i))
        stretch = kernel / ((begin + kernel).clamp_max(length) - begin)
        slopes = slopes * stretch.to(slopes.dtype).view(-1, *(1,) * (x.ndim - 3 - i))
    return torch.where(power > 0, slopes, 0.0).sum() / x.numel()


def _at(value: Any, i: int) -> Any:
    """Entry i of a setting that is one number for all dimensions or a tuple."""
    return value[i] if isinstance(value, tuple) else value
