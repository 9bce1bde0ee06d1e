"""Convolutions and their transposes, exact for every stride, padding, padding mode, dilation and grouping.

Both reach for input positions through a table of *taps*, separable over the spatial dimensions: ``taps[p, k]`` is the
position that tap k of the window p reads, or -1 where it falls on padded zeros. Counting in that table replaces unfolded
patches: the input is read once, whatever the kernel.
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backmatch.layers.moments import constant, every, widened

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Dimension = tuple[int, int, int, int, int, int, int, str]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def gain(module: _Conv, x: Tensor) -> Tensor:
    r"""Mean-square response of the output to one input element, exact including the border.

    ``m_z = Σ_{o,c} Σ_{k,l} W[o,c,k] W[o,c,l] C[k,l] / (c_in · P_in)``, where ``C[k,l]`` counts the windows whose taps k and l
    read the same input element. For zero padding C is diagonal and holds how often a tap meets an input at all, so that
    away from the border this is ``‖W‖_F² P_out / (c_in P_in)`` (docs/derivation.md section 3).

    Args:
        module: The layer, W of shape ``[c_out, c_in / groups, k...]`` (transposed: ``[c_in, c_out / groups, k...]``).
        x: Its input, ``[N, c_in, spatial...]``.

    Returns:
        m_z, 0-dim, outside the graph, in (output unit / input unit)².

    Raises:
        ValueError: If ``x`` has no batch dimension.
    """
    weight = widened(module.weight).flatten(2).flatten(0, 1)
    dimensions = _dimensions(module, x)
    if module.padding_mode == "zeros":
        total = (weight.square().sum(0) * _meetings(dimensions).to(weight)).sum()
    else:
        total = ((weight.T @ weight) * _coincidences(dimensions).to(weight)).sum()
    return total / math.prod(x.shape[1:])


def curvature(module: _Conv, x: Tensor) -> dict[str, Tensor]:
    r"""Mean eigenvalue of each parameter's local Hessian: weight ``P_out · mean(patch²)``, bias ``P_out``, both exact (eq. 3).

    Args:
        module: The layer.
        x: Its input, ``[N, c_in, spatial...]``.

    Returns:
        m_W by parameter name, 0-dim, summed over positions and averaged over samples.

    Raises:
        ValueError: If ``x`` has no batch dimension.
    """
    dimensions = _dimensions(module, x)
    square = widened(x).square().sum(dim=(0, 1))
    total = (square * _readings(dimensions, isinstance(module, _TRANSPOSED)).to(square)).sum()
    found = {"weight": total / (x.shape[0] * x.shape[1] * math.prod(module.kernel_size))}
    if module.bias is not None:
        outputs = (length if isinstance(module, _TRANSPOSED) else windows for length, windows, *_ in dimensions)
        found["bias"] = constant(math.prod(outputs), x)
    return found


def takes_rows(module: _Conv) -> bool:
    """Whether :func:`input_rows` knows this convolution: one or two dimensions, one group, not transposed."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1


def taps(module: nn.Conv1d | nn.Conv2d) -> int:
    """Places of the kernel, or 1 where no two of them ever read the same input, as in patches side by side."""
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    shared = any(dilation * apart % stride == 0 for kernel, stride, dilation in sizes for apart in range(1, kernel))
    return math.prod(module.kernel_size) if shared else 1


