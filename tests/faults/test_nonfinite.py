"""NaN and infinity in inputs, gradients and statistics, at seeded random steps: nothing keeps them, and the run goes on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from backmatch import BackMatch, BackMatchSGD
from backmatch.observer import MomentObserver

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:.* (skipped|measured no response)")]

STEPS = 16
BAD = [math.nan, math.inf, -math.inf]
Optimizer = BackMatchSGD

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "gradient": lambda net: BackMatchSGD(net),
    "probe": lambda net: BackMatchSGD(net, estimator="probe", interval=3),
    "rules": lambda net: BackMatchSGD(net, estimator="rules", interval=3),
    "loss": lambda net: BackMatchSGD(net, estimator="loss", interval=3),
    "scalar": lambda net: BackMatch(net, match="scalar", interval=3),
    "gram": lambda net: BackMatch(net, match="gram", step="rms", interval=3),
    "kron": lambda net: BackMatch(net, interval=3),
}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)
SEEDS = pytest.mark.parametrize("seed", range(3))


class Amplified(torch.autograd.Function):
    """The identity; its gradient takes a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class Network(nn.Sequential):
    """Whose gradients below its first ``depth`` modules take a factor."""

    depth, factor = 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        for i, module in enumerate(self):
            x = module(Amplified.apply(x, self.factor) if i == self.depth > 0 else x)
        return Amplified.apply(x, self.factor) if self.depth == len(self) else x


