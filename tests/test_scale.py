"""The product of the rules along the graph against exact end-to-end Jacobians, and its distance from them on real nets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from backmatch import layers
from backmatch.outputs import predictions
from backmatch.scale import LayerScale, layer_scales, responses
from tests.cases import TinyResNet, mlp, vgg


def true_responses(model: nn.Module, x: Tensor, draws: int = 0) -> dict[str, Tensor]:
    """Equation 5 by autograd: (1/N) Σ over all output elements (draws = 0) or E over v ~ N(0, I) of ‖∂(vᵀz)/∂θ‖² / dim(θ)."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    z = model(x)
    count = draws or z.numel()
    directions = torch.randn(count, *z.shape, dtype=z.dtype) if draws else torch.eye(count, dtype=z.dtype).reshape(count, *z.shape)
    found = {name: torch.zeros((), dtype=z.dtype) for name in named}
    for v in directions:
        for name, grad in zip(named, torch.autograd.grad(z, list(named.values()), v, retain_graph=True), strict=True):
            found[name] += grad.square().sum() / (predictions([z]) * grad.numel() * (draws or 1))
    return found


def _orthogonal(linear: nn.Linear, factor: float) -> nn.Linear:
    nn.init.orthogonal_(linear.weight, gain=factor)
    return linear


def test_linear_chain_of_scaled_orthogonal_layers_is_exact() -> None:
    torch.manual_seed(0)
    factors = (0.3, 2.0, 5.0, 0.7)
    model = nn.Sequential(*(_orthogonal(nn.Linear(6, 6, dtype=torch.float64), f) for f in factors))
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(responses(model, x), true_responses(model, x))
    scales = [record.scale for record in layer_scales(model, x)]
    expected = [math.prod(f * f for f in factors[b + 1 :]) for b in range(len(factors))]
    assert_close(torch.stack(scales), torch.tensor(expected, dtype=torch.float64))


def test_linear_chain_of_random_layers_is_exact_in_expectation() -> None:
    """E tr(W₁ᵀW₂ᵀW₂W₁)/d factorises for independent zero-mean weights; one draw of a wide chain is close to its mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 128), nn.Linear(128, 80)).double()
    x = torch.randn(4, 64, dtype=torch.float64)
    rules, truth = responses(model, x), true_responses(model, x)
    for name in rules:
        assert_close(rules[name], truth[name], rtol=0.1, atol=0)


def test_one_layer_is_exact() -> None:
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    assert_close(responses(model, x), true_responses(model, x))


def test_last_layers_are_exact_whatever_is_below() -> None:
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(6, 12, dtype=torch.float64)
    rules, truth = responses(model, x), true_responses(model, x)
    assert_close({name: rules[name] for name in ("4.weight", "4.bias")}, {name: truth[name] for name in ("4.weight", "4.bias")})


class _Residual(nn.Module):
    """x + f(x), with f linear: the branches' Jacobians are I and W, uncorrelated if W has no trace."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.below = nn.Linear(6, 6)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x)
        return x + self.f(x)


def test_branches_of_a_skip_connection_add() -> None:
    torch.manual_seed(0)
    f = nn.Linear(6, 6)
    with torch.no_grad():  # a scaled rotation in three planes: orthogonal, traceless, antisymmetric
        f.weight.copy_(1.5 * torch.kron(torch.eye(3), torch.tensor([[0.0, -1.0], [1.0, 0.0]])))
    model, x = _Residual(f).double(), torch.randn(5, 6, dtype=torch.float64)
    below, above = layer_scales(model, x)
    assert (below.name, above.name) == ("below", "f")
    assert_close(below.scale, torch.tensor(1 + 1.5**2).double())
    assert_close(responses(model, x), true_responses(model, x))


class _Twice(nn.Module):
    """One layer called on two inputs of its own, its results kept apart: contributions add exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.shared(x[:, :4]), 2 * self.shared(x[:, 4:])], dim=1)


def test_a_layer_called_twice_has_the_sum_over_calls() -> None:
    torch.manual_seed(0)
    model, x = _Twice().double(), torch.randn(5, 8, dtype=torch.float64)
    assert [record.scale.item() for record in layer_scales(model, x)] == [1, 4]
    assert_close(responses(model, x), true_responses(model, x))


class _Function(nn.Module):
    """One linear layer and a function of its output: exact, as the layer's rows see all there is above."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first = _orthogonal(nn.Linear(24, 24), 1.0)
        self.free = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.first(x))


