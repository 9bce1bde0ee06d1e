"""Layer records against explicit Jacobians in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from backmatch.inspection import LayerRecord, Spectrum, inspect_layers
from backmatch.optimizer import BackMatchSGD
from backmatch.pace import Joined, layer_paces, layer_sizes
from backmatch.scale import layer_scales, responses
from tests.cases import randomize


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double()
    randomize(model)
    return model


def small() -> tuple[nn.Sequential, Tensor]:
    model = network(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 2, groups=2, bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 30),
        nn.Linear(30, 5),
        nn.LayerNorm(5),
    )
    return model, torch.randn(3, 2, 6, 6, dtype=torch.float64)


def hessian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    jacobian = jacrev(function)(x).reshape(-1, x.numel())
    return jacobian.T @ jacobian


def assert_spectrum(found: Spectrum, matrices: list[Tensor]) -> None:
    values = torch.stack([torch.linalg.eigvalsh(matrix) for matrix in matrices])
    expected = [values[:, 0].mean(), values.mean(), values[:, -1].mean()]
    seen = torch.tensor([found.low, found.mean, found.high], dtype=torch.float64)
    assert_close(seen, torch.stack(expected), rtol=1e-8, atol=1e-9 * values.max().item())


def inputs_of(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    seen = {}
    for name, layer in model.named_children():
        seen[name] = x.clone()
        x = layer(x)
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_spectra_are_those_of_explicit_jacobians(training: bool) -> None:
    model, x = small()
    model.train(training)
    model[4].track_running_stats = not training  # jacrev cannot write running statistics
    seen = inputs_of(model, x)
    records = inspect_layers(model, x, samples=3)
    assert [record.name for record in records] == ["0", "1", "3", "4", "7", "8", "9"]
    for record in records:
        layer, z = model[int(record.name)], seen[record.name]
        couples = training and isinstance(layer, nn.BatchNorm2d)
        parts = [z] if couples else z.split(1)
        assert record.input_hessian is not None
        assert record.input_hessian.method == record.weight_hessian.method == "exact"
        assert_spectrum(record.input_hessian, [hessian(layer, part) for part in parts])
        assert_close(record.gain, record.input_hessian.mean)
        of_weight = hessian(lambda w, layer=layer, z=z: functional_call(layer, {"weight": w}, (z,)), layer.weight)
        assert_spectrum(record.weight_hessian, [of_weight / len(x)])


def test_wide_hessians_by_iteration() -> None:
    model, x = small()
    exact = inspect_layers(model, x, samples=2)
    for record, reference in zip(inspect_layers(model, x, samples=2, exact_width=1), exact, strict=True):
        for found, expected in ((record.input_hessian, reference.input_hessian), (record.weight_hessian, reference.weight_hessian)):
            assert found is not None
            assert expected is not None
            assert found.high == pytest.approx(expected.high, rel=0.02)
            assert found.high <= expected.high * (1 + 1e-9)
            assert found.mean == pytest.approx(expected.mean)
            assert (found.low is None) == (found.method == "iterative")
    assert record.weight_hessian.method == "iterative"


def test_scale_response_and_pace_are_the_rules() -> None:
    model, x = small()
    records = inspect_layers(model, x, power=0.75)
    measured = responses(model, x)
    parameters = [model.get_parameter(name).detach() for name in measured]
    sizes = layer_sizes(Joined.of([p.square().mean() for p in parameters]), [None if p.ndim == 1 else p[0].numel() for p in parameters])
    pace = dict(zip(measured, layer_paces(Joined.of(list(measured.values())), sizes, power=0.75, bound=1e30).split(), strict=True))
    for record, call in zip(records, layer_scales(model, x), strict=True):
        assert (record.name, record.kind, record.estimator) == (call.name, call.kind, "rules")
        assert record.parameter == f"{record.name}.weight"
        assert record.shape == tuple(model.get_parameter(record.parameter).shape)
        assert record.scale == call.scale.item()
        assert record.gain == call.gain.item()
        assert record.response == measured[record.parameter].item()
        assert record.pace == pytest.approx(pace[record.parameter].item())


class Branching(nn.Module):
    """Its forward branches on a value, which the rules cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) if x.sum() < 1e9 else -self.first(x))


