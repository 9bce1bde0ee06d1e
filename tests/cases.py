"""Shared small factories: layers with inputs, and whole networks small enough to differentiate in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCase:
    """A layer and a batch for it, in float64 and seeded; parameters and running statistics are random."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    training: bool = True

    def build(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        module = self.make().double().train(self.training)
        randomize(module)
        return module, torch.randn(self.shape, dtype=torch.float64)

    def __str__(self) -> str:
        return self.name


def randomize(module: nn.Module) -> None:
    """Make every parameter and running statistic of a module different from its initial value, variances positive."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.5)


_SHAPES = {1: (2, 4, 7), 2: (2, 4, 5, 6), 3: (2, 4, 3, 4, 3)}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

LINEAR_CASES = [
    LayerCase("linear", lambda: nn.Linear(5, 3), (4, 5)),
    LayerCase("linear-wide", lambda: nn.Linear(3, 5), (4, 3)),
    LayerCase("linear-no-bias", lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    LayerCase("linear-sequence", lambda: nn.Linear(5, 3), (2, 4, 5)),
    LayerCase("linear-image", lambda: nn.Linear(3, 2), (2, 2, 3, 3)),
]

CONV_CASES = [
    *(LayerCase(f"conv{d}d", lambda d=d: _CONVS[d](4, 6, 3), _SHAPES[d]) for d in _CONVS),
    *(LayerCase(f"conv{d}d-padding", lambda d=d: _CONVS[d](4, 6, 3, padding=1), _SHAPES[d]) for d in _CONVS),
    *(LayerCase(f"conv{d}d-all", lambda d=d: _CONVS[d](4, 6, 2, 2, padding=1, dilation=2, groups=2), _SHAPES[d]) for d in _CONVS),
    *(
        LayerCase(f"conv{d}d-{mode}", lambda d=d, mode=mode: _CONVS[d](4, 2, 3, padding=2, padding_mode=mode), _SHAPES[d])
        for d in _CONVS
        for mode in ("reflect", "replicate", "circular")
    ),
    LayerCase("conv2d-same", lambda: nn.Conv2d(4, 3, (4, 3), padding="same", dilation=(1, 2)), _SHAPES[2]),
    LayerCase("conv2d-valid", lambda: nn.Conv2d(4, 3, 2, padding="valid"), _SHAPES[2]),
    LayerCase("conv2d-same-circular", lambda: nn.Conv2d(4, 3, (4, 3), padding="same", padding_mode="circular"), _SHAPES[2]),
    LayerCase("conv2d-uneven", lambda: nn.Conv2d(4, 3, (2, 3), (3, 1), padding=(0, 1), bias=False), _SHAPES[2]),
    LayerCase("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), _SHAPES[2]),
    LayerCase("conv2d-padding-beyond-kernel", lambda: nn.Conv2d(4, 3, 2, padding=3), _SHAPES[2]),
    *(LayerCase(f"transposed{d}d", lambda d=d: _TRANSPOSED[d](4, 3, 3), _SHAPES[d]) for d in _CONVS),
    *(
        LayerCase(f"transposed{d}d-all", lambda d=d: _TRANSPOSED[d](4, 6, 3, 2, padding=1, output_padding=1, groups=2), _SHAPES[d])
        for d in (1, 2)
    ),
    LayerCase("transposed2d-dilation", lambda: nn.ConvTranspose2d(4, 3, 2, (1, 2), padding=1, output_padding=1, dilation=2), _SHAPES[2]),
]

NORM_CASES = [
    LayerCase("batch-norm-vector", lambda: nn.BatchNorm1d(4), (6, 4)),
    *(LayerCase(f"batch-norm{d}d", lambda d=d: getattr(nn, f"BatchNorm{d}d")(4), _SHAPES[d]) for d in _SHAPES),
    LayerCase("batch-norm-large-eps", lambda: nn.BatchNorm2d(4, eps=0.7), _SHAPES[2]),
    LayerCase("batch-norm-eval", lambda: nn.BatchNorm2d(4), _SHAPES[2], training=False),
    LayerCase("batch-norm-eval-untracked", lambda: nn.BatchNorm2d(4, track_running_stats=False), _SHAPES[2], training=False),
    LayerCase("batch-norm-no-affine", lambda: nn.BatchNorm2d(4, affine=False), _SHAPES[2]),
    *(LayerCase(f"instance-norm{d}d", lambda d=d: getattr(nn, f"InstanceNorm{d}d")(4, affine=True), _SHAPES[d]) for d in _SHAPES),
    LayerCase("instance-norm-plain", lambda: nn.InstanceNorm2d(4), _SHAPES[2]),
    LayerCase("instance-norm-tracked", lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), _SHAPES[2]),
    LayerCase("instance-norm-eval", lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), _SHAPES[2], training=False),
    LayerCase("group-norm", lambda: nn.GroupNorm(2, 4), _SHAPES[2]),
    LayerCase("group-norm-vector", lambda: nn.GroupNorm(2, 6), (3, 6)),
    LayerCase("group-norm-large-eps", lambda: nn.GroupNorm(1, 4, eps=0.7), _SHAPES[1]),
    LayerCase("group-norm-no-affine", lambda: nn.GroupNorm(4, 4, affine=False), _SHAPES[2]),
    LayerCase("layer-norm", lambda: nn.LayerNorm(5), (3, 5)),
    LayerCase("layer-norm-sequence", lambda: nn.LayerNorm(5, eps=0.3), (2, 4, 5)),
    LayerCase("layer-norm-image", lambda: nn.LayerNorm([4, 7]), _SHAPES[1]),
    LayerCase("layer-norm-no-bias", lambda: nn.LayerNorm(5, bias=False), (3, 5)),
    LayerCase("layer-norm-no-affine", lambda: nn.LayerNorm(5, elementwise_affine=False), (3, 5)),
    LayerCase("rms-norm", lambda: nn.RMSNorm(5), (2, 4, 5)),
    LayerCase("rms-norm-large-eps", lambda: nn.RMSNorm([4, 7], eps=0.7), _SHAPES[1]),
    LayerCase("rms-norm-no-affine", lambda: nn.RMSNorm(5, elementwise_affine=False), (3, 5)),
]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": lambda: nn.CELU(0.7),
    "elu": lambda: nn.ELU(0.7),
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.8),
    "leaky-relu": lambda: nn.LeakyReLU(0.2),
    "log-sigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "prelu-channels": lambda: nn.PReLU(4),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(beta=2.0),
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
    "threshold": lambda: nn.Threshold(0.1, 2.0),
}
ACTIVATION_CASES = [
    *(LayerCase(name, make, (3, 4, 5)) for name, make in _ACTIVATIONS.items()),
    LayerCase("rrelu-eval", nn.RReLU, (3, 4, 5), training=False),
    LayerCase("prelu-vector", lambda: nn.PReLU(4), (3, 4)),
]
IN_PLACE_ACTIVATIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.CELU(inplace=True),
    lambda: nn.ELU(inplace=True),
    lambda: nn.Hardsigmoid(inplace=True),
    lambda: nn.Hardswish(inplace=True),
    lambda: nn.Hardtanh(inplace=True),
    lambda: nn.LeakyReLU(inplace=True),
    lambda: nn.Mish(inplace=True),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ReLU6(inplace=True),
    lambda: nn.SELU(inplace=True),
    lambda: nn.SiLU(inplace=True),
    lambda: nn.Threshold(0.1, 2.0, inplace=True),
]

POOLING_CASES = [
    *(LayerCase(f"max-pool{d}d", lambda d=d: getattr(nn, f"MaxPool{d}d")(2), _SHAPES[d]) for d in _SHAPES),
    *(LayerCase(f"max-pool{d}d-overlap", lambda d=d: getattr(nn, f"MaxPool{d}d")(3, 1, padding=1), _SHAPES[d]) for d in _SHAPES),
    LayerCase("max-pool2d-dilation", lambda: nn.MaxPool2d(2, stride=1, dilation=2), _SHAPES[2]),
    LayerCase("max-pool2d-ceil", lambda: nn.MaxPool2d((2, 3), stride=(2, 4), padding=1, ceil_mode=True), _SHAPES[2]),
    *(LayerCase(f"average-pool{d}d", lambda d=d: getattr(nn, f"AvgPool{d}d")(2), _SHAPES[d]) for d in _SHAPES),
    *(
        LayerCase(
            f"average-pool{d}d-overlap-{ceil=}-{inside=}",
            lambda d=d, ceil=ceil, inside=inside: getattr(nn, f"AvgPool{d}d")(
                3, 2, padding=1, ceil_mode=ceil, count_include_pad=not inside
            ),
            _SHAPES[d],
        )
        for d in _SHAPES
        for ceil in (False, True)
        for inside in (False, True)
    ),
    LayerCase("average-pool2d-ceil-window-outside", lambda: nn.AvgPool2d(2, stride=4, padding=1, ceil_mode=True), _SHAPES[2]),
    LayerCase("average-pool2d-divisor", lambda: nn.AvgPool2d((2, 3), 1, padding=1, divisor_override=5), _SHAPES[2]),
    *(LayerCase(f"adaptive-max-pool{d}d", lambda d=d: getattr(nn, f"AdaptiveMaxPool{d}d")(2), _SHAPES[d]) for d in _SHAPES),
    *(LayerCase(f"adaptive-average-pool{d}d", lambda d=d: getattr(nn, f"AdaptiveAvgPool{d}d")(2), _SHAPES[d]) for d in _SHAPES),
    LayerCase("adaptive-average-pool2d-mixed", lambda: nn.AdaptiveAvgPool2d((None, 4)), _SHAPES[2]),
    LayerCase("adaptive-average-pool2d-global", lambda: nn.AdaptiveAvgPool2d(1), _SHAPES[2]),
    LayerCase("adaptive-average-pool2d-larger", lambda: nn.AdaptiveAvgPool2d((7, 3)), _SHAPES[2]),
    *(LayerCase(f"lp-pool{d}d", lambda d=d: getattr(nn, f"LPPool{d}d")(2, 2), _SHAPES[d]) for d in _SHAPES),
    LayerCase("lp-pool2d-overlap", lambda: nn.LPPool2d(4, (2, 3), 1), _SHAPES[2]),
    LayerCase("lp-pool2d-cut-off", lambda: nn.LPPool2d(2, (2, 3), (2, 2), ceil_mode=True), (2, 3, 5, 4)),
    LayerCase("lp-pool1d-cut-off", lambda: nn.LPPool1d(4, 3, ceil_mode=True), (2, 3, 7)),
]

SHAPE_CASES = [
    LayerCase("identity", nn.Identity, (3, 4)),
    LayerCase("flatten", nn.Flatten, (2, 3, 4)),
    LayerCase("unflatten", lambda: nn.Unflatten(1, (2, 3)), (2, 6)),
    LayerCase("pixel-shuffle", lambda: nn.PixelShuffle(2), (2, 4, 2, 3)),
    LayerCase("pixel-unshuffle", lambda: nn.PixelUnshuffle(2), (2, 2, 4, 2)),
    LayerCase("channel-shuffle", lambda: nn.ChannelShuffle(2), _SHAPES[2]),
    LayerCase("dropout-eval", nn.Dropout, (3, 4), training=False),
    LayerCase("alpha-dropout-eval", nn.AlphaDropout, (3, 4), training=False),
    LayerCase("dropout-zero", lambda: nn.Dropout(0.0), (3, 4)),
]

LAYER_CASES = [*LINEAR_CASES, *CONV_CASES, *NORM_CASES, *ACTIVATION_CASES, *POOLING_CASES, *SHAPE_CASES]


class ResidualBlock(nn.Module):
    """Two convolutions and a skip connection, in the manner of a CIFAR ResNet: in-place ReLU and ``+=``."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class TinyResNet(nn.Module):
    """A stem, two residual blocks (one of them downsampling) and a linear head."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(ResidualBlock(width, width), ResidualBlock(width, 2 * width, stride=2))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.stem(x))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(out, 1), 1))


def mlp(sizes: tuple[int, ...] = (12, 20, 16, 5), activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    parts: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        parts += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*parts[:-1])


def vgg(widths: tuple[int, ...] = (8, 8, 16, 16), classes: int = 10) -> nn.Sequential:
    """Convolution, batch norm, in-place ReLU; max-pooling by two after every second; a linear head on 8×8 images."""
    parts: list[nn.Module] = []
    channels = 3
    for i, width in enumerate(widths):
        parts += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if i % 2 == 1:
            parts.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
