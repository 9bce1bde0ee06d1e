"""The models of the command line: sizes, shapes, initial weights, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from backmatch.cli.models import MODELS, build_model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Known sizes for 3x32x32 and 10 classes. VGG: the sums of 9 c_in c_out (+ 2 c_out per normalisation, or + c_out per bias) and the
# last layer's 5130. ResNet-18 and 50 as in the CIFAR forms in common use; ResNet-20 is the paper's 0.27 M with 1x1 shortcuts.
SIZES = {
    "mlp": 3072 * 256 + 256 + 256 * 256 + 256 + 2570,
    "mlp-15": 3072 * 256 + 256 + 13 * (256 * 256 + 256) + 2570,
    "lenet": 456 + 2416 + 16 * 36 * 120 + 120 + 120 * 84 + 84 + 850,
    "vgg13": 9_410_122,
    "vgg13-bn": 9_413_066,
    "vgg16-bn": 14_724_042,
    "resnet18": 11_173_962,
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet50": 23_520_842,
    # patches 3·16·192 + 192, positions 64·192, 6 blocks of 12·192² + 13·192, last norm 2·192, head 192·10 + 10
    "vit": 9_408 + 12_288 + 6 * (12 * 192**2 + 13 * 192) + 384 + 1_930,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_number_of_parameters(name: str, size: int) -> None:
    with torch.device("meta"):
        assert count(build_model(name, in_shape=(3, 32, 32), classes=10)) == size


def test_gpt_mini_is_a_causal_model_of_the_size_it_should_have() -> None:
    torch.manual_seed(0)
    model = build_model("gpt-mini", in_shape=(64,), classes=65)
    assert count(model) == 2 * 65 * 128 + 64 * 128 + 4 * (12 * 128**2 + 13 * 128) + 256
    x = torch.randint(65, (2, 64), generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 65
    before, after = model(x), model(changed)
    assert before.shape == (2, 64, 65)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])
    assert torch.equal(torch.fx.symbolic_trace(model)(x), before)


def test_depth_of_mlp_15() -> None:
    model = build_model("mlp-15", in_shape=(1, 8, 8), classes=10, width=0.1)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 15


@pytest.mark.parametrize("in_shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (2, 13, 16)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_output_shape_and_trace(name: str, in_shape: tuple[int, int, int]) -> None:
    if name == "lenet" and in_shape == (1, 8, 8):
        pytest.skip("8x8 is too small for two 5x5 convolutions")
    if name == "vit" and in_shape == (2, 13, 16):
        pytest.skip("13 rows do not divide into patches of 4")
    model = build_model(name, in_shape=in_shape, classes=7, width=0.05).eval()
    x = torch.randn(3, *in_shape, generator=torch.Generator().manual_seed(0))
    output = model(x)
    assert output.shape == (3, 7)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), output)


@pytest.mark.parametrize("name", MODELS)
def test_width_scales_every_layer(name: str) -> None:
    with torch.device("meta"):
        narrow = build_model(name, in_shape=(3, 32, 32), classes=10, width=0.5)
        plain = build_model(name, in_shape=(3, 32, 32), classes=10)
    for small, large in zip(narrow.parameters(), plain.parameters(), strict=True):
        for d_small, d_large in zip(small.shape[:1], large.shape[:1], strict=True):
            assert d_small == d_large in (10, 64) or d_small == d_large / 2  # 10 classes, the 64 positions of vit


def test_initial_weights() -> None:
    torch.manual_seed(0)
    normed = build_model("vgg13-bn", in_shape=(3, 32, 32), classes=10)
    deepest = [module for module in normed.modules() if isinstance(module, nn.Conv2d)][-1].weight
    assert deepest.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.01)
    plain = build_model("vgg13", in_shape=(3, 32, 32), classes=10)
    deepest = [module for module in plain.modules() if isinstance(module, nn.Conv2d)][-1].weight
    assert deepest.abs().max().item() == pytest.approx(1 / math.sqrt(9 * 512), rel=0.01)  # torch's default: uniform
    mlp = build_model("mlp", in_shape=(3, 32, 32), classes=10)
    hidden = [module for module in mlp.modules() if isinstance(module, nn.Linear)][1]
    assert hidden.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.01)
    assert not hidden.bias.any()


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("vgg12", {}, "Unknown model 'vgg12'. Known: mlp, mlp-15, lenet, vgg11,"),
        ("lenet", {"in_shape": (1, 8, 8)}, "8x8 are too small for 'lenet'"),
        ("vit", {"in_shape": (1, 30, 32)}, "30x32 do not divide into patches of 4x4"),
        ("vit", {"in_shape": (64,)}, "'vit' does not take text. Those that do: gpt-mini"),
        ("gpt-mini", {}, "'gpt-mini' does not take images"),
        ("mlp", {"width": 0.0}, "Invalid width: 0.0"),
        ("mlp", {"width": math.nan}, "Invalid width: nan"),
        ("mlp", {"classes": 0}, "Invalid classes: 0"),
    ],
)
def test_errors(name: str, changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build_model(name, **({"in_shape": (3, 32, 32), "classes": 10} | changes))
