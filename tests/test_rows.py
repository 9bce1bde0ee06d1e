"""The rows that a layer's matrix multiplies, against the gradient by autograd, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from backmatch import layers
from tests.cases import CONV_CASES, LINEAR_CASES, LayerCase

# torch remarks on the copy that an even kernel with padding="same" costs it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

ALL = 10**6

MODES = [
    LayerCase(
        f"conv{d}d-{mode}-{padding}",
        lambda d=d, kind=kind, mode=mode, padding=padding: kind(3, 5, **settings(padding), padding_mode=mode),
        shape,
    )
    for d, kind, shape in ((1, nn.Conv1d, (4, 3, 9)), (2, nn.Conv2d, (4, 3, 8, 9)))
    for mode in ("zeros", "reflect", "replicate", "circular")
    for padding in ("same", "valid", 2)
]


def settings(padding: Any) -> dict[str, Any]:
    return {"kernel_size": 4, "dilation": 2, "padding": padding, "stride": 1 if padding == "same" else 3}


CASES = [case for case in (*LINEAR_CASES, *CONV_CASES, *MODES) if layers.takes_rows(case.make())]
"""With positions beyond the samples, strides, dilations, every padding and mode of it."""


def pair(module: nn.Module, x: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in, rows out and the weight's gradient ``[d_out, d_in]``, of a random gradient of the output."""
    output = module(x)
    grad = torch.randn(output.shape, dtype=x.dtype)
    (expected,) = torch.autograd.grad(output, module.weight, grad)
    return layers.input_rows(module, x, limit), layers.output_rows(module, grad, limit), expected.flatten(1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_multiply_to_the_gradient_of_the_weight(case: LayerCase) -> None:
    module, x = case.build()
    rows, grads, expected = pair(module, x, ALL)
    assert_close(grads.T @ rows, expected)
    assert grads.shape[1] == len(module.weight)
    assert len(rows) == len(grads) == module(x).numel() // len(module.weight)
    assert not rows.requires_grad


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_limit_leaves_the_same_rows_on_both_sides(case: LayerCase, limit: int) -> None:
    """The output of a layer without bias is a known matrix times its rows in: so are the rows out, if they are of the same positions."""
    module, x = case.build()
    module.bias = None
    rows, outputs = layers.input_rows(module, x, limit), layers.output_rows(module, module(x), limit)
    assert_close(outputs, (rows @ module.weight.flatten(1).T).detach())
    positions = module(x).numel() // len(module.weight)
    # Samples are left out before positions of those that stay are; a position is the least there can be.
    assert min(limit, positions) / 4 <= len(rows) <= limit


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Linear(5, 3), (5,)), (nn.Conv1d(2, 3, 2), (2, 6)), (nn.Conv2d(2, 3, 2, 2), (2, 5, 6))], ids=str
)
def test_a_single_sample_needs_no_batch(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = module.double(), torch.randn(shape, dtype=torch.float64)
    rows, grads, expected = pair(module, x, ALL)
    assert_close(grads.T @ rows, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_float32_at_least(dtype: torch.dtype) -> None:
    for module, x in ((nn.Linear(5, 3), torch.randn(4, 5)), (nn.Conv2d(2, 3, 2), torch.randn(2, 2, 4, 4))):
        rows, grads = layers.input_rows(module, x.to(dtype), ALL), layers.output_rows(module, module(x).to(dtype), ALL)
        assert rows.dtype == grads.dtype == torch.float32


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class _Renamed(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("module", "taken"),
    [
        *((module, True) for module in (nn.Linear(2, 2), _Renamed(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1))),
        *((module, False) for module in (nn.Conv1d(2, 2, 1, groups=2), nn.Conv2d(2, 2, 1, groups=2), nn.Conv3d(2, 2, 1))),
        *((kind(2, 2, 1), False) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
        *((module, False) for module in (_Doubled(2, 2), _OwnConv(2, 2, 1), nn.Bilinear(2, 2, 2), nn.Embedding(2, 2), nn.LSTM(2, 2))),
        *((module, False) for module in (nn.LayerNorm(2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))),
        (nn.MultiheadAttention(2, 1).out_proj, False),
    ],
    ids=str,
)
def test_layers_whose_rows_are_known(module: nn.Module, taken: bool) -> None:
    assert layers.takes_rows(module) == taken


@pytest.mark.parametrize(
    ("module", "taps"),
    [
        (nn.Linear(4, 3), 1),
        (nn.Conv2d(4, 3, 1), 1),
        (nn.Conv2d(4, 3, 2, 2), 1),
        (nn.Conv2d(4, 3, 2, 3), 1),
        (nn.Conv2d(4, 3, 3, padding=1), 9),
        (nn.Conv2d(4, 3, (1, 3), (1, 2)), 3),
        (nn.Conv1d(4, 3, 4, 2), 4),
        (nn.Conv1d(4, 3, 2, 2, dilation=2), 2),
        (nn.Conv1d(4, 3, 2, 3, dilation=2), 1),
    ],
    ids=str,
)
def test_taps_are_counted_where_windows_overlap(module: nn.Module, taps: int) -> None:
    assert layers.taps(module) == taps