def output_shape(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    """``[N, c_out, windows...]``, of a single sample without N."""
    windows = [dimension[1] for dimension in _dimensions(module, _batched(module, x))]
    return (*x.shape[: -1 - len(windows)], module.out_channels, *windows)


def input_rows(module: nn.Conv1d | nn.Conv2d, x: Tensor, limit: int) -> Tensor:
    """Patches, the vectors that W multiplies, of evenly spread samples and positions: ``[n, c_in·k…]``, n at most about ``limit``."""
    x = _batched(module, x)
    dimensions = _dimensions(module, x)
    windows = math.prod([dimension[1] for dimension in dimensions])  # torch.compile knows no generators here
    x = every(x, max(1, limit // windows))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, [side for *_, before, after, _, _ in reversed(dimensions) for side in (before, after)], mode=mode)
    # As views, one copy of all: F.unfold takes every sample for itself on a GPU.
    for i, (kernel, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    spatial = len(module.kernel_size)
    patches = x.movedim(1, 1 + spatial).flatten(1 + spatial).flatten(0, spatial)  # [N, windows…, c_in·k…]
    return every(patches, limit)


def output_rows(module: nn.Conv1d | nn.Conv2d, grad_output: Tensor, limit: int) -> Tensor:
    """δ at each position, ``[n, c_out]``; the same samples and positions as :func:`input_rows`."""
    grad_output = _batched(module, grad_output)
    grad_output = every(grad_output, max(1, limit // math.prod(grad_output.shape[2:])))
    return every(grad_output.flatten(2).transpose(1, 2).flatten(0, 1), limit)


def _batched(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A single sample as a batch of one."""
    return x if x.ndim == module.weight.ndim else x.unsqueeze(0)


def _dimensions(module: _Conv, x: Tensor) -> tuple[_Dimension, ...]:
    """Per spatial dimension: length, windows, kernel, stride, padding before and after, dilation, padding mode.

    A transposed convolution is the transpose of the convolution that reads its output, so ``length`` is that of its output and
    ``windows`` that of its input.
    """
    spatial = len(module.kernel_size)
    if x.ndim != spatial + 2:
        raise ValueError(f"Invalid input shape: {list(x.shape)}. Must be [N, {module.in_channels}, {spatial} spatial sizes].")
    found = []
    for i, size in enumerate(x.shape[2:]):
        kernel, stride, dilation = module.kernel_size[i], module.stride[i], module.dilation[i]
        reach = dilation * (kernel - 1)
        if module.padding == "same":
            before, after = reach // 2, reach - reach // 2
        else:
            before = after = 0 if isinstance(module.padding, str) else module.padding[i]
        if isinstance(module, _TRANSPOSED):
            length, windows = (size - 1) * stride - before - after + reach + module.output_padding[i] + 1, size
        else:
            length, windows = size, (size + before + after - reach - 1) // stride + 1
        found.append((length, windows, kernel, stride, before, after, dilation, module.padding_mode))
    return tuple(found)


def _taps(dimension: _Dimension) -> Tensor:
    length, windows, kernel, stride, before, after, dilation, mode = dimension
    index = torch.arange(length, dtype=torch.float64)[None, None]
    padding = {"mode": "constant", "value": -1.0} if mode == "zeros" else {"mode": mode}
    padded = F.pad(index, (before, after), **padding)[0, 0].long()
    return padded.unfold(0, dilation * (kernel - 1) + 1, stride)[:windows, ::dilation]


@lru_cache(maxsize=1024)
def _meetings(dimensions: tuple[_Dimension, ...]) -> Tensor:
    """How many windows find an input element at a tap, ``[taps]`` over all dimensions flattened: C's diagonal."""
    return reduce(torch.kron, [(_taps(dimension) >= 0).sum(0).double() for dimension in dimensions])


@lru_cache(maxsize=1024)
def _coincidences(dimensions: tuple[_Dimension, ...]) -> Tensor:
    """How many windows read the same element through both taps, ``[taps, taps]`` over all dimensions flattened: C."""
    factors = []
    for dimension in dimensions:
        taps = _taps(dimension)
        same = (taps[:, :, None] == taps[:, None, :]) & (taps >= 0)[:, :, None]
        factors.append(same.sum(0).double())
    return reduce(torch.kron, factors)


@lru_cache(maxsize=1024)
def _readings(dimensions: tuple[_Dimension, ...], transposed: bool) -> Tensor:
    """How many pairs of a window and a tap use each input position, ``[spatial...]``."""
    grid = torch.ones((), dtype=torch.float64)
    for dimension in dimensions:
        taps = _taps(dimension)
        valid = taps >= 0
        count = valid.sum(1) if transposed else torch.bincount(taps[valid], minlength=dimension[0])
        grid = grid[..., None] * count
    return grid
