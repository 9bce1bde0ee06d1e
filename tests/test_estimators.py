"""The three ways to the response agree where theory says so; elsewhere, how far apart they are is on record."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from backmatch import BackMatchSGD, coverage
from backmatch.cli.models import build_model
from backmatch.estimators import Estimator, Loss, Probe, Rules, fan_ins, unit_dims


def orthogonal_chain() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).double()
    for gain, layer in zip((0.5, 2.0, 3.0), net, strict=True):
        assert isinstance(layer, nn.Linear)
        nn.init.orthogonal_(layer.weight, gain)
    return net


def observed(net: nn.Module, x: Tensor, direction: str) -> dict[str, dict[str, Tensor]]:
    """Responses by each estimator after one training forward and backward, the probe averaged over seeds."""
    probe, rules, loss = Probe(net, per="tensor", samples=len(x)), Rules(net, samples=len(x)), Loss(net)
    z = net(x)
    if direction == "white":
        torch.autograd.backward(z, torch.randn_like(z))
    else:
        nn.functional.cross_entropy(z, torch.arange(len(x)) % z.shape[1]).backward()
    found = {"loss": loss.responses(0), "rules": rules.responses(0)}
    inputs = probe.observer.inputs
    total: dict[str, Tensor] = {}
    draws = 30
    for seed in range(draws):
        probe.observer.inputs = inputs
        measured = probe.responses(seed)
        assert measured is not None
        total = {name: total.get(name, torch.tensor(0.0)) + value / draws for name, value in measured.items()}
    for estimator in (probe, rules, loss):
        estimator.observer.remove()
    return {"probe": total, **{name: value for name, value in found.items() if value is not None}}


def test_all_agree_on_a_chain_of_scaled_orthogonal_layers() -> None:
    net = orthogonal_chain()
    x = torch.randn(64, 16, dtype=torch.float64)
    truth_scales = {"0": 36.0, "1": 9.0, "2": 1.0}  # M: product of the squared gains above
    a, expected = x, {}
    for name, layer in net.named_children():
        expected[f"{name}.weight"] = a.square().mean() * truth_scales[name]
        expected[f"{name}.bias"] = torch.tensor(truth_scales[name], dtype=torch.float64)
        a = layer(a).detach()
    found = observed(net, x, "white")
    assert_close(found["rules"], expected)
    assert_close({name: value.double() for name, value in found["probe"].items()}, expected, rtol=0.15, atol=0.0)
    # For orthogonal layers |δ_b|² / |δ_B|² is the squared gain for any δ_B, so the step's own backward is exact too.
    assert_close(found["loss"], expected)


@pytest.mark.parametrize(
    ("name", "width", "shape", "rules_within", "loss_within"),
    [("mlp", 0.25, (1, 8, 8), 1.25, 1.25), ("vgg11-bn", 0.125, (3, 16, 16), 20.0, 20.0), ("resnet20", 0.5, (3, 16, 16), 2.5, 2.5)],
)
def test_how_far_apart_they_are(name: str, width: float, shape: tuple[int, int, int], rules_within: float, loss_within: float) -> None:
    torch.manual_seed(0)
    net = build_model(name, in_shape=shape, classes=10, width=width)
    found = observed(net, torch.randn(32, *shape), "cross-entropy")
    weights = [key for key, p in net.named_parameters() if p.ndim > 1]
    for other, within in (("rules", rules_within), ("loss", loss_within)):
        ratios = torch.stack([found[other][key] / found["probe"][key] for key in weights]).log()
        ratios = (ratios - ratios.median()).exp()  # a common factor is not the method's
        print(f"{name}: {other}/probe over {len(weights)} weights: {ratios.min():.2f} to {ratios.max():.2f}")
        assert ratios.max() < within
        assert ratios.min() > 1 / within


def test_probe_and_loss_see_a_layer_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)
            nn.init.orthogonal_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    found = observed(Twice(), torch.randn(256, 16), "white")
    # Each call contributes mean(a²)·1; their cross term vanishes in expectation over independent inputs.
    for name in ("rules", "loss", "probe"):
        assert_close(found[name]["layer.weight"].float(), torch.tensor(2.0), rtol=0.2, atol=0.0)


def test_loss_counts_what_reached_the_output_only() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    loss = Loss(net)
    net(torch.randn(3, 4))  # never back-propagated
    assert loss.responses(0) is None


def test_loss_needs_no_rule_for_what_is_frozen_or_parametrized_away() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4).requires_grad_(False), parametrizations.weight_norm(nn.Linear(4, 2)))
    net[2].parametrizations.requires_grad_(False)  # type: ignore[union-attr, operator]
    net.forward = lambda x: net[2](net[1](net[0](x), x))  # type: ignore[method-assign]
    loss = Loss(net)
    net(torch.randn(3, 4)).sum().backward()
    assert loss.responses(0).keys() == {"0.weight", "0.bias", "2.bias"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "make", [lambda net: Probe(net, per="tensor", samples=1), lambda net: Rules(net, samples=1)], ids=["probe", "rules"]
)
def test_too_few_samples_for_a_norm_over_the_batch_are_named(make: Callable[[nn.Module], Estimator]) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    estimator = make(net)
    net(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"Invalid samples: 1. Must be more .* use estimator='gradient'"):
        estimator.responses(0)


def test_unit_dims() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.ConvTranspose1d(2, 3, 1), nn.BatchNorm1d(3), nn.Embedding(5, 2))
    assert unit_dims(net) == {"0.weight": 0, "1.weight": 0, "2.weight": 1, "4.weight": 0}


def test_fan_ins_count_inputs_and_a_lookup_has_one() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 4), nn.ConvTranspose1d(2, 3, 4), nn.BatchNorm1d(3), nn.Embedding(5, 2))
    assert fan_ins(net) == {"0.weight": 2, "1.weight": 8, "2.weight": 8, "4.weight": 1}
    tied = nn.ModuleDict({"tokens": nn.Embedding(5, 2), "head": nn.Linear(2, 5, bias=False)})
    tied["head"].weight = tied["tokens"].weight  # a linear layer as well
    assert fan_ins(tied) == {"tokens.weight": 2}


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm, nn.utils.spectral_norm])
def test_units_of_a_weight_that_is_computed_are_known_without_computing_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Looked up, a spectrally normalised weight takes a power iteration, which changes its buffers."""
    net = wrap(nn.ConvTranspose1d(6, 4, 5, groups=2))
    before = {name: value.clone() for name, value in net.named_buffers()}
    whole = {name for name, p in net.named_parameters() if p.shape == (6, 2, 5)}
    assert {name: dim for name, dim in unit_dims(net).items() if name in whole} == dict.fromkeys(whole, 1)
    assert {name: inputs for name, inputs in fan_ins(net).items() if name in whole} == dict.fromkeys(whole, 15)
    assert len(whole) == 1
    assert_close(dict(net.named_buffers()), before, rtol=0.0, atol=0.0)


def test_the_weight_of_a_normalisation_is_a_vector_whatever_its_shape() -> None:
    net = nn.Sequential(nn.LayerNorm([2, 3]), nn.RMSNorm([2, 3]))
    assert unit_dims(net) == fan_ins(net) == {}
    assert BackMatchSGD(net)._units_of(net[0].weight) is None
    assert {rule.paces for rule in coverage(net, quiet=True)} == {1}


@pytest.mark.parametrize("estimator", [Probe, Rules, Loss])
def test_merging_samples_and_positions_changes_nothing(estimator: type[Probe] | type[Rules] | type[Loss]) -> None:
    class Tokens(nn.Module):
        def __init__(self, merge: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.merge, self.first, self.second = merge, nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x.flatten(0, 1) if self.merge else x)

    x, found = torch.randn(8, 5, 4), []
    for merge in (False, True):
        net = Tokens(merge)
        settings = {Probe: {"per": "tensor", "samples": 8}, Rules: {"samples": 8}, Loss: {}}[estimator]
        watching = estimator(net, **settings)  # type: ignore[arg-type]
        net(x).sin().sum().backward()
        found.append(watching.responses(0))
    assert_close(found[0], found[1])
