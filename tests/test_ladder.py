"""The ladder against the full match and against its stated equations, in float64; then the loops and checkpoints of users."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from backmatch import BackMatchSGD, exact, listener
from backmatch.contract import is_due
from backmatch.ladder import BackMatch
from backmatch.newton_schulz import orthogonalised
from backmatch.observer import GradMoment, Moments
from tests.reference import Reference

float64 = torch.float64
MATCHES = pytest.mark.parametrize("match", ["scalar", "gram", "kron"])
LENGTHS = pytest.mark.parametrize("step", ["plain", "rms", "spectral"])

BARE: dict[str, Any] = {"step": "plain", "power": 1.0, "damping": 0.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
"""Equation 6 itself."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=float64)


def white(samples: int, width: int) -> Tensor:
    """Rows whose second moment is a multiple of the identity."""
    return 3.0 * torch.linalg.qr(randn(samples, width)).Q


def changes(net: nn.Module, x: Tensor, delta: Tensor, **settings: Any) -> dict[str, Tensor]:
    """What one step at lr 1 takes off every parameter, where the output's gradient is δ, averaged over predictions."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = BackMatch(net, 1.0, **settings)
    net.zero_grad()
    z = net(x)
    z.backward(delta / (z.numel() / z.shape[-1]))
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in net.named_parameters()}


# ---- the full match


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [(), (4,)])
def test_gram_is_the_full_match_of_the_last_layer(bias: bool, positions: tuple[int, ...]) -> None:
    layer = nn.Linear(5, 3, bias, dtype=float64)
    x, delta = randn(12, *positions, 5), randn(12, *positions, 3)
    assert_close(changes(layer, x, delta, match="gram", **BARE), exact.match_parameters(layer, x, delta))


def test_gram_solves_a_linear_least_squares_problem_in_one_step() -> None:
    layer, x, y = nn.Linear(5, 3, dtype=float64), randn(12, 5), randn(12, 3)
    changes(layer, x, layer(x).detach() - y, match="gram", **BARE)
    rows = torch.cat([x, torch.ones(12, 1, dtype=float64)], dim=1)
    assert_close(layer(x).detach(), rows @ torch.linalg.lstsq(rows, y).solution)


@pytest.mark.parametrize("bias", [True, False])
def test_kron_is_the_full_match_of_the_last_layer_under_white_output_gradients(bias: bool) -> None:
    layer, x, delta = nn.Linear(5, 3, bias, dtype=float64), randn(12, 5), white(12, 3)
    assert_close(changes(layer, x, delta, match="kron", **BARE), exact.match_parameters(layer, x, delta))


@pytest.mark.parametrize("depth", [2, 3])
def test_kron_is_the_full_match_through_an_invertible_chain(depth: int) -> None:
    """``B⁻¹ = (JᵀJ)⁻¹`` corrects once what the chain of pseudo-inverses corrects layer by layer (derivation, section 4)."""
    net = nn.Sequential(*(nn.Linear(4, 4, dtype=float64) for _ in range(depth)))
    x, delta = randn(15, 4), white(15, 4)
    expected = {f"{m.name}.{name}": value for m in exact.match(net, x, delta) for name, value in m.parameter_change.items()}
    found = changes(net, x, delta, match="kron", **BARE)
    assert_close(found, {name: expected[name] for name in found})


def test_gram_is_not_the_full_match_below_a_layer_that_is_not_orthogonal() -> None:
    """So that the tests above tell the rungs apart."""
    net = nn.Sequential(nn.Linear(4, 4, dtype=float64), nn.Linear(4, 4, dtype=float64))
    x, delta = randn(15, 4), white(15, 4)
    expected = exact.match(net, x, delta)[0].parameter_change["weight"]
    found = changes(net, x, delta, match="gram", **BARE)["0.weight"]
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) < 0.95


@LENGTHS
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_rungs_meet_where_moments_are_white(power: float, step: Any) -> None:
    layer = nn.Linear(5, 3, bias=False, dtype=float64)
    settings = BARE | {"step": step, "power": power, "damping": 0.1}

    def found(match: str, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return changes(copy.deepcopy(layer), x, delta, match=match, **settings)

    x, delta = white(12, 5), randn(12, 3)
    assert_close(found("gram", x, delta), found("scalar", x, delta))
    assert not torch.allclose(found("kron", x, delta)["weight"], found("gram", x, delta)["weight"])
    x, delta = randn(12, 5), white(12, 3)
    assert_close(found("kron", x, delta), found("gram", x, delta))
    assert step == "plain" or not torch.allclose(found("gram", x, delta)["weight"], found("scalar", x, delta)["weight"])


@MATCHES
@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_lengths_that_are_set_do_not_depend_on_the_scale_of_the_loss(match: Any, factor: float) -> None:
    net, x, delta = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), randn(12, 5), randn(12, 3)
    for step in ("rms", "spectral"):
        expected, found = (changes(copy.deepcopy(net), x, f * delta, match=match, step=step) for f in (1.0, factor))
        assert_close(found, expected)


# ---- the equations, step by step


class Ladder:
    """BackMatch's equations on dense matrices, for a network of Linear and Conv2d layers and what has no parameters."""

    def __init__(self, net: nn.Module, *, match: str, step: str, lr: float = 0.05, **settings: Any) -> None:
        usual = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": False, "power": 0.5, "damping": 0.1}
        self.net, self.match, self.length, self.lr = copy.deepcopy(net), match, step, lr
        self.settings = usual | {"interval": 1, "beta": 0.9, "widest": 1024} | settings
        self.layers = {name: m for name, m in self.net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        self.buffers = {p: torch.zeros_like(p) for p in self.net.parameters()}
        self.averages: dict[tuple[str, str], Tensor] = {}
        self.powers: dict[tuple[str, str], Tensor] = {}
        self.steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}
        handles = [
            m.register_forward_hook(lambda m, args, out, name=name: calls[name].append((args[0].detach(), out)))
            for name, m in self.layers.items()
        ]
        z = self.net(x)
        for handle in handles:
            handle.remove()
        outputs = [out for seen in calls.values() for _, out in seen]
        params = [p for p in self.net.parameters() if p.requires_grad]
        top, *grads = torch.autograd.grad(F.cross_entropy(z, y), [z, *outputs, *params])
        deltas = iter(grads[: len(outputs)])
        gradient = dict(zip(params, grads[len(outputs) :], strict=True))
        for name, m in self.layers.items():
            if is_due(self.steps, self.settings["interval"]):
                rows, errors = zip(*((self.rows(m, seen), self.positions(next(deltas))) for seen, _ in calls[name]), strict=True)
                errors = torch.cat(errors)
                moment = torch.cat(rows).T @ torch.cat(rows) / len(z)
                if (taps := self.taps(m)) > 1:  # the nearest of all C ⊗ I
                    moment = moment.unflatten(0, (-1, taps)).unflatten(2, (-1, taps)).diagonal(dim1=1, dim2=3).mean(-1)
                self.follow((name, "A"), moment, full=self.match != "scalar")
                self.follow((name, "B"), errors.T @ errors / len(errors) / top.square().mean(), full=self.match == "kron")
            self.move(name, m, gradient)
        self.steps += 1

    def rows(self, m: nn.Module, x: Tensor) -> Tensor:
        if isinstance(m, nn.Conv2d):
            rows = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).transpose(1, 2).flatten(0, 1)
        else:
            rows = x.reshape(-1, x.shape[-1])
        return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1) if self.trains_bias(m) else rows

    def taps(self, m: Any) -> int:
        return math.prod(m.kernel_size) if isinstance(m, nn.Conv2d) and m.stride != m.kernel_size else 1

    def positions(self, delta: Tensor) -> Tensor:
        return delta.flatten(2).transpose(1, 2).flatten(0, 1) if delta.ndim == 4 else delta.reshape(-1, delta.shape[-1])

    def trains_bias(self, m: Any) -> bool:
        return m.bias is not None and m.bias.requires_grad

    def follow(self, key: tuple[str, str], measured: Tensor, *, full: bool) -> None:
        size, widest = len(measured), self.settings["widest"]
        eye = torch.eye(size, dtype=measured.dtype)
        width = math.ceil(size / math.ceil(size / widest))
        block = torch.arange(size) // width
        measured = measured * (block[:, None] == block) if full else measured.trace() / size * eye
        number = sum(is_due(step, self.settings["interval"]) for step in range(self.steps + 1))
        weight = max(1 / number, 1 - self.settings["beta"])
        self.averages[key] = (1 - weight) * self.averages.get(key, 0.0) + weight * measured
        values, vectors = torch.linalg.eigh(self.averages[key] + self.settings["damping"] * self.averages[key].trace() / size * eye)
        self.powers[key] = vectors @ torch.diag(values.pow(-self.settings["power"])) @ vectors.T

    def move(self, name: str, m: Any, gradient: dict[Tensor, Tensor]) -> None:
        mu, params = self.settings["momentum"], [m.weight, m.bias] if self.trains_bias(m) else [m.weight]
        columns = []
        for p in params:
            grad = gradient[p]
            self.buffers[p] = mu * self.buffers[p] + grad
            columns.append((grad + mu * self.buffers[p] if self.settings["nesterov"] else self.buffers[p]).reshape(len(p), -1))
        change = (
            self.powers[name, "B"] @ torch.cat(columns, dim=1) @ torch.kron(self.powers[name, "A"], torch.eye(self.taps(m), dtype=float64))
        )
        fan_in = m.weight[0].numel()
        if self.length == "spectral":
            change = orthogonalised([change[None]])[0][0]
        if self.length != "plain":
            change = change * 0.5 / fan_in**0.5 / change[:, :fan_in].square().mean().sqrt()
            if len(params) > 1:
                change[:, fan_in] *= (0.5 / change[:, fan_in].square().mean().sqrt()).clamp(max=1.0)
        for p, piece in zip(params, (change[:, :fan_in], change[:, fan_in:]), strict=False):
            sign = -1 if self.settings["maximize"] else 1
            p.data = (1 - self.lr * self.settings["weight_decay"]) * p.data - sign * self.lr * piece.reshape(p.shape)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()


