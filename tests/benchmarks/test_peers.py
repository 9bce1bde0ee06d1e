"""Peers: each takes a step on convolutions and on a transformer, by the learning rate it is given."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("pytorch_optimizer")

from backmatch.cli.transformer import GPT
from benchmarks.peers import PEERS
from benchmarks.training import held_bytes

Case = Callable[[], tuple[nn.Module, Tensor, Tensor]]


def convolutional() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3),
    )
    return model, torch.randn(8, 2, 5, 5), torch.randint(3, (8,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return GPT(11, 6, depth=1, width=8, heads=2), torch.randint(11, (4, 6)), torch.randint(11, (4, 6))


CASES: list[Case] = [convolutional, transformer]


def changes(case: Case, name: str, lr: float, steps: int = 2, later: float | None = None) -> list[Tensor]:
    """Of all parameters after some steps at lr, or at a rate that the groups are given later."""
    model, x, y = case()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = PEERS[name].build(model, lr, 100)
    if later is not None:
        for group in optimizer.param_groups:
            group["lr"] = later
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
    return [(p - q).detach() for p, q in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_moves_every_parameter_and_at_rate_0_none(case: Case, name: str) -> None:
    moved = changes(case, name, PEERS[name].centre)
    assert all(change.isfinite().all() and change.any() for change in moved)
    # The schedule acts on the groups, so it must not matter what the optimizer was built with.
    assert not any(change.any() for change in changes(case, name, PEERS[name].centre, later=0.0))


# SOAP only measures on its first step; Prodigy's own estimate follows lr.
@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("soap", "prodigy")])
def test_twice_the_rate_is_twice_the_first_step(name: str) -> None:
    once, twice = (changes(convolutional, name, factor * PEERS[name].centre, steps=1) for factor in (0.01, 0.02))
    for a, b in zip(once, twice, strict=True):
        assert_close(2 * a, b, atol=3e-7, rtol=2e-3)  # a parameter of 1 is rounded by 6e-8


def test_size_only_rates_follow_the_fan_in() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))
    groups = PEERS["size-only"].build(model, 0.3, 1).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.3 * math.sqrt(6 / 4), 0.3, 0.3 * math.sqrt(6 / 9), 0.3])


def test_rms_only_is_one_over_the_root_mean_square_of_each_gradient() -> None:
    model, x, y = convolutional()
    optimizer = PEERS["rms"].build(model, 1e-4, 1)
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    optimizer.step()
    paces = optimizer.paces()  # type: ignore[attr-defined]
    for name in ("0.weight", "3.weight", "3.bias", "6.weight", "6.bias"):
        assert_close(paces[name], 1 / gradients[name].square().mean().sqrt(), rtol=1e-4, atol=0)


def test_muon_orthogonalises_hidden_weights_in_float32_and_leaves_the_last_layer() -> None:
    model, _, _ = convolutional()
    optimizer = PEERS["muon"].build(model, 0.01, 1)
    hidden, rest = optimizer.param_groups
    assert [tuple(p.shape) for p in hidden["params"]] == [(4, 2, 3, 3), (6, 4, 3, 3)]
    assert any(p is model[6].weight for p in rest["params"])
    (update,) = optimizer._orthogonalize(hidden, [torch.randn(6, 4, 3, 3)])  # type: ignore[attr-defined]
    assert update.dtype == torch.float32
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_state_is_counted_through_lists_and_objects() -> None:
    class Holder:
        def __init__(self) -> None:
            self.kept = [torch.zeros(3), (torch.zeros(2, dtype=torch.float64),)]

    known = torch.zeros(100)
    assert held_bytes({"a": torch.zeros(5), "b": Holder(), "c": [known], "d": "text"}, {id(known)}) == 20 + 12 + 16
    model, x, y = convolutional()
    optimizer = PEERS["adamw"].build(model, 1e-3, 1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    assert held_bytes(optimizer.state, {id(p) for p in parameters}) == 8 * count + 4 * len(parameters)  # and a step count each