def _iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "relu": lambda m, x: F.relu(x),
    "relu-in-place": lambda m, x: F.relu(x, inplace=True),
    "relu-method": lambda m, x: x.relu_(),
    "gelu": lambda m, x: F.gelu(x, approximate="tanh"),
    "silu-gate": lambda m, x: F.silu(x) * 3 - 1,
    "softplus": lambda m, x: F.softplus(x, beta=2),
    "constants": lambda m, x: 1 - 2 * (-x) / 3 + 1,
    "add-alpha": lambda m, x: torch.add(x, x, alpha=2),
    "square": lambda m, x: x * x,
    "power": lambda m, x: x**3,
    "where": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "masked-fill": lambda m, x: x.masked_fill(torch.arange(24) % 2 == 0, 0.0),
    "iadd": lambda m, x: _iadd(x, torch.ones(24)),
    "clamp": lambda m, x: x.clamp(-0.5, 0.5),
    "flatten": lambda m, x: torch.flatten(x.view(-1, 2, 3, 4).permute(0, 2, 1, 3).contiguous(), 1),
    "reshape": lambda m, x: x.reshape(x.size(0), 4, -1).transpose(1, 2).unsqueeze(1).squeeze(1),
    "shape": lambda m, x: x.view(x.shape[0], 6, 4),
    "double-transpose": lambda m, x: x.T.T,
    "slice": lambda m, x: x[:, 3:11],
    "expand": lambda m, x: x.unsqueeze(1).expand(-1, 3, -1),
    "mean": lambda m, x: x.view(-1, 2, 12).mean(2),
    "mean-method-all": lambda m, x: torch.mean(x.view(-1, 2, 3, 4), dim=(2, 3)),
    "sum": lambda m, x: x.view(-1, 2, 12).sum(dim=2),
    "cat": lambda m, x: torch.cat([x, x], dim=1),
    "stack": lambda m, x: torch.stack([x, x], dim=1),
    "chunk": lambda m, x: x.chunk(3, dim=1)[1],
    "detached-branch": lambda m, x: x + x.detach(),
    "max-pool": lambda m, x: F.max_pool2d(x.view(-1, 1, 4, 6), 3, stride=1, padding=1),
    "max-pool1d": lambda m, x: F.max_pool1d(x.view(-1, 2, 12), 2, ceil_mode=True),
    "average-pool": lambda m, x: F.avg_pool2d(x.view(-1, 1, 4, 6), 3, 2, 1, False, False),
    "adaptive-average-pool": lambda m, x: F.adaptive_avg_pool2d(x.view(-1, 1, 4, 6), 1),
    "adaptive-max-pool": lambda m, x: F.adaptive_max_pool2d(x.view(-1, 1, 4, 6), (2, 3)),
    "dropout-off": lambda m, x: F.dropout(x, 0.5, training=False),
    "bare-offset": lambda m, x: x + m.free,
    "bare-factor": lambda m, x: m.free * x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exact(name: str) -> None:
    """Below a single function, M is exact, and with it the response of the bias, whose Jacobian is the identity."""
    torch.manual_seed(0)
    model, x = _Function(FUNCTIONS[name]).double(), torch.randn(5, 24, dtype=torch.float64)
    model.free.requires_grad_(name.startswith("bare"))
    rules = responses(model, x)
    truth = true_responses(model, x)
    judged = rules.keys() - {"first.weight"}
    assert_close({key: rules[key] for key in judged}, {key: truth[key] for key in judged})


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * torch.sigmoid(self.gate(x))


def test_a_gate_passes_each_factor_the_others_mean_square() -> None:
    torch.manual_seed(0)
    model, x = _Gate().double(), torch.randn(5, 6, dtype=torch.float64)
    records = {record.name: record for record in layer_scales(model, x)}
    assert_close(records["up"].scale, torch.sigmoid(model.gate(x)).square().mean().detach())
    assert_close(responses(model, x)["up.bias"], true_responses(model, x)["up.bias"])
    slope = torch.sigmoid(model.gate(x)) * (1 - torch.sigmoid(model.gate(x)))
    assert_close(records["gate"].scale, (model.up(x).square().mean() * slope.square().mean()).detach())


