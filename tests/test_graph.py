"""The graph shows each call what it reads, and leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing import assert_close

from backmatch import graph as graphs
from tests.cases import TinyResNet, mlp, vgg


def _calls(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, list[Tensor]]]:
    """Target and copies of the operands of every call, in order."""
    with graphs.isolated(model):
        traced = graphs.trace(model, args, kwargs)
        return [(str(call.node.target), [operand.clone() for operand in call.operands]) for call in graphs.run(model, traced, args, kwargs)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4, 12)),
    "vgg": (vgg, (4, 3, 8, 8)),
    "resnet": (TinyResNet, (4, 3, 8, 8)),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), (4, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_output_is_that_of_the_forward(name: str, training: bool) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().train(training), torch.randn(shape)
    torch.manual_seed(1)
    target, operands = _calls(model, x)[-1]
    torch.manual_seed(1)
    assert target == "output"
    assert_close(operands[0], model(x).detach())


@pytest.mark.parametrize("name", NETWORKS)
def test_model_is_left_as_it_was(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    model(x).sum().backward()
    fired = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append("forward"))
        module.register_forward_pre_hook(lambda *_: fired.append("pre"))
    buffers = {key: (b, b._version, b.clone()) for key, b in model.named_buffers()}
    grads = {key: p.grad.clone() for key, p in model.named_parameters()}
    attributes = {key: set(vars(module)) for key, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()

    _calls(model, x)

    assert not fired
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert {key: set(vars(module)) for key, module in model.named_modules()} == attributes
    for key, buffer in model.named_buffers():
        kept, version, value = buffers[key]
        assert buffer is kept
        assert buffer._version == version
        assert torch.equal(buffer, value)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, grads[key])


def test_buffers_return_after_an_exception() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 2))  # the second layer fails after the first has run
    kept = dict(model.named_buffers())
    before = copy.deepcopy(kept)
    with pytest.raises(RuntimeError):
        _calls(model, torch.randn(5, 3))
    assert all(buffer is kept[name] for name, buffer in model.named_buffers())
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_operands_are_seen_before_a_layer_works_in_place() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(5, 3)
    calls = _calls(model, x)
    pre = model[0](x).detach()
    assert_close([operands[0] for _, operands in calls[:3]], [x, pre, pre.relu()])


class _InPlaceAside(nn.Module):
    """Changes a tensor in place and goes on with the old name of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden.relu_()
        return self.second(hidden)


def test_a_tensor_changed_in_place_belongs_to_the_change() -> None:
    model, x = _InPlaceAside(), torch.randn(5, 3)
    with graphs.isolated(model):
        traced = graphs.trace(model, (x,), {})
        sources = {call.node.target: call.sources for call in graphs.run(model, traced, (x,), {})}
    assert [node.target for node in sources["second"]] == ["relu_"]


class _Options(nn.Module):
    """Optional, keyword and nested arguments, a constant tensor and a container."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, batch: dict[str, Tensor], mask: Tensor | None = None, *, double: bool = False) -> dict[str, Tensor]:
        x = batch["x"] + torch.ones(3)
        for layer in self.layers:
            x = layer(x)
        if mask is not None:
            x = x * mask
        if double:
            x = 2 * x
        return {"logits": x}


@pytest.mark.parametrize("kwargs", [{}, {"mask": torch.tensor([1.0, 0.0, 2.0])}, {"double": True}], ids=["plain", "mask", "double"])
def test_arguments_without_tensors_are_constants_of_the_trace(kwargs: dict[str, Any]) -> None:
    model, batch = _Options(), {"x": torch.randn(4, 3)}
    assert_close(_calls(model, batch, **kwargs)[-1][1][0], model(batch, **kwargs)["logits"].detach())


def test_a_model_that_is_one_layer_is_one_call() -> None:
    assert [target for target, _ in _calls(nn.Linear(3, 2), torch.randn(4, 3))] == ["", "output"]


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_a_forward_that_branches_on_values_is_refused_with_the_remedy() -> None:
    with pytest.raises(NotImplementedError, match=r"_Branch.forward cannot be traced .* Use estimator='probe'"):
        _calls(_Branch(), torch.randn(4, 3))


def test_activations_are_let_go_after_their_last_reader() -> None:
    model, x = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))), torch.randn(2, 3)
    with graphs.isolated(model):
        traced = graphs.trace(model, (x,), {})
        run = graphs.run(model, traced, (x,), {})
        for _ in run:
            values: dict[fx.Node, Any] = run.gi_frame.f_locals["values"]  # type: ignore[attr-defined]
            assert len(values) <= 2