def test_untraceable_model_is_probed() -> None:
    torch.manual_seed(0)
    model, x = Branching().double(), torch.randn(64, 6, dtype=torch.float64)
    first, second = inspect_layers(model, x)
    assert first.estimator == second.estimator == "probe"
    # J = W2 at the first layer's output: M = ‖W2‖² / 7, which eq. 5 estimates from few draws.
    assert first.scale == pytest.approx(model.second.weight.square().sum().item() / 7, rel=0.4)
    assert second.scale == pytest.approx(1.0, rel=0.4)
    assert first.gain == pytest.approx(model.first.weight.square().sum().item() / 6)


def test_layer_without_rule_is_differentiated() -> None:
    torch.manual_seed(0)
    model, x = network(nn.Bilinear(3, 3, 2)), torch.randn(4, 3, dtype=torch.float64)

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = model[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.bilinear(x, x)

    (record,) = inspect_layers(Squared(), x)
    assert (record.gain, record.input_hessian, record.estimator) == (None, None, "probe")
    products = (x[:, :, None] * x[:, None, :]).flatten(1)
    values = torch.linalg.eigvalsh(products.T @ products / 4)
    assert record.weight_hessian.high == pytest.approx(values[-1].item())
    assert record.weight_hessian.mean == pytest.approx(values.mean().item())


def test_embedding_reads_indices() -> None:
    model = network(nn.Embedding(5, 3), nn.Linear(3, 2))
    tokens = torch.tensor([[0, 1, 1], [1, 4, 0]])
    embedding = inspect_layers(model, tokens)[0]
    assert (embedding.gain, embedding.input_hessian) == (None, None)
    counts = torch.bincount(tokens.flatten(), minlength=5) / 2  # the Hessian is diagonal: tokens per sample
    assert (embedding.weight_hessian.low, embedding.weight_hessian.high) == (0.0, counts.max().item())
    assert embedding.weight_hessian.mean == pytest.approx(counts.mean().item())


def test_layer_called_twice_has_two_records() -> None:
    shared = nn.Linear(4, 4)
    model = network(shared, nn.Tanh(), shared)
    first, second = inspect_layers(model, torch.randn(8, 4, dtype=torch.float64))
    assert first.name == second.name == "0"
    assert first.response == second.response
    assert second.scale == 1.0 != first.scale
    assert first.weight_hessian != second.weight_hessian


def test_model_is_left_as_it_was() -> None:
    model, x = small()
    optimizer = BackMatchSGD(model)
    called: list[nn.Module] = []
    for layer in model:
        layer.register_forward_pre_hook(lambda layer, args: called.append(layer))
    hooks = [len(layer._forward_pre_hooks) for layer in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    inspect_layers(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [len(layer._forward_pre_hooks) for layer in model.modules()] == hooks
    assert len(called) == len(model)  # once, by the forward that reads the layers' inputs
    assert optimizer.paces() == {}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"power": 1.5}, "Invalid power: 1.5"),
        ({"samples": 0}, "Invalid samples: 0"),
        ({"exact_width": 0}, "Invalid exact_width: 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], text: str) -> None:
    model, x = small()
    with pytest.raises(ValueError, match=text):
        inspect_layers(model, x, **settings)


def test_frozen_model() -> None:
    model, x = small()
    with pytest.raises(ValueError, match="no trainable parameter"):
        inspect_layers(model.requires_grad_(False), x)


def test_frozen_weight_leaves_the_bias() -> None:
    model = network(nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    (record,) = inspect_layers(model, torch.randn(4, 3, dtype=torch.float64))
    assert isinstance(record, LayerRecord)
    assert (record.parameter, record.weight_hessian) == ("0.bias", Spectrum(1.0, 1.0, 1.0, "exact"))


def test_a_parameter_beside_layers_puts_out_itself() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.layer = nn.Parameter(torch.zeros(3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.shift)

    net = Shifted().double()
    first, second = inspect_layers(net, torch.randn(8, 3, dtype=torch.float64))
    assert (first.kind, first.parameter, first.gain, first.input_hessian) == ("Parameter", "shift", None, None)
    # The same shift reaches 8 samples: its response is that of the layer's input, its Hessian 1/8.
    assert first.scale == pytest.approx(8 * first.response)
    assert first.response == pytest.approx(net.layer.weight.detach().square().sum().item() / 3, rel=1e-5)
    assert (first.weight_hessian.low, first.weight_hessian.high) == (1 / 8, 1 / 8)
    assert second.kind == "Linear"