class _Tokens(nn.Module):
    """Embedding and bare position parameter; positions merged into the batch dimension on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.position = nn.Parameter(torch.randn(4, 6))
        self.head = _orthogonal(nn.Linear(6, 6), 2.0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.position
        return self.head(x.view(-1, 6)).view(tokens.size(0), 4, 6)


def test_samples_are_those_of_the_network_where_a_layer_sees_tokens() -> None:
    torch.manual_seed(0)
    model, tokens = _Tokens().double(), torch.randint(11, (3, 4))
    assert_close(responses(model, tokens), true_responses(model, tokens), check_dtype=False)
    assert [(r.name, r.kind, r.gain is None) for r in layer_scales(model, tokens)] == [
        ("", "Parameter", True),
        ("table", "Embedding", True),
        ("head", "Linear", False),
    ]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_tied_weights_have_one_response_the_sum_over_layers() -> None:
    model, x = _Tied().double(), torch.randn(4, 5, dtype=torch.float64)
    records = layer_scales(model, x)
    assert list(responses(model, x)) == ["first.weight"]
    assert_close(responses(model, x)["first.weight"], sum(r.curvature["weight"] * r.scale for r in records))


def test_records_hold_the_layers_own_rules() -> None:
    model, x = mlp(), torch.randn(4, 12)
    first = layer_scales(model, x)[0]
    assert isinstance(first, LayerScale)
    assert (first.name, first.kind) == ("0", "Linear")
    assert_close(first.gain, layers.gain(model[0], x))
    assert_close(first.curvature, layers.curvature(model[0], x))


def test_frozen_parameters_are_left_out() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    assert list(responses(model, torch.randn(4, 12))) == ["0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize(
    ("make", "shape", "weights_within", "vectors_within"),
    [
        (mlp, (16, 12), 1.5, 1.5),
        (lambda: mlp((12, 40, 40, 40, 5), nn.Tanh), (16, 12), 1.5, 1.5),
        (vgg, (8, 3, 8, 8), 5.0, 15.0),
        (TinyResNet, (8, 3, 8, 8), 3.0, 10.0),
    ],
    ids=["mlp-relu", "mlp-tanh", "vgg", "resnet"],
)
def test_rules_are_near_the_true_responses_of_whole_networks(
    make: Callable[[], nn.Module], shape: tuple[int, ...], weights_within: float, vectors_within: float
) -> None:
    """The product takes neighbouring Jacobians for independent; the distance is bounded here, and printed with ``pytest -s``.

    Two things set it. Max-pooling picks elements that the ReLU before it let pass, so each such pair makes the rules nearly a
    factor of 2 too low for everything below. And γ, β or a bias sums over positions that an average pool above sums again, in
    phase, which the rules count as out of phase: up to the number of positions, 4 to 16 here.
    """
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    rules, truth = responses(model, x), true_responses(model, x, draws=100)
    ratios = {name: (rules[name] / truth[name]).item() for name in rules}
    print("\n" + "\n".join(f"{name:28} rules / truth = {ratio:.3g}" for name, ratio in ratios.items()))
    for name, parameter in model.named_parameters():
        within = weights_within if parameter.ndim > 1 else vectors_within
        # A bias before a batch norm is undone by it: its true response is zero, and the rules, layer by layer, cannot know.
        assert 1 / within < ratios[name] < within or truth[name] < 1e-20, name


def test_a_max_pool_favours_what_the_relu_below_it_let_pass() -> None:
    """Why the product is low there: the true mean square of the pair's Jacobian is 15/64, the product of the rules 1/8."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(F.max_pool2d(torch.relu(x), 2).sum(), x)
    product = layers.gain(nn.ReLU(), x) * layers.gain(nn.MaxPool2d(2), x)
    assert_close(slopes.square().mean(), torch.tensor(15 / 64).double(), rtol=0.02, atol=0)
    assert_close(product, torch.tensor(1 / 8).double(), rtol=0.02, atol=0)


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class _Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.linear(x), dim=1)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(3, 3, batch_first=True)})

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder["rnn"](x)[0]


class _Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, [10])


class _Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).argmax(dim=1)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "text"),
    [
        (_Unused(), (torch.randn(2, 3),), ValueError, "Parameter 'spare.weight' belongs to no layer .* Use estimator='probe'"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), (torch.randn(2, 3),), ValueError, "Parameter 'parametrizations.weight"),
        (_Softmax(), (torch.randn(2, 3),), NotImplementedError, r"Function .*softmax.* has no rule.* Use estimator='probe'"),
        (_Recurrent(), (torch.randn(2, 4, 3),), NotImplementedError, r"Layer 'encoder.rnn' \(LSTM\) has no rule. Use estimator='probe'"),
        (_Sized(), (torch.randn(2, 3, 4),), NotImplementedError, r"Layer 'up' \(ConvTranspose1d\) is called with 2 arguments"),
        (_Labels(), (torch.randn(2, 3),), ValueError, "The output of _Labels holds no floating tensor"),
        (nn.Linear(3, 3), ([1.0, 2.0, 3.0],), TypeError, r"Invalid inputs: list. Must hold a tensor \[N, ...\]"),
        (nn.Linear(3, 3), (), TypeError, "Invalid inputs: nothing"),
        (nn.Linear(3, 3), (torch.zeros(0, 3),), ValueError, r"Invalid input shape: \[0, 3\]"),
        (nn.Linear(3, 3), (torch.full((2, 3), torch.nan),), ValueError, "holds NaN or infinite values"),
    ],
    ids=["unused", "parametrized", "function", "layer", "two-arguments", "labels", "list", "nothing", "empty", "nan"],
)
def test_what_the_rules_cannot_do_is_refused(model: nn.Module, inputs: tuple[object, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        responses(model, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_networks_give_float32_responses(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = vgg().to(dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    expected = responses(copy.deepcopy(model).double(), x.double())
    found = responses(model, x)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    assert_close(found, expected, rtol=0.1, atol=0, check_dtype=False)


def test_under_autocast_the_rules_still_compute_in_float32() -> None:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = responses(model, x)
    assert_close(found, responses(model, x), rtol=0.05, atol=0)
    assert all(value.dtype == torch.float32 for value in found.values())