def convolutional() -> nn.Module:
    taps = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Tanh(), nn.Conv2d(4, 3, (2, 3), (2, 1), dilation=(1, 1), bias=False)
    convs = *taps, nn.Tanh(), nn.Conv2d(3, 3, 1)
    return nn.Sequential(nn.Unflatten(1, (2, 4, 4)), *convs, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()


def alike() -> nn.Module:
    """Matrices of one shape: of layers that go together, [4, 4], and of convolutions with taps and without, [4, 18], which do not."""
    convs = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(2, 4, 3, 3, bias=False)
    linears = nn.Linear(4, 4, bias=False), nn.Linear(4, 18, bias=False), nn.Linear(18, 4, bias=False), nn.Linear(4, 4, bias=False)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Sequential(convs[0], *pooled), nn.Sequential(convs[1], *pooled), nn.Sequential(*linears)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x) + self.second(x)))

    return nn.Sequential(nn.Unflatten(1, (2, 3, 3)), Sum()).double()


class Recurring(nn.Module):
    """A layer called twice, and on several positions of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unflatten(1, (2, -1))
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(h)))).flatten(1))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "dense": (dense, 6),
    "convolutional": (convolutional, 32),
    "alike": (alike, 18),
    "recurring": (lambda: Recurring().double(), 8),
}


def batch(step: int, width: int, samples: int = 8, dtype: torch.dtype = float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, width, generator=generator, dtype=float64).to(dtype), torch.randint(0, 3, (samples,), generator=generator)


def follows_the_equations(net: nn.Module, width: int, steps: int = 6, **settings: Any) -> None:
    expected = Ladder(net, **settings)
    optimizer = BackMatch(net, **{"interval": 1, "lr": 0.05} | settings)
    for step in range(steps):
        x, y = batch(step, width)
        expected.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert_close(dict(net.named_parameters()), dict(expected.net.named_parameters()), rtol=1e-6, atol=1e-9)


@MATCHES
@LENGTHS
@pytest.mark.parametrize("kind", NETS)
def test_steps_follow_the_equations(kind: str, match: str, step: str) -> None:
    make, width = NETS[kind]
    follows_the_equations(make(), width, match=match, step=step)


SETTINGS: list[dict[str, Any]] = [
    *({"momentum": 0.0, "nesterov": False}, {"nesterov": False}, {"weight_decay": 0.0}, {"maximize": True}, {"power": 1.0, "lr": 1e-3}),
    *({"power": 0.0}, {"damping": 10.0}, {"damping": 1e-3}, {"beta": 0.5}, {"beta": 0.0}, {"interval": 3, "lr": 0.02}),
]


@LENGTHS
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_arrive_in_the_equations(settings: dict[str, Any], step: str) -> None:
    follows_the_equations(dense(), 6, steps=14 if "interval" in settings else 6, match="kron", step=step, **settings)


@MATCHES
@pytest.mark.parametrize("widest", [1, 2, 3, 4, 7])
def test_wide_moments_are_cut_into_blocks(match: str, widest: int) -> None:
    net = dense()
    follows_the_equations(net, 6, steps=3, match=match, step="rms", widest=widest)


def test_a_schedule_of_lr_and_momentum_arrives_in_the_equations() -> None:
    net = dense()
    expected, optimizer = Ladder(net, match="kron", step="rms"), BackMatch(net, match="kron", step="rms", interval=1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    for step in range(8):
        expected.lr, expected.settings["momentum"] = (optimizer.param_groups[0][name] for name in ("lr", "momentum"))
        expected.step(*batch(step, 6))
        train(net, optimizer, [step])
        scheduler.step()
        assert_close(dict(net.named_parameters()), dict(expected.net.named_parameters()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("match", "count"), [("scalar", 2), ("gram", 1 + 4 * 5 * 5), ("kron", 4 * 5 * 5 + 3 * 4 * 4)])
def test_state_grows_linearly_with_the_width(match: Any, count: int) -> None:
    net = nn.Linear(17, 12)
    optimizer = BackMatch(net, match=match, widest=5)
    net(torch.randn(4, 17)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[net.weight]
    assert sum(state[f"{side}_moment"].numel() for side in ("input", "output")) == count
    assert sum(state[f"{side}_power"].numel() for side in ("input", "output")) == count


def test_a_frozen_bias_has_no_part_in_the_match() -> None:
    net = dense()
    net[0].bias.requires_grad_(False)
    kept = net[0].bias.clone()
    follows_the_equations(net, 6, match="kron", step="plain")
    assert torch.equal(net[0].bias, kept)


@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_a_sample_of_rows_stands_for_all(rows: int) -> None:
    layer, x, delta = nn.Linear(5, 3, bias=False, dtype=float64), randn(8, 5), randn(8, 3)
    found = changes(layer, x, delta, match="gram", rows=rows, **BARE | {"damping": 0.1})["weight"]
    kept, errors = x[:: math.ceil(8 / rows)], delta[:: math.ceil(8 / rows)]
    a = kept.T @ kept / len(kept)
    b = errors.square().mean() / delta.square().mean() * 1.1
    expected = delta.T @ x / 8 @ torch.linalg.inv(a + 0.1 * a.trace() / 5 * torch.eye(5, dtype=float64)) / b
    assert_close(found, expected)


@MATCHES
@pytest.mark.parametrize("step", ["rms", "spectral"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 50.0])
def test_the_length_of_a_step_is_that_of_the_fan_in_whatever_the_weights(match: Any, step: Any, size: float) -> None:
    net = dense()
    with torch.no_grad():
        net[2].weight.mul_(size)
    before = {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim > 1}
    optimizer = BackMatch(net, 0.01, match=match, step=step, weight_decay=0.0)
    x, y = batch(0, 6)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    for name, old in before.items():
        w = 0.5 / old.shape[1] ** 0.5
        assert float((net.get_parameter(name).detach() - old).square().mean().sqrt()) == pytest.approx(0.01 * w, rel=1e-9)


@pytest.mark.parametrize("step", ["rms", "spectral"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e12])
def test_gradients_whose_squares_are_lost_in_float32_have_the_same_length(step: Any, scale: float) -> None:
    """Where B is lost as well, the direction is that of the gradient."""
    ends = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        layer, x = nn.Linear(5, 3), torch.randn(8, 5)
        before = layer.weight.detach().clone()
        optimizer = BackMatch(layer, 0.01, match="gram", step=step, weight_decay=0.0)
        layer(x).backward(factor * torch.randn(8, 3))
        optimizer.step()
        ends.append(layer.weight.detach() - before)
    assert_close(ends[1].square().mean(), ends[0].square().mean())
    if scale > 1e-30:
        assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-7)


@LENGTHS
@pytest.mark.parametrize("match", ["scalar", "kron"])
@pytest.mark.parametrize("width", [4, 200])
def test_a_layer_without_gradient_but_zeros_stays(match: Any, step: Any, width: int) -> None:
    """However large its weights are."""
    net = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 3))
    with torch.no_grad():
        net[0].weight.mul_(100.0)
        net[1].weight.zero_()
    before = net[0].weight.detach().clone()
    optimizer = BackMatch(net, match=match, step=step, weight_decay=0.0)
    net(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert net[1].weight.isfinite().all()


@pytest.mark.parametrize("step", ["rms", "spectral"])
@pytest.mark.parametrize("width", [4, 200])
def test_a_layer_whose_inputs_are_zeros_moves_its_bias_by_the_length_of_a_weight(step: Any, width: int) -> None:
    layer = nn.Linear(5, width, dtype=float64)
    found = changes(layer, torch.zeros(8, 5, dtype=float64), randn(8, width), step=step, weight_decay=0.0)
    assert_close(found["weight"], torch.zeros_like(layer.weight))
    assert_close(found["bias"].square().mean().sqrt(), torch.tensor(0.5 / 5**0.5, dtype=float64))


@pytest.mark.parametrize("step", ["rms", "spectral"])
@pytest.mark.parametrize(("width", "samples"), [(1, 8), (4, 8), (200, 8)])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-6, 1e-30])
def test_small_inputs_leave_weights_their_length_and_bound_that_of_the_bias(step: Any, width: int, samples: int, size: float) -> None:
    layer = nn.Linear(5, width, dtype=float64)
    found = changes(layer, size * randn(samples, 5), 1.0 + randn(samples, width), step=step, weight_decay=0.0)
    weight, bias = (found[name].square().mean().sqrt() for name in ("weight", "bias"))
    assert_close(weight, torch.tensor(0.5 / 5**0.5, dtype=float64))
    assert bias <= 0.5 * (1.0 + 1e-9)
    assert size == 1.0 or bias > 0.1


def test_a_checkpoint_of_other_moments_is_taken_up_as_if_nothing_had_been_measured() -> None:
    """As of a convolution when A was over patches, and its bias a row of it."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    optimizer = BackMatch(net)
    F.cross_entropy(net(torch.ones(4, 2, 4, 4)), torch.arange(4) % 3).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] |= {"input_moment": torch.eye(19)[None], "input_power": 2.0 * torch.eye(19)[None]}
    saved["state"][1] = {"momentum_buffer": torch.full((4,), 1e6), "pace": torch.ones(())}
    optimizer.load_state_dict(saved)
    optimizer.detach()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = net[0].bias.detach().clone()
    optimizer.step()
    assert_close(net[0].bias, before, rtol=0.01, atol=0.0)
    state = optimizer.state[net[0].weight]
    assert_close(state["input_power"], torch.eye(2)[None])
    assert_close(state["output_power"], torch.eye(4)[None])


