"""Hypothesis strategies that draw one layer, with any of its settings."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import nn

from tests.cases import ACTIVATION_CASES

_MODES = ("reflect", "replicate", "circular")


@st.composite
def convolutions(draw: st.DrawFn, shape: tuple[int, ...], *, transposed: bool = False) -> nn.Module:
    """Convolutions that fit samples ``[c_in, spatial...]``."""
    channels, *lengths = shape
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    c_out = groups * draw(st.integers(1, 3))
    shared: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    spatial = len(lengths)
    per_dimension = [_window(draw, length, transposed) for length in lengths]
    kernel, stride, padding, dilation = (tuple(values) for values in zip(*per_dimension, strict=True))
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        settings = shared | {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
        return getattr(nn, f"ConvTranspose{spatial}d")(channels, c_out, kernel, **settings)
    mode = draw(st.sampled_from(("zeros", "zeros", *_MODES)))
    if mode != "zeros":
        limits = [length if mode == "circular" else length - 1 if mode == "reflect" else 9 for length in lengths]
        padding = tuple(min(p, limit) for p, limit in zip(padding, limits, strict=True))
        kernel = tuple(min(k, (n + 2 * p - 1) // d + 1) for k, n, p, d in zip(kernel, lengths, padding, dilation, strict=True))
    settings = shared | {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    return getattr(nn, f"Conv{spatial}d")(channels, c_out, kernel, **settings)


def _window(draw: st.DrawFn, length: int, transposed: bool) -> tuple[int, int, int, int]:
    """Kernel, stride, padding and dilation along one dimension, with at least one output."""
    dilation, padding, stride = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 3))
    if transposed:
        kernel = draw(st.integers(1, 3))
        most = ((length - 1) * stride + dilation * (kernel - 1)) // 2
        return kernel, stride, min(padding, most), dilation
    kernel = draw(st.integers(1, min(4, (length + 2 * padding - 1) // dilation + 1)))
    return kernel, stride, padding, dilation


@st.composite
def pools(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    """Pooling layers that fit samples ``[C, spatial...]``."""
    lengths = shape[1:]
    spatial = len(lengths)
    kind = draw(st.sampled_from(["Max", "Avg", "AdaptiveMax", "AdaptiveAvg", "LP"]))
    if kind.startswith("Adaptive"):
        return getattr(nn, f"{kind}Pool{spatial}d")(tuple(draw(st.integers(1, length + 1)) for length in lengths))
    kernel = tuple(draw(st.integers(1, min(3, length))) for length in lengths)
    stride = tuple(draw(st.integers(1, 4)) for _ in lengths)
    ceil = draw(st.booleans())
    if kind == "LP":
        size, step = (kernel[0], stride[0]) if spatial == 1 else (kernel, stride)
        return getattr(nn, f"LPPool{spatial}d")(draw(st.sampled_from([2.0, 4.0])), size, step, ceil_mode=ceil)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    if kind == "Avg":
        settings: dict[str, Any] = {"count_include_pad": draw(st.booleans())}
        if spatial > 1:
            settings["divisor_override"] = draw(st.sampled_from([None, 5]))
        return getattr(nn, f"AvgPool{spatial}d")(kernel, stride, padding, ceil, **settings)
    dilation = tuple(
        draw(st.integers(1, 2 if 2 * (k - 1) + 1 <= n + 2 * p else 1)) for k, n, p in zip(kernel, lengths, padding, strict=True)
    )
    return getattr(nn, f"MaxPool{spatial}d")(kernel, stride, padding, dilation, ceil_mode=ceil)


@st.composite
def norms(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    """Normalisations of samples ``[C, spatial...]``, over the batch, a sample, its channels or its last dimensions."""
    channels, spatial = shape[0], len(shape) - 1
    kind = draw(st.sampled_from(["Batch", "Group", "Layer", "RMS"] + ["Instance"] * (spatial > 0)))
    affine, eps = draw(st.booleans()), draw(st.sampled_from([1e-5, 0.5]))
    if kind in ("Batch", "Instance"):
        tracked = draw(st.booleans())
        return getattr(nn, f"{kind}Norm{max(spatial, 1)}d")(channels, eps=eps, affine=affine, track_running_stats=tracked)
    if kind == "Group":
        groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
        return nn.GroupNorm(groups, channels, eps=eps, affine=affine)
    last = shape[draw(st.integers(0, spatial)) :]
    return getattr(nn, f"{kind}Norm")(last, eps=eps, elementwise_affine=affine)


def activations(channels: int) -> st.SearchStrategy[nn.Module]:
    """Activations that work on a copy, PReLU with one or ``channels`` slopes among them."""
    makes = [case.make for case in ACTIVATION_CASES if "prelu" not in case.name]
    return st.sampled_from([*makes, nn.PReLU, lambda: nn.PReLU(channels)]).map(lambda make: make())
