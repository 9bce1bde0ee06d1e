"""Optimizers and the models around them: copied together, what forward returns, hooks of others, gradients that went, layers that came."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from backmatch import BackMatchSGD
from backmatch.contract import ModelOptimizer
from backmatch.estimators import fan_ins
from backmatch.ladder import BackMatch

Build = Callable[[nn.Module], BackMatchSGD]
OURS: dict[str, Build] = {
    "backmatch": BackMatch,
    "gradient": BackMatchSGD,
    **{name: lambda net, name=name: BackMatchSGD(net, estimator=name) for name in ("probe", "rules", "loss")},  # type: ignore[misc]
}
EVERY = pytest.mark.parametrize("build", OURS.values(), ids=OURS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, dtype=torch.float64, generator=generator), torch.randn(8, 3, dtype=torch.float64, generator=generator)


def first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0, read: Callable[[Any], Tensor] = first) -> None:
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.mse_loss(read(net(x)), y).backward()
        optimizer.step()


class Agent(nn.Module):
    """A network that holds its own optimizer."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.net = network()
        self.optimizer = build(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@EVERY
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))], ids=["deepcopy", "pickle"])
def test_a_model_that_holds_its_optimizer_is_copied_with_it(build: Build, copied: Callable[[Agent], Agent]) -> None:
    """At a step that does not measure, so that the copy misses nothing."""
    agent = Agent(build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(agent, agent.optimizer, 9)
        twin = copied(agent)
        assert {id(p) for group in twin.optimizer.param_groups for p in group["params"]} == {id(p) for p in twin.parameters()}
        for each in (agent, twin):
            train(each, each.optimizer, 12, start=9)
    assert_close(list(twin.parameters()), list(agent.parameters()), rtol=0, atol=0)


class Returns(nn.Module):
    """Returns something beside its predictions."""

    def __init__(self, beside: Callable[[Returns, Tensor], Tensor], *, before: bool = False) -> None:
        super().__init__()
        self.net = network()
        self._beside, self._before = beside, before

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.net(x)
        beside = self._beside(self, z)
        return (beside, z) if self._before else (z, beside)


def used(output: tuple[Tensor, Tensor]) -> Tensor:
    """Both parts, so that gradients pass through the second too."""
    return output[0] + output[1]


@pytest.mark.parametrize("build", [OURS["backmatch"], OURS["loss"]], ids=["backmatch", "loss"])
def test_a_parameter_that_forward_returns_is_no_prediction(build: Build) -> None:
    """It keeps no hooks, and layers are measured as beside an output that does not return it."""

    class Plain(Returns):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.net(x) + self.net[2].bias

    def step_lengths(net: Returns) -> list[Tensor]:
        optimizer = build(net)
        if isinstance(optimizer, BackMatch):
            optimizer.length = "plain"  # relative to the output's gradient
        train(net, optimizer, 6, read=lambda output: output if isinstance(output, Tensor) else used(output))
        assert not any(p._backward_hooks for p in net.parameters())
        return [p.detach() for p in net.net.parameters()]

    assert_close(step_lengths(Returns(lambda self, z: self.net[2].bias)), step_lengths(Plain(lambda self, z: z)))


@EVERY
def test_an_output_without_elements_is_passed_over(build: Build) -> None:
    """As a detector returns when it proposes nothing."""

    def trained(net: Returns) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(net, build(net), 4, read=lambda output: max(output, key=lambda z: z.numel()))
        return [p.detach() for p in net.net.parameters()]

    if build is OURS["rules"]:
        pytest.skip("needs one output")
    empty, full = (Returns(beside, before=before) for beside, before in ((lambda _, z: z[:0], True), (lambda _, z: z[:0], False)))
    assert_close(trained(empty), trained(full), rtol=0, atol=0)


@pytest.mark.parametrize(
    "replaced", [lambda z: z[..., :3], lambda z: torch.cat([z, z], -1)[..., 2:8], lambda z: z[:4]], ids=["narrower", "wider", "fewer"]
)
def test_a_layer_whose_output_a_hook_reshapes_is_passed_over(replaced: Callable[[Tensor], Tensor]) -> None:
    net = network()
    width = replaced(torch.zeros(8, 5)).shape[1]
    net[2] = nn.Linear(width, 3).double()
    net[0].register_forward_hook(lambda module, args, output: replaced(output))
    optimizer = BackMatch(net)
    x, y = batch(0)
    z = net(x)
    F.mse_loss(z, y[: len(z)]).backward()
    with pytest.warns(UserWarning, match=r"saw no sample go through 0, which have gradients"):
        optimizer.step()
    assert optimizer.state[net[2].weight]["measurements"] == 1


def test_shapes_of_convolutions_are_known() -> None:
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 9, 8)),
        (nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="circular"), (2, 3, 9, 8)),
        (nn.Conv1d(3, 4, 5, padding="valid"), (3, 9)),  # one sample without a batch
        (nn.Linear(9, 4), (2, 3, 9)),
    ):
        net = nn.Sequential(layer)
        optimizer = BackMatch(net)
        net(torch.randn(shape)).square().mean().backward()
        optimizer.step()
        assert optimizer.state[layer.weight]["measurements"] == 1


