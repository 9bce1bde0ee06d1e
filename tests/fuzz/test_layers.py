"""Every rule against the Jacobian by autodiff, in float64, on layers with random settings and inputs of any layout."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from backmatch import layers
from tests.cases import randomize
from tests.fuzz.layers import activations, convolutions, norms, pools
from tests.jacobians import batch_gain, sample_curvature

_SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@st.composite
def channels_first(draw: st.DrawFn, most: int = 3) -> tuple[int, ...]:
    """Samples ``[C, spatial...]``."""
    return (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 5), min_size=1, max_size=most)))


@st.composite
def layers_with_inputs(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A layer that has a rule, and a batch for it."""
    torch.manual_seed(draw(st.integers(0, 9)))
    kind = draw(st.sampled_from(["linear", "convolution", "transposed", "norm", "activation", "pool"]))
    if kind == "linear":
        shape = tuple(draw(_SIZES))
        module: nn.Module = nn.Linear(shape[-1], draw(st.integers(1, 4)), bias=draw(st.booleans()))
    elif kind in ("convolution", "transposed"):
        shape = draw(channels_first())
        module = draw(convolutions(shape, transposed=kind == "transposed"))
    elif kind == "norm":
        shape = draw(channels_first())
        module = draw(norms(shape))
    elif kind == "activation":
        shape = tuple(draw(_SIZES))
        module = draw(activations(shape[0]))
    else:
        shape = draw(channels_first())
        module = draw(pools(shape))
    # In training RReLU's slopes are drawn, and its rule is the mean over draws, which tests/test_layers.py has.
    module = module.double().train(draw(st.booleans()) and not isinstance(module, nn.RReLU))
    randomize(module)
    x = torch.randn(draw(st.integers(1, 3)), *shape, dtype=torch.float64)
    return module, draw(st.sampled_from([x, x.transpose(0, -1).contiguous().transpose(0, -1), torch.stack([x, x], -1)[..., 0]]))


def _runs(module: nn.Module, x: Tensor) -> bool:
    """Whether torch takes this input, and puts something out."""
    try:
        return module(x).numel() > 0
    except (RuntimeError, ValueError):
        return False


@given(case=layers_with_inputs())
def test_rules_are_the_mean_square_jacobians(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    assume(_runs(module, x))
    # Slopes of x̂ are differences that cancel where a group holds a pair of numbers; powers of pooled ones grow large.
    assert_close(layers.gain(module, x), batch_gain(module, x), rtol=1e-6, atol=1e-9)
    found = layers.curvature(module, x)
    assert_close(found, sample_curvature(module, x) if found else {})
    assert found.keys() == dict(module.named_parameters()).keys()


@given(shape=channels_first(most=2), linear=st.booleans(), samples=st.integers(1, 3), data=st.data())
def test_rows_give_the_gradient_of_the_weight(shape: tuple[int, ...], linear: bool, samples: int, data: st.DataObject) -> None:
    module = (nn.Linear(shape[-1], 3) if linear else data.draw(convolutions(shape))).double()
    assume(layers.takes_rows(module))
    x = torch.randn(samples, *shape, dtype=torch.float64)
    output = module(x)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    rows, errors = layers.input_rows(module, x, 10**6), layers.output_rows(module, grad_output, 10**6)
    assert_close(errors.T @ rows, module.weight.grad.flatten(1))
    limit = data.draw(st.integers(1, 20))
    few, few_errors = layers.input_rows(module, x, limit), layers.output_rows(module, grad_output, limit)
    assert 1 <= len(few) == len(few_errors) <= limit