def test_what_is_not_matched_follows_its_paces_at_a_tenth_of_lr() -> None:
    net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    optimizer = BackMatch(net, 0.04)
    rest = [net[1].weight, net[1].bias]
    expected = Reference(rest, [None, None])
    for step in range(12):
        x, y = batch(step, 6)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        (group,) = optimizer.state_dict()["param_groups"]
        expected.step([p.grad.clone() for p in rest if p.grad is not None], [{**group, "lr": 0.004, "params": [0, 1]}])
        optimizer.step()
        assert_close(rest, expected.params)


# ---- which parameters follow which rule


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        self.conv1 = nn.Conv1d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(2, 2, 1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.shift = nn.Parameter(torch.zeros(4))
        self.shared = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.shared.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.linear(self.embedding(tokens))
        h = self.conv1(h.transpose(1, 2)).transpose(1, 2)
        h = self.grouped(self.conv2(h[:, None])).mean(1)
        h, _ = self.rnn(self.norm(h))
        return self.head(self.again(self.shared(self.normed(h + self.shift))))


def test_rules_say_what_each_parameter_follows() -> None:
    net = Everything()
    optimizer = BackMatch(net, match="gram", step="rms")
    matched = {"linear.weight", "linear.bias", "conv1.weight", "conv2.weight"}
    expected = {name: "gram, rms" if name in matched else "a pace read off its gradients, at lr / 10" for name, _ in net.named_parameters()}
    assert optimizer.rules() == expected
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(3):
        tokens = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in net.named_parameters())
    measured = {name for name, p in net.named_parameters() if "input_moment" in optimizer.state[p]}
    assert measured == {name for name in matched if name.endswith("weight")}
    assert optimizer.responses().keys() == expected.keys() - matched


