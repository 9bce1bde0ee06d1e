"""Every rule against the Jacobian by autodiff, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from backmatch import layers
from tests.cases import IN_PLACE_ACTIVATIONS, LAYER_CASES, LayerCase
from tests.jacobians import batch_gain, sample_curvature

# torch remarks on the copy that an even kernel with padding="same" costs it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_gain_is_mean_square_jacobian(case: LayerCase) -> None:
    module, x = case.build()
    assert_close(layers.gain(module, x), batch_gain(module, x))


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_curvature_is_mean_square_jacobian_of_each_parameter(case: LayerCase) -> None:
    module, x = case.build()
    found = layers.curvature(module, x)
    expected = sample_curvature(module, x) if found else {}
    assert found.keys() == dict(module.named_parameters()).keys()
    assert_close(found, expected)


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_rules_change_nothing(case: LayerCase) -> None:
    module, x = case.build()
    before, x_before, state = copy.deepcopy(module.state_dict()), x.clone(), torch.get_rng_state()
    results = [layers.gain(module, x), *layers.curvature(module, x).values()]
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert_close(x, x_before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(r.ndim == 0 and not r.requires_grad and r.dtype == torch.float64 for r in results)


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rules_accumulate_in_float32(case: LayerCase, dtype: torch.dtype) -> None:
    module, x = case.build()
    module, x = module.to(dtype), x.to(dtype)
    rounded, x_rounded = copy.deepcopy(module).double(), x.double()
    eps = getattr(module, "eps", 0.0)
    if eps is None:  # RMSNorm takes the smallest step of the input's dtype
        pytest.skip("eps depends on dtype")
    for found, expected in [
        (layers.gain(module, x), layers.gain(rounded, x_rounded)),
        *zip(layers.curvature(module, x).values(), layers.curvature(rounded, x_rounded).values(), strict=True),
    ]:
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("make", IN_PLACE_ACTIVATIONS)
def test_in_place_activation_has_the_gain_of_its_copy(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    module, kept = make(), x.clone()
    reference = make()
    reference.inplace = False
    assert_close(layers.gain(module, x), layers.gain(reference, x))
    assert_close(x, kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.3), nn.Dropout1d(0.3), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3), nn.RReLU(0.1, 0.9)], ids=repr
)
def test_gain_of_a_random_layer_is_the_mean_over_draws(module: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 50, 2, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(module(x).sum(), x)  # elementwise: the Jacobian's diagonal
    assert_close(layers.gain(module, x), slopes.square().mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("module", [nn.Dropout(1.0), nn.AlphaDropout(1.0)], ids=repr)
def test_dropping_everything_has_gain_zero(module: nn.Module) -> None:
    assert layers.gain(module, torch.randn(2, 3)) == 0


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_curvature_of_an_embedding_counts_tokens(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(6, 3, padding_idx=padding_idx).double()
    tokens = torch.tensor([[0, 2, 2, 5], [1, 2, 0, 0]])
    # The gradient of each output element is its row of the Jacobian; padding tokens send none, unlike functorch's Jacobian.
    total = torch.zeros((), dtype=torch.float64)
    for element in module(tokens).flatten():
        (grad,) = torch.autograd.grad(element, module.weight, retain_graph=True)
        total += grad.square().sum()
    assert_close(layers.curvature(module, tokens)["weight"].double(), total / (2 * module.weight.numel()))


def test_norms_on_batch_statistics_are_below_the_plain_ratio() -> None:
    """mean(γ²/σ²) forgets the centring and scaling directions: with D elements a group, 2 of D are removed."""
    x = torch.randn(3, 8, dtype=torch.float64)
    module = nn.LayerNorm(8, eps=0.0).double()
    assert_close(layers.gain(module, x), (1 / x.var(1, correction=0)).mean() * (8 - 2) / 8)


def test_unknown_layer_is_named_with_the_remedies() -> None:
    with pytest.raises(NotImplementedError, match=r"Layer 'encoder.rnn' \(LSTM\) has no rule. Use estimator='probe'.*Known: .*Conv2d"):
        layers.gain(nn.LSTM(3, 3), torch.randn(2, 4, 3), name="encoder.rnn")


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Renamed(nn.Linear):
    pass


def test_a_subclass_has_its_kinds_rule_only_with_its_kinds_forward() -> None:
    assert layers.is_known(_Renamed(2, 2))
    assert not layers.is_known(_Doubled(2, 2))


def test_registered_rule_is_used() -> None:
    def gain(module: _Doubled, x: Tensor) -> Tensor:
        return 4 * module.weight.square().sum() / module.in_features

    layers.register(_Doubled, gain=gain)
    try:
        module, x = _Doubled(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
        assert "_Doubled" in layers.known_layers()
        assert_close(layers.gain(module, x), batch_gain(module, x))
        assert layers.curvature(module, x) == {}
    finally:
        del layers._RULES[_Doubled]


@pytest.mark.parametrize(
    ("module", "x", "error", "text"),
    [
        (nn.Linear(3, 2), [1.0, 2.0, 3.0], TypeError, r"Invalid layer input: list. Must be a tensor \[N, ...\]."),
        (nn.Linear(3, 2), torch.zeros(0, 3), ValueError, r"Invalid layer input shape: \[0, 3\]. Must be a batch"),
        (nn.Conv2d(3, 2, 1), torch.zeros(3, 4, 4), ValueError, r"Invalid input shape: \[3, 4, 4\]. Must be \[N, 3, 2 spatial sizes\]"),
        (nn.MaxPool2d(2), torch.zeros(3, 4, 4), ValueError, r"Invalid input shape: \[3, 4, 4\]. Must be \[N, C, 2 spatial sizes\]"),
        (nn.Embedding(3, 2), torch.zeros(2, 4, dtype=torch.long), ValueError, "Embedding reads indices"),
    ],
)
def test_bad_input_is_refused(module: nn.Module, x: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        layers.gain(module, x)  # type: ignore[arg-type]


def test_bad_registrations_and_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="Invalid module_type: 'Linear'. Must be a subclass of torch.nn.Module."):
        layers.register("Linear", gain=lambda module, x: x)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="Use max_norm=None"):
        layers.curvature(nn.Embedding(3, 2, max_norm=1.0), torch.zeros(2, 4, dtype=torch.long))