def network() -> Network:
    torch.manual_seed(0)
    return Network(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def backward(net: nn.Module, optimizer: Optimizer, step: int, *, x: Tensor | None = None) -> None:
    inputs, labels = batch(step)
    optimizer.zero_grad()
    cross_entropy(net(inputs if x is None else x), labels).backward()


def spoil(tensor: Tensor, draw: random.Random) -> Tensor:
    """With one entry that is not finite."""
    tensor = tensor.clone()
    tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(BAD)
    return tensor


def tensors(net: nn.Module, optimizer: Optimizer, *, only: str = "") -> list[Tensor]:
    """Weights, and state whose name holds ``only``."""
    state = [value for p in net.parameters() for name, value in sorted(optimizer.state[p].items()) if only in name]
    return [value.detach().clone() for value in (*net.parameters(), *state)]


def assert_finite(net: nn.Module, optimizer: Optimizer) -> None:
    assert all(value.isfinite().all() for value in tensors(net, optimizer))


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert_close(first, second, rtol=0.0, atol=0.0)


def drawn(seed: int) -> tuple[random.Random, set[int]]:
    """Steps to spoil, with seed 2 the first among them; not the last, which makes the paces that are compared."""
    draw = random.Random(seed)
    return draw, set(draw.sample(range(STEPS - 1), 4))


@EACH
@SEEDS
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_spoilt_step_moves_nothing_and_is_counted(name: str, seed: int, where: str) -> None:
    net, (draw, bad) = network(), drawn(seed)
    optimizer = OPTIMIZERS[name](net)
    for step in range(STEPS):
        spoilt = step in bad
        backward(net, optimizer, step, x=spoil(batch(step)[0], draw) if spoilt and where == "input" else None)
        if spoilt and where == "gradient":
            p = draw.choice(list(net.parameters()))
            assert p.grad is not None
            p.grad = spoil(p.grad, draw)
        moving = [tensors(net, optimizer, only="momentum_buffer")]
        optimizer.step()
        moving.append(tensors(net, optimizer, only="momentum_buffer"))
        if spoilt and step:  # the first step makes the buffers
            assert_equal(*moving)
        assert_finite(net, optimizer)
    assert optimizer.skipped_steps == len(bad)


PROMISED: dict[str, Callable[[nn.Module], Optimizer]] = {
    "gradient": OPTIMIZERS["gradient"],
    "loss": lambda net: BackMatchSGD(net, estimator="loss", interval=1),
    **{match: lambda net, match=match: BackMatch(net, match=match, interval=1) for match in ("scalar", "gram", "kron")},  # type: ignore[misc]
}
"""What reads every step and nothing else; ``probe`` draws its noise by the number of the step, which a skipped one takes up."""


@pytest.mark.parametrize("name", PROMISED)
@SEEDS
def test_a_run_goes_on_as_if_spoilt_steps_had_not_been(name: str, seed: int) -> None:
    draw, bad = drawn(seed)
    nets = network(), network()
    spoilt, whole = (PROMISED[name](net) for net in nets)
    for step in range(STEPS):
        if step not in bad:
            backward(nets[1], whole, step)
            whole.step()
        backward(nets[0], spoilt, step, x=spoil(batch(step)[0], draw) if step in bad else None)
        spoilt.step()
    assert (spoilt.skipped_steps, whole.skipped_steps) == (len(bad), 0)
    assert_equal(tensors(nets[0], spoilt), tensors(nets[1], whole))


@pytest.mark.parametrize("name", ["probe", "rules", "loss"])
@SEEDS
def test_a_spoilt_response_leaves_the_average_as_it_is(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (draw, bad) = network(), drawn(seed)
    optimizer = OPTIMIZERS[name](net)
    optimizer.interval = 1
    estimator: Any = optimizer._estimator
    measure = estimator.responses
    for step in range(STEPS):
        victim = draw.choice([name for name, _ in net.named_parameters()])

        def responses(seed: int, victim: str = victim, step: int = step) -> dict[str, Tensor]:
            found = measure(seed)
            return found | {victim: spoil(found[victim], draw)} if step in bad else found

        monkeypatch.setattr(estimator, "responses", responses)
        before = optimizer.responses()
        backward(net, optimizer, step)
        optimizer.step()
        after = optimizer.responses()
        if step in bad:
            assert (victim in after) == (victim in before)
            assert torch.equal(after.get(victim, torch.zeros(())), before.get(victim, torch.zeros(())))
        assert_finite(net, optimizer)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("name", ["scalar", "gram", "kron"])
@pytest.mark.parametrize("side", ["inputs", "outputs", "top"])
@SEEDS
def test_spoilt_moments_leave_the_averages_as_they_are(name: str, side: str, seed: int) -> None:
    """A and B of one layer, or the output's second moment, which all layers' B is relative to."""
    net, (draw, bad) = network(), drawn(seed)
    optimizer = OPTIMIZERS[name](net)
    optimizer.interval = 1
    for step in range(STEPS):
        backward(net, optimizer, step)
        observer = optimizer._observer
        assert isinstance(observer, MomentObserver)
        victim = draw.choice(list(observer.moments))
        if step in bad and side == "top":
            observer.top.total = torch.tensor(draw.choice(BAD))
        elif step in bad:
            setattr(observer.moments[victim], side, spoil(getattr(observer.moments[victim], side), draw))
        kept = [net.get_submodule(layer).weight for layer in (observer.moments if side == "top" else [victim])]
        before = [value.clone() for p in kept for key, value in optimizer.state[p].items() if key.endswith(("_moment", "_power"))]
        optimizer.step()
        after = [value for p in kept for key, value in optimizer.state[p].items() if key.endswith(("_moment", "_power"))]
        if step in bad and before:
            assert_equal(before, after)
        assert_finite(net, optimizer)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("name", ["gram", "kron"])
def test_moments_that_overflow_are_not_taken(name: str) -> None:
    """Inputs and gradients that are finite, with squares that are not: the step is taken, as its gradients' squares are finite."""
    net = network()
    optimizer = OPTIMIZERS[name](net)
    optimizer.interval = 1
    for step in range(8):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        net.depth, net.factor = 3, 1e20 if step % 3 == 2 else 1.0
        cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        assert_finite(net, optimizer)
    assert optimizer.skipped_steps == 0


def test_a_layer_whose_measurement_overflows_keeps_its_response_and_stays_within_the_bound_of_the_others() -> None:
    """At bound 1 all paces are the median of ``w/√s``; weights four times as large and the same responses make it four times as large."""
    net = network()
    optimizer = BackMatchSGD(net, estimator="loss", bound=1.0, lr=1e-12, interval=1, weight_decay=0.0, beta=0.999)
    backward(net, optimizer, 0)
    optimizer.step()
    before, responses = optimizer.paces(), optimizer.responses()
    with torch.no_grad():
        torch._foreach_mul_(list(net.parameters()), 4.0)
    net.depth, net.factor = 2, math.inf
    backward(net, optimizer, 1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_close(optimizer.responses(), responses, rtol=0.0, atol=0.0)
    assert_close(optimizer.paces(), {name: 4.0 * pace for name, pace in before.items()})


@pytest.mark.parametrize("name", ["gradient", "loss", "scalar", "gram", "kron"])
@pytest.mark.parametrize("depth", [1, 3, 5], ids=["lowest layer", "two layers", "all"])
@pytest.mark.parametrize(
    ("order", "seed"), [("optimizer.zero_grad", 0), ("model.zero_grad", 1), ("forward first", 2), ("micro-batches", 3)]
)
def test_steps_that_a_grad_scaler_skips_leave_nothing_behind(name: str, depth: int, order: str, seed: int) -> None:
    """Whatever part of the layers overflows, and however the loop drops the gradients. A scale that is a power of two is exact."""
    _, bad = drawn(seed)
    nets = network(), network()
    optimizers = [PROMISED[name](net) for net in nets]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12) for _ in nets]
    for step in range(STEPS):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            if step in bad and net is nets[1]:
                continue
            inputs, labels = batch(step)
            zero_grad = net.zero_grad if order == "model.zero_grad" else optimizer.zero_grad
            halves = [slice(0, 4), slice(4, 8)] if order == "micro-batches" else [slice(None)]
            if order != "forward first":
                zero_grad()
            for half in halves:
                net.depth, net.factor = depth, math.inf if step in bad else 1.0
                z = net(inputs[half])
                if order == "forward first":
                    zero_grad()
                scaler.scale(cross_entropy(z, labels[half])).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_equal(tensors(nets[0], optimizers[0]), tensors(nets[1], optimizers[1]))