def train(net: nn.Module, optimizer: BackMatch, steps: Any, width: int = 6, *, call: Callable[[Tensor], Tensor] | None = None) -> None:
    for step in steps:
        x, y = batch(step, width, dtype=next(net.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy((call or net)(x), y).backward()
        optimizer.step()


def test_weight_and_bias_may_be_of_different_groups() -> None:
    """They are matched together; each moves by its group's lr."""
    net, plain = dense(), dense()
    plain.load_state_dict(net.state_dict())
    biases, weights = ([p for p in net.parameters() if p.ndim == d] for d in (1, 2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, BackMatch([{"params": biases, "lr": 0.06}, {"params": weights}], 0.02, model=net, weight_decay=0.0), range(1))
    train(plain, BackMatch(plain, 0.02, weight_decay=0.0), range(1))
    for name, p in net.named_parameters():
        factor = 3.0 if p.ndim == 1 else 1.0
        assert_close(p - before[name], factor * (plain.get_parameter(name) - before[name]))


@LENGTHS
def test_a_bias_is_trained_beside_a_frozen_weight(step: Any) -> None:
    net = dense()
    optimizer = BackMatch(net.parameters(), model=net, step=step)
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, range(3))
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[0].bias, before["0.bias"])
    assert (net[0].bias - before["0.bias"]).abs().max() < 1.0


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.side(h)) if self.on else h)


def test_a_layer_that_a_step_does_not_use_stays_as_it_is() -> None:
    net = Switched().double()
    optimizer = BackMatch(net)
    for step in range(6):
        net.on = step % 2 == 0
        before = copy.deepcopy([net.side.state_dict(), optimizer.state[net.side.weight]])
        train(net, optimizer, range(step, step + 1))
        now = [net.side.state_dict(), optimizer.state[net.side.weight]]
        if net.on:
            assert not torch.equal(now[0]["weight"], before[0]["weight"])
            assert now[1]["measurements"] == step // 2 + 1
        else:
            assert_close(now, before, rtol=0.0, atol=0.0)


def test_a_layer_added_later_is_matched() -> None:
    net = dense()
    optimizer = BackMatch(net[2:].parameters(), model=net)
    train(net, optimizer, range(2))
    optimizer.add_param_group({"params": net[0].parameters()})
    assert set(optimizer.rules().values()) == {"kron, spectral"}
    train(net, optimizer, range(2, 5))
    assert [int(optimizer.state[net[i].weight]["measurements"]) for i in (0, 2, 4)] == [3, 5, 5]
    other, theirs = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(5, 9))
    train(other, theirs, range(5, 9))
    assert_same((net, optimizer), (other, theirs))


# ---- loops

Run = tuple[nn.Module, BackMatch]