@pytest.mark.parametrize("build", [OURS["backmatch"], OURS["loss"]], ids=["backmatch", "loss"])
@pytest.mark.parametrize("scale", [100.0, float("inf")], ids=["spike", "overflow"])
def test_what_was_seen_of_gradients_that_went_is_forgotten(build: Build, scale: float) -> None:
    """Steps that a loop leaves out, with gradients set to zero in place of None."""

    def trained(left_out: bool) -> list[Tensor]:
        net = network()
        optimizer = build(net)
        train(net, optimizer, 2)
        if left_out:
            optimizer.zero_grad(set_to_none=False)
            (scale * F.mse_loss(net(batch(7)[0]), batch(7)[1])).backward()
        x, y = batch(3)
        z = net(x)
        optimizer.zero_grad(set_to_none=False)  # between forward and backward, as some loops do
        F.mse_loss(z, y).backward()
        optimizer.step()
        return [p.detach() for p in net.parameters()]

    assert_close(trained(True), trained(False), rtol=0, atol=0)


def test_modules_that_share_names_keep_their_own_units() -> None:
    torch.manual_seed(0)
    up, down, x = nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    optimizer = BackMatchSGD([*up.named_parameters(), *down.named_parameters()], model=up)
    (up(x).sum() + down(x).square().sum()).backward()
    optimizer.step()
    assert optimizer.state[up.weight]["pace"].shape == (1, 6, 1, 1)
    assert optimizer.state[down.weight]["pace"].shape == (6, 1, 1, 1)
    paces = optimizer.paces()
    assert list(paces) == ["weight", "bias", "param_groups[0]['params'][2]", "param_groups[0]['params'][3]"]
    assert_close(paces["param_groups[0]['params'][2]"], optimizer.state[down.weight]["pace"])


def test_fan_in_of_a_grouped_transposed_convolution_is_that_of_one_group() -> None:
    assert fan_ins(nn.Conv2d(64, 64, 4, groups=8)) == fan_ins(nn.ConvTranspose2d(64, 64, 4, groups=8)) == {"weight": 8 * 16}


@EVERY
def test_layers_that_come_later_are_measured(build: Build) -> None:
    net = network()
    optimizer = build(net)
    train(net, optimizer, 2)
    net.append(nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": list(net[3].parameters())})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer, 4, start=2)
    assert optimizer.state[net[3].weight]["measurements"] == 4


def test_the_loss_estimator_follows_a_parameter_that_was_replaced() -> None:
    net = network()
    optimizer = BackMatchSGD(net, estimator="loss")
    train(net, optimizer, 1)
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())
    optimizer.add_param_group({"params": [net[2].weight]})
    train(net, optimizer, 1, start=1)
    assert optimizer.state[net[2].weight]["measurements"] == 1


@EVERY
def test_a_detached_optimizer_asks_for_nothing(build: Build) -> None:
    net = network()
    optimizer = build(net)
    train(net, optimizer, 1)
    optimizer.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer, 10, start=1)


def test_warnings_point_at_the_line_of_the_user() -> None:
    net = network()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    for optimizer in (BackMatch(net), torch.optim.lr_scheduler.ConstantLR(BackMatch(net)).optimizer):
        with pytest.warns(UserWarning, match="saw no sample") as told:
            optimizer.step()
        assert {warning.filename for warning in told} == {__file__}


def test_a_default_device_is_not_that_of_what_the_host_makes() -> None:
    net = network()
    optimizer: ModelOptimizer = BackMatchSGD(net)
    torch.set_default_device("meta")
    try:
        with torch.device("cpu"):
            x, y = batch(0)
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert all(state["pace"].device.type == "cpu" for state in optimizer.state.values())
