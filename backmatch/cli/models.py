"""Models for comparisons by name: small image classifiers in their CIFAR forms, and a language model.

Every module is called once per forward and branches meet in a plain ``+``, so ``torch.fx`` traces all of them.

Initial weights: convolutions of networks with batch normalisation are Kaiming normal (fan-out, ReLU), hidden layers of ``mlp`` and
``lenet`` Kaiming normal (fan-in, ReLU) with bias 0; output layers keep PyTorch's default, as in torchvision's ResNet (Kaiming
normal makes the first logits so large that SGD at its usual rate loses its first epoch). VGG without normalisation and ``mlp-15``
keep PyTorch's default throughout on purpose: gradients fade along their depth, and plain SGD stalls there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from backmatch.checks import check_in
from backmatch.cli.transformer import GPT, ViT

_VGG_STAGES = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_VGG_CHANNELS = (64, 128, 256, 512, 512)


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``; the shortcut is a 1x1 convolution where the shape changes (option B of He et al. 2015)."""

    def __init__(self, body: nn.Sequential, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def build_model(name: str, *, in_shape: tuple[int, ...], classes: int, width: float = 1.0) -> nn.Module:
    """A model by its name, with initial weights from torch's global generator.

    Args:
        name: One of :data:`MODELS`, or of :data:`TEXT_MODELS`.
        in_shape: ``(C, H, W)`` of one image, or ``(S,)``, the length of a window of text.
        classes: Number of outputs: classes, or characters.
        width: Multiplier on the channels (or hidden units) of every layer.

    Raises:
        ValueError: If the name is not known, the model does not take such data, or ``width`` is not above 0 and below a million.
    """
    check_in("width", width, 0.0, 1e6, low_open=True)
    check_in("classes", classes, 1)
    known: Mapping[str, Callable[..., nn.Module]] = TEXT_MODELS if len(in_shape) == 1 else MODELS
    if name not in known:
        if name not in MODELS and name not in TEXT_MODELS:
            raise ValueError(f"Unknown model {name!r}. Known: {', '.join((*MODELS, *TEXT_MODELS))}.")
        raise ValueError(f"Model {name!r} does not take {'text' if len(in_shape) == 1 else 'images'}. Those that do: {', '.join(known)}.")
    return known[name](in_shape, classes, width)


def _channels(count: int, width: float) -> int:
    return max(1, round(count * width))


def _mlp(in_shape: tuple[int, int, int], classes: int, width: float, hidden: int, default_init: bool) -> nn.Module:
    channels, height, columns = in_shape
    sizes = [channels * height * columns, *[_channels(256, width)] * hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))
    return model if default_init else _kaiming(model)


def _lenet(in_shape: tuple[int, int, int], classes: int, width: float) -> nn.Module:
    channels, height, columns = in_shape
    if min(height, columns) < 12:
        raise ValueError(f"Images of {height}x{columns} are too small for 'lenet': it needs 12x12. Try 'mlp' or 'resnet20'.")
    c1, c2, d1, d2 = (_channels(count, width) for count in (6, 16, 120, 84))
    flat = c2 * ((height // 2 - 4) // 2) * ((columns // 2 - 4) // 2)
    return _kaiming(
        nn.Sequential(
            *(nn.Conv2d(channels, c1, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(c1, c2, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(flat, d1), nn.ReLU(), nn.Linear(d1, d2), nn.ReLU(), nn.Linear(d2, classes)),
        )
    )


def _vgg(in_shape: tuple[int, int, int], classes: int, width: float, stages: tuple[int, ...], norm: bool) -> nn.Module:
    """3x3 convolutions; a stage ends in a max-pool while the feature map has two pixels each way, so 8x8 and 28x28 images work."""
    channels, *size = in_shape
    layers: list[nn.Module] = []
    for depth, count in zip(stages, _VGG_CHANNELS, strict=True):
        for _ in range(depth):
            c_out = _channels(count, width)
            layers.append(nn.Conv2d(channels, c_out, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU()] if norm else [nn.ReLU()]
            channels = c_out
        if min(size) >= 2:
            layers.append(nn.MaxPool2d(2))
            size = [side // 2 for side in size]
    if max(size) > 1:
        layers.append(nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))
    return _kaiming(model) if norm else model


def _basic(c_in: int, channels: int, stride: int) -> Residual:
    body = nn.Sequential(
        *(nn.Conv2d(c_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)),
    )
    return Residual(body, c_in, channels, stride)


def _bottleneck(c_in: int, channels: int, stride: int) -> Residual:
    body = nn.Sequential(
        *(nn.Conv2d(c_in, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, 4 * channels, 1, bias=False), nn.BatchNorm2d(4 * channels)),
    )
    return Residual(body, c_in, 4 * channels, stride)


def _resnet(
    in_shape: tuple[int, int, int], classes: int, width: float, depths: tuple[int, ...], base: int, bottleneck: bool = False
) -> nn.Module:
    """A 3x3 stem without pooling; each stage after the first halves the feature map and doubles the channels."""
    block, expansion = (_bottleneck, 4) if bottleneck else (_basic, 1)
    c_in = _channels(base, width)
    layers: list[nn.Module] = [nn.Conv2d(in_shape[0], c_in, 3, padding=1, bias=False), nn.BatchNorm2d(c_in), nn.ReLU()]
    for stage, depth in enumerate(depths):
        channels = _channels(base * 2**stage, width)
        for index in range(depth):
            layers.append(block(c_in, channels, 2 if stage > 0 and index == 0 else 1))
            c_in = expansion * channels
    return _kaiming(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)))


def _vit(in_shape: tuple[int, int, int], classes: int, width: float) -> nn.Module:
    _, height, columns = in_shape
    patch = 4
    if height % patch or columns % patch:
        raise ValueError(f"Images of {height}x{columns} do not divide into patches of {patch}x{patch} for 'vit'. Try 'resnet20'.")
    return ViT(in_shape, classes, patch=patch, depth=6, width=3 * _channels(64, width), heads=3)


def _gpt_mini(in_shape: tuple[int], classes: int, width: float) -> nn.Module:
    return GPT(classes, in_shape[0], depth=4, width=4 * _channels(32, width), heads=4)


def _kaiming(model: nn.Module) -> nn.Module:
    normed = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    *hidden, _output = (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    for module in hidden:
        nn.init.kaiming_normal_(module.weight, mode="fan_out" if normed else "fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


MODELS: dict[str, Callable[[tuple[int, int, int], int, float], nn.Module]] = {
    "mlp": partial(_mlp, hidden=2, default_init=False),
    "mlp-15": partial(_mlp, hidden=14, default_init=True),
    "lenet": _lenet,
    **{name: partial(_vgg, stages=stages, norm=False) for name, stages in _VGG_STAGES.items()},
    **{f"{name}-bn": partial(_vgg, stages=stages, norm=True) for name, stages in _VGG_STAGES.items()},
    "resnet18": partial(_resnet, depths=(2, 2, 2, 2), base=64),
    "resnet20": partial(_resnet, depths=(3, 3, 3), base=16),
    "resnet32": partial(_resnet, depths=(5, 5, 5), base=16),
    "resnet50": partial(_resnet, depths=(3, 4, 6, 3), base=64, bottleneck=True),
    "vit": _vit,
}

TEXT_MODELS: dict[str, Callable[[tuple[int], int, float], nn.Module]] = {"gpt-mini": _gpt_mini}