def mixed(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Layers that are matched, and one that is not; a ReLU in place."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def run(net: nn.Module, steps: Any = range(7), *, around: Callable[[nn.Module], Any] | None = None, **settings: Any) -> Run:
    optimizer = BackMatch(net, **{"interval": 3} | settings)
    train(net, optimizer, steps, call=None if around is None else around(net))
    return net, optimizer


def assert_same(ours: Run, theirs: Run, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    assert any("input_moment" in state for state in theirs[1].state.values())
    assert_close(dict(ours[0].state_dict()), dict(theirs[0].state_dict()), **tolerance)
    assert_close(ours[1].state_dict()["state"], theirs[1].state_dict()["state"], **tolerance)


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@MATCHES
@LENGTHS
def test_micro_batches_are_one_batch(match: Any, step: Any) -> None:
    runs = []
    for parts in (1, 4):
        net = mixed(float64)
        optimizer = BackMatch(net, match=match, step=step, interval=1)
        for i in range(5):
            x, y = batch(i, 6)
            optimizer.zero_grad()
            for part in range(parts):
                (F.cross_entropy(net(x[part::parts]), y[part::parts]) / parts).backward()
            optimizer.step()
        runs.append((net, optimizer))
    # The δ of a micro-batch is 1/4 of its loss's, as the whole batch's is 1/4 of that.
    assert_same(*runs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("step", ["plain", "spectral"])
@pytest.mark.parametrize("whole", [False, True], ids=["within", "around"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, whole: bool, step: Any) -> None:
    def around(net: nn.Module) -> Callable[[Tensor], Tensor]:
        if whole:
            return lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)
        return net

    class Checkpointed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            first, *inner, last = self
            return last(checkpoint(nn.Sequential(*inner), first(input), use_reentrant=reentrant))

    net: nn.Module = mixed()
    assert_same(run(net if whole else Checkpointed(*net), around=around, step=step), run(mixed(), step=step))  # type: ignore[misc]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("around", ["wrapped", "in place"])
@pytest.mark.parametrize(("backend", "net"), [("eager", "mixed"), ("aot_eager", "mixed"), ("aot_eager", "convolutional")])
def test_a_compiled_model_is_graphs_that_last(backend: str, net: str, around: str, checkpointed: bool) -> None:
    """One that measures and one that does not, neither with a break: ``fullgraph`` refuses those. The hook of a model that is compiled
    in place stays outside, and measures in one of its own."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    counts: list[int] = []

    def compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
        if around == "in place":
            net.compile(backend=counter, fullgraph=True)
            called: Callable[[Tensor], Tensor] = net
        elif checkpointed:
            called = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), backend=counter, fullgraph=True)
        else:
            called = torch.compile(net, backend=counter, fullgraph=True)

        def call(x: Tensor) -> Tensor:
            counts.append(counter.frame_count)
            return checkpoint(called, x, use_reentrant=False) if checkpointed and around == "in place" else called(x)  # type: ignore[no-any-return]

        return call

    def make() -> nn.Module:
        torch.manual_seed(0)
        return mixed() if net == "mixed" else nn.Sequential(nn.Linear(6, 32), convolutional().float())

    steps = range(30)
    assert_same(run(make(), steps, around=compiled), run(make(), steps), rtol=1e-4, atol=1e-6)
    assert counts[-1] == counts[12] == (3 if around == "in place" else 2)


def test_a_graph_that_outlives_its_optimizer_tells_nobody() -> None:
    torch._dynamo.reset()
    before, net = len(listener._listeners), mixed()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    optimizer = BackMatch(net)
    x, y = batch(0, 6, dtype=torch.float32)
    loss = F.cross_entropy(compiled(x), y)
    assert len(listener._listeners) == before + 4  # three layers, and the model
    del optimizer
    assert len(listener._listeners) == before
    loss.backward()
    found = [p.grad for p in net.parameters()]
    other = mixed()
    F.cross_entropy(other(x), y).backward()
    assert_close(found, [p.grad for p in other.parameters()])


class Outputs(nn.Module):
    """Gives its logits back as some networks do; twice, where a loss reads them at two places."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = mixed(), kind

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        return {"dict": {"logits": z, "hidden": x}, "tuple": (z, x), "twice": (z, z), "two": (z[:, :1], z[:, 1:])}[self.kind]


def logits(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["logits"]  # type: ignore[no-any-return]
    first, second = output
    return torch.cat(output, dim=1) if len(first[0]) == 1 else first + second[:, :3]


@pytest.mark.parametrize("kind", ["dict", "tuple", "twice", "two"])
def test_a_compiled_model_may_put_out_what_others_do(kind: str) -> None:
    torch._dynamo.reset()

    def compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
        called = torch.compile(net, backend="aot_eager", fullgraph=True)
        return lambda x: logits(called(x))

    def plain(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: logits(net(x))

    ours, theirs = (run(Outputs(kind), around=around, step="plain") for around in (compiled, plain))
    assert_same(ours, theirs, rtol=1e-4, atol=1e-6)


class Uncalled(nn.Module):
    """Uses of a network of which its own output, or the mode of the whole, says nothing; to be called as it says itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = mixed(float64), kind

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.net(x)
        loss = F.cross_entropy(z, y)
        return {"loss": loss, "logits": z.detach(), "tuple": (z, loss)}[self.kind] if self.kind in ("loss", "tuple") else loss

    def loss(self, x: Tensor, y: Tensor, called: Callable[..., Any]) -> Tensor:
        if self.kind == "tuple":
            return called(x, y)[1]  # type: ignore[no-any-return]
        if self.kind == "parts":
            return F.cross_entropy(self.net[3:](self.net[:3](x)), y)
        if self.kind == "a head in training":
            self.eval()
            self.net.train()
        return called(x, y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("kind", ["loss", "tuple", "parts", "a head in training"])
@LENGTHS
def test_layers_are_measured_where_the_loss_is_not_of_the_output(kind: str, compiled: bool, step: Any) -> None:
    """Lengths that are set need no unit of δ; the first step, before measurements are averaged, is that of the loss of an output."""
    torch._dynamo.reset()
    net, plain = Uncalled(kind), mixed(float64)
    plain.load_state_dict(net.net.state_dict())
    optimizer = BackMatch(net, step=step)
    called = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    x, y = batch(0, 6)
    net.loss(x, y, called).backward()
    if step == "plain" and not (kind == "tuple" and not compiled):
        with pytest.warns(UserWarning, match="no gradient come back to the model's output"):
            optimizer.step()
        assert all(state["measurements"] == 0 for state in optimizer.state.values() if "input_moment" in state)
        return
    optimizer.step()
    train(plain, BackMatch(plain, step=step), range(1))
    assert [int(state["measurements"]) for state in optimizer.state.values() if "input_moment" in state] == [1, 1, 1]
    if step != "plain":  # an output of several tensors has another unit
        assert_close(dict(net.net.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_trained_in_evaluation_mode_is_measured(frozen: bool) -> None:
    """As those beside a norm whose statistics are to stay."""

    def around(net: nn.Module) -> Callable[[Tensor], Tensor]:
        net[:4].eval()  # type: ignore[index]
        return net

    assert_same(run(mixed(), around=around if frozen else None), run(mixed()))


@pytest.mark.filterwarnings("ignore:.*sparse")
@pytest.mark.parametrize("how", ["by its weight", "sparse", "nested"])
def test_a_layer_that_is_not_seen_is_named_once(how: str) -> None:
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            if how == "by its weight":
                return self.last(F.linear(x, self.first.weight, self.first.bias))  # type: ignore[no-any-return]
            if how == "nested":
                nested = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
                return self.last(self.first(nested).values())  # type: ignore[no-any-return]
            return self.last(self.first(x.to_sparse()))  # type: ignore[no-any-return]

    net = Bypassed()
    optimizer = BackMatch(net, interval=1)
    with pytest.warns(UserWarning, match="saw no sample go through first, which have") as caught:
        train(net, optimizer, range(3))
    assert sum("saw no sample" in str(warning.message) for warning in caught) == 1
    assert optimizer.state[net.first.weight]["measurements"] == 0
    assert optimizer.state[net.last.weight]["measurements"] == 3


def test_a_layer_pruned_on_the_way_follows_its_pace_until_it_is_whole_again() -> None:
    net = mixed()
    optimizer = BackMatch(net, interval=1)
    train(net, optimizer, range(3))
    prune.l1_unstructured(net[0], "weight", 0.5)
    original = net[0].weight_orig
    train(net, optimizer, range(3, 6))
    assert optimizer.state[original]["measurements"] == 3
    assert not original.grad[net[0].weight_mask == 0].any()
    assert "response" in optimizer.state[original]
    prune.remove(net[0], "weight")
    train(net, optimizer, range(6, 8))
    assert net[0].weight is original
    assert optimizer.state[original]["measurements"] == 5
    assert "response" not in optimizer.state[original]


def test_an_output_that_another_hook_has_replaced_is_passed_over() -> None:
    net = mixed()
    net[0].register_forward_hook(lambda module, args, output: (output,))
    net[1].register_forward_pre_hook(lambda module, args: args[0])
    optimizer = BackMatch(net, interval=1)
    with pytest.warns(UserWarning, match="saw no sample go through 0, which have"):
        train(net, optimizer, range(2))


def test_a_checkpoint_of_float32_goes_on_in_float64() -> None:
    net, optimizer = run(mixed(), range(5))
    wider = copy.deepcopy(net).double()
    theirs = BackMatch(wider, interval=3)
    theirs.load_state_dict(optimizer.state_dict())
    train(wider, theirs, range(5, 9))
    train(net, optimizer, range(5, 9))
    assert_close({name: p.float() for name, p in wider.named_parameters()}, dict(net.named_parameters()), rtol=1e-3, atol=1e-5)
    assert all(state["momentum_buffer"].dtype == float64 for state in theirs.state.values())


def test_momentum_of_paced_gradients_is_not_taken_for_that_of_gradients() -> None:
    """A checkpoint of BackMatchSGD starts momentum afresh where layers are matched."""
    net, fresh = mixed(), mixed()
    sgd = BackMatchSGD(net)
    train(net, sgd, range(3))  # type: ignore[arg-type]
    fresh.load_state_dict(net.state_dict())
    optimizer, theirs = BackMatch(net), BackMatch(fresh)
    optimizer.load_state_dict(sgd.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]})
    train(net, optimizer, range(1))
    train(fresh, theirs, range(1))
    for name in ("0.weight", "3.weight", "5.bias"):
        assert_close(net.get_parameter(name), fresh.get_parameter(name))


@pytest.mark.parametrize("settings", [{}, {"decay_floor": 0.0}, {"max_stretch": math.inf}], ids=str)
def test_checkpoints_of_the_other_optimizer_are_refused(settings: dict[str, Any]) -> None:
    """Momenta are of gradients in one and of paced gradients in the other: taken for each other, they would move weights a thousandfold."""
    net, matched = run(mixed(), range(3))
    sgd = BackMatchSGD(net, **settings)
    train(net, sgd, range(3))  # type: ignore[arg-type]
    for optimizer, other in ((matched, sgd), (sgd, matched)):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=f"so it is not one of {type(optimizer).__name__}. Load it into the optimizer that saved it"):
            optimizer.load_state_dict(other.state_dict())
        assert_close(optimizer.state_dict()["state"], before["state"], rtol=0.0, atol=0.0)


def test_a_floor_of_decay_and_a_limit_on_singular_values_are_refused() -> None:
    net = mixed()
    with pytest.raises(ValueError, match=r"Invalid decay_floor: 0.7. BackMatch decays all weights alike: leave it out."):
        BackMatch([{"params": list(net.parameters()), "decay_floor": 0.7}], model=net)
    with pytest.raises(ValueError, match=r"Invalid max_stretch: 0.1. BackMatch has step='spectral' for that: leave it out."):
        BackMatch([{"params": list(net.parameters()), "max_stretch": 0.1}], model=net)


def test_all_state_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is saved, copied and let go of a tensor at a time; roots by products, as on a GPU, come in stacks."""
    monkeypatch.setattr("backmatch.kron._by_products", lambda moment, *_: moment.ndim > 0)
    net = mixed()
    optimizer = BackMatch(net)
    train(net, optimizer, range(3))
    for state in optimizer.state.values():
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_moments_of_another_device_than_the_output_are_put_together() -> None:
    """Where a network lies on several; devices are faked, values are not looked at."""
    net = nn.Linear(4, 3)
    optimizer = BackMatch(net, match="scalar")  # no eigenvalues, which fake devices do not have
    names = [f"{side}_{what}" for side in ("input", "output") for what in ("moment", "power")]
    with FakeTensorMode():
        for here, there in (("cuda:0", "cuda:1"), ("cuda:0", "cpu"), ("cpu", "cuda:0")):
            zero = torch.zeros((), device=here)
            optimizer.state[net.weight] = dict.fromkeys([*names, "measurements"], zero)
            top = GradMoment(predictions=8)
            for device in (there, here):  # an output of two tensors
                top.add(torch.zeros(8, 3, device=device))
            moments = Moments(inputs=zero, outputs=zero, count=8, positions=8)
            optimizer._average([optimizer._matched[""]], {"": moments}, top, zero.bool())
            assert all(value.device == torch.device(here) for value in optimizer.state[net.weight].values())


def test_a_hidden_output_is_told_of_where_lengths_are_relative_to_it() -> None:
    class Opaque(nn.Module):
        """Its output is hidden in an object of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.net = mixed()

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.net(x))

    net = Opaque()
    optimizer = BackMatch(net, step="plain")
    x, y = batch(0, 6, dtype=torch.float32)
    F.cross_entropy(net(x).logits, y).backward()
    with pytest.warns(UserWarning, match="no gradient come back to the model's output"):
        optimizer.step()


def test_a_step_under_autocast_is_the_step() -> None:
    runs = []
    for enabled in (False, True):
        net = mixed()
        optimizer = BackMatch(net, interval=1)
        for i in range(4):
            x, y = batch(i, 6, dtype=torch.float32)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        runs.append((net, optimizer))
    assert_same(*runs)


def test_a_forward_without_a_backward_changes_nothing() -> None:
    """In evaluation, without gradients, or in training but thrown away."""

    def around(net: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            net.eval()
            net(x + 1.0)
            net(x + 1.0).sum().backward()
            net.train()
            with torch.no_grad():
                net(x + 2.0)
            net(x + 3.0)
            net.zero_grad()
            return net(x)

        return call

    assert_same(run(mixed(), around=around, step="plain"), run(mixed(), step="plain"))


def test_gradients_in_batches_are_not_measured() -> None:
    """A Jacobian between forward and backward, by autograd's own vmap."""

    def around(net: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            z = net(x)
            torch.autograd.grad(z, net[5].bias, torch.eye(z.numel()).reshape(-1, *z.shape), is_grads_batched=True, retain_graph=True)  # type: ignore[index, union-attr]
            return z

        return call

    assert_same(run(mixed(), around=around), run(mixed()))


@pytest.mark.parametrize("step", ["plain", "spectral"])
def test_the_scale_of_a_grad_scaler_does_not_matter(step: Any) -> None:
    """δ is scaled and gradients are not: B is relative to the output's."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    net = mixed()
    optimizer = BackMatch(net, interval=3, step=step)
    for i in range(7):
        x, y = batch(i, 6, dtype=torch.float32)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same((net, optimizer), run(mixed(), step=step), rtol=1e-5, atol=1e-6)


def test_autocast_measures_nearly_the_same() -> None:
    def around(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.autocast("cpu", torch.bfloat16)(net)(x).float()

    ours, theirs = (run(mixed(), range(4), around=each, step="rms", lr=0.01) for each in (around, None))
    for p, q in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert (p - q).norm() < 0.05 * 4 * 0.01 * q.norm().clamp_min(1.0)
    for p, q in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        mine, reference = ours[1].state[p], theirs[1].state[q]
        for name in ("input_moment", "output_moment"):
            if name in reference:
                assert mine[name].dtype == torch.float32
                assert (mine[name] - reference[name]).norm() < 0.03 * reference[name].norm()


@pytest.mark.parametrize("given", ["parameters", "named_parameters"])
def test_parameters_with_their_model_equal_the_model(given: str) -> None:
    net = mixed()
    optimizer = BackMatch(getattr(net, given)(), model=net, interval=3)
    train(net, optimizer, range(7))
    assert_same((net, optimizer), run(mixed()))


def test_a_tensor_as_lr_is_the_number() -> None:
    assert_same(run(mixed(float64), lr=torch.tensor([0.02], dtype=float64)), run(mixed(float64), lr=0.02), rtol=1e-10, atol=1e-13)


# ---- checkpoints and copies


@MATCHES
@pytest.mark.parametrize("stop", [1, 4, 9, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumes_bit_for_bit(match: Any, stop: int, dtype: torch.dtype) -> None:
    """Measured are steps 0 to 8 and 9: stops lie before and between measurements of interval 3."""
    net, optimizer = run(mixed(dtype), range(stop), match=match)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = mixed(dtype)
    again.load_state_dict(weights)
    resumed = BackMatch(again, lr=0.5, interval=3, match=match)
    resumed.load_state_dict(state)
    train(net, optimizer, range(stop, 15))
    train(again, resumed, range(stop, 15))
    assert_same((again, resumed), (net, optimizer))
    for entry in resumed.state.values():
        assert {value.dtype for name, value in entry.items() if name != "momentum_buffer"} == {torch.float32}


@pytest.mark.parametrize("stop", [0, 2, 10])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_step_on_identically(stop: int, copied: Callable[[Any], Any]) -> None:
    net, optimizer = run(mixed(), range(stop))
    other, theirs = copied((net, optimizer))
    assert theirs.rules() == optimizer.rules()
    train(net, optimizer, range(stop, stop + 6))
    before = copy.deepcopy(net.state_dict())
    train(other, theirs, range(stop, stop + 6))
    assert_close(dict(net.state_dict()), dict(before), rtol=0.0, atol=0.0)
    assert_same((other, theirs), (net, optimizer))


def test_a_state_of_another_rung_is_measured_anew() -> None:
    net, optimizer = run(mixed(), range(4), match="gram", widest=3)
    resumed = BackMatch(net, match="kron", widest=5)
    resumed.load_state_dict(optimizer.state_dict())
    train(net, resumed, range(4, 6))
    assert {int(state["measurements"]) for state in resumed.state.values() if "input_moment" in state} == {2}


def test_hooks_go_with_the_optimizer() -> None:
    net = mixed()
    assert hooks(net) == 0
    optimizer = BackMatch(net)
    train(net, optimizer, range(3))
    assert hooks(net) == 4  # three layers, and the model
    optimizer.detach()
    assert hooks(net) == 0
    moments = copy.deepcopy([optimizer.state[net[i].weight]["input_moment"] for i in (0, 3, 5)])
    other, theirs = copy.deepcopy((net, optimizer))
    for each, its in ((net, optimizer), (other, theirs)):
        train(each, its, range(3, 7))
        assert_close([its.state[each[i].weight]["input_moment"] for i in (0, 3, 5)], moments, rtol=0.0, atol=0.0)
    assert_same((other, theirs), (net, optimizer))
    another = BackMatch(net)
    train(net, another, range(2))
    del another
    assert hooks(net) == 0  # at once, without a search for cycles


# ---- what is not finite


@contextmanager
def spoilt(net: nn.Module, how: str) -> Iterator[Callable[[Tensor], Tensor]]:
    def call(x: Tensor) -> Tensor:
        x = x.clone()
        if how == "input":
            x[2, 1] = math.nan
        return net(x) * (math.inf if how == "loss" else 1.0)

    yield call


@pytest.mark.filterwarnings("ignore:BackMatch skipped")
@MATCHES
@LENGTHS
@pytest.mark.parametrize("how", ["loss", "input"])
def test_a_step_that_is_not_finite_leaves_no_trace(how: str, match: Any, step: Any) -> None:
    """Not even as the very first: the run goes on as if it had not been."""
    net, other = mixed(), mixed()
    optimizer, expected = (BackMatch(each, interval=1, match=match, step=step) for each in (net, other))
    for i in range(6):
        if i in (0, 3):
            before = copy.deepcopy(net.state_dict())
            with spoilt(net, how) as call:
                train(net, optimizer, [i], call=call)
            assert_close(dict(net.state_dict()), dict(before), rtol=0.0, atol=0.0)
            for state in optimizer.state.values():
                assert all(value.isfinite().all() for value in state.values())
        else:
            train(net, optimizer, [i])
            train(other, expected, [i])
    assert optimizer.skipped_steps == 2
    assert_same((net, optimizer), (other, expected))


@pytest.mark.filterwarnings("ignore:BackMatch skipped")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30], ids=["nan", "inf", "square overflows"])
def test_a_gradient_spoilt_after_the_backward_moves_nothing(bad: float) -> None:
    net, optimizer = run(mixed(), range(3))
    x, y = batch(3, 6, dtype=torch.float32)
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    net[3].weight.grad[0, 0] = bad  # type: ignore[index, union-attr]
    momenta = [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
    before = copy.deepcopy([net.state_dict(), momenta])
    optimizer.step()
    assert_close([net.state_dict(), momenta], before, rtol=0.0, atol=0.0)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def test_layers_without_elements_are_passed_over() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 0), nn.Linear(0, 3)).double()
    optimizer = BackMatch(net)
    assert optimizer.rules()["0.weight"] == "kron, spectral"
    assert optimizer.rules()["1.weight"].startswith("a pace")
    for _ in range(2):
        optimizer.zero_grad()
        net(randn(4, 5)).sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:BackMatch saw no sample")
def test_an_empty_batch_leaves_moments_as_they_are() -> None:
    net = nn.Linear(5, 3).double()
    optimizer = BackMatch(net, interval=1)
    for samples in (4, 0):
        optimizer.zero_grad()
        net(randn(samples, 5)).sum().backward()
        before = {key: value.clone() for key, value in optimizer.state[net.weight].items() if key.endswith("moment")}
        optimizer.step()
    assert before
    assert all(torch.equal(optimizer.state[net.weight][key], value) for key, value in before.items())


def test_a_model_that_is_not_called_is_told_of() -> None:
    net = mixed()
    optimizer = BackMatch(net)
    train(net, optimizer, range(2))
    with pytest.warns(UserWarning, match="BackMatch saw no sample go through its layers in training mode"):
        train(net.eval(), optimizer, [2])


# ---- bad settings


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"match": "full"}, ValueError, "Invalid match: 'full'. Must be one of scalar, gram, kron."),
        ({"step": "muon"}, ValueError, "Invalid step: 'muon'. Must be one of plain, rms, spectral."),
        ({"power": 1.5}, ValueError, r"Invalid power: 1.5. Must be in \[0.0, 1.0\]."),
        ({"power": math.nan}, ValueError, "Invalid power: nan"),
        ({"damping": -0.1}, ValueError, r"Invalid damping: -0.1. Must be in \[0.0, inf\)."),
        ({"damping": "0.1"}, TypeError, r"Invalid damping: '0.1' \(str\). Must be a number"),
        ({"rows": 0}, ValueError, r"Invalid rows: 0. Must be in \[1, inf\)."),
        ({"rows": 2.5}, TypeError, "Invalid rows: 2.5. Must be a whole number."),
        ({"widest": 0}, ValueError, "Invalid widest: 0"),
        ({"widest": 10.0}, TypeError, "Invalid widest: 10.0. Must be a whole number."),
        ({"interval": 0}, ValueError, "Invalid interval: 0"),
        ({"beta": 1.0}, ValueError, "Invalid beta: 1.0"),
        ({"lr": -1.0}, ValueError, "Invalid lr: -1.0"),
        ({"momentum": 0.0}, ValueError, "Invalid nesterov: True with momentum 0.0"),
        ({"estimator": "probe"}, TypeError, "estimator"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    net = mixed()
    with pytest.raises(error, match=text):
        BackMatch(net, **settings)
    assert hooks(net) == 0


def test_parameters_alone_are_refused() -> None:
    with pytest.raises(TypeError, match="Invalid model: None. BackMatch measures layers: give the network first, or as model=."):
        BackMatch(mixed().parameters())


def test_climbing_without_a_layer_to_match() -> None:
    p = nn.LayerNorm(3)
    optimizer = BackMatch(p, lr=0.1, maximize=True)
    p(randn(4, 3).float()).square().sum().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in p.parameters())
    assert not torch.equal(p.weight, torch.ones(3))
