"""Responses read off the gradients, and the steps they make, against the stated equations in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from backmatch import BackMatchSGD
from backmatch.cli.models import build_model
from backmatch.cli.optimizers import state_bytes
from tests.reference import Reference

UNIT_DIMS = {"0.weight": 0, "3.weight": 1, "5.weight": 0}
"""Of ``network``; its other parameters are vectors."""

PLAIN: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Output units in the first dimension and in the second."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.ConvTranspose2d(4, 5, 2), nn.Flatten(), nn.Linear(45, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64, samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, 2, 4, 4, generator=generator).to(dtype), torch.randint(0, 3, (samples,), generator=generator)


def backward(net: nn.Module, step: int, *, scale: float = 1.0) -> None:
    x, y = batch(step, next(net.parameters()).dtype)
    net.zero_grad()
    (scale * nn.functional.cross_entropy(net(x), y)).backward()


def grads(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def reference(net: nn.Module, **settings: Any) -> Reference:
    return Reference(list(net.parameters()), [UNIT_DIMS.get(name) for name, _ in net.named_parameters()], **settings)


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def mean_square(value: Tensor, unit_dim: int | None) -> Tensor:
    return value.square().mean(dim=[d for d in range(value.ndim) if d != unit_dim], keepdim=unit_dim is not None)


@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_responses_are_the_plain_mean_of_mean_square_gradients_and_a_moving_average_later(per: str) -> None:
    net, beta, steps = network(), 0.75, 9
    optimizer = BackMatchSGD(net, 0.0, beta=beta, per=per)  # type: ignore[arg-type]
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in net.named_parameters()}
    for step in range(steps):
        backward(net, step)
        for name, p in net.named_parameters():
            assert p.grad is not None
            seen[name].append(mean_square(p.grad, UNIT_DIMS.get(name) if per == "unit" else None))
        optimizer.step()
        # The first 1/(1 − beta) weigh alike; then each is forgotten by a factor beta per step.
        alike = min(step + 1, 4)
        weights = [1 / alike] * alike + [1 - beta] * (step + 1 - alike)
        weights = [weight * beta ** min(step - k, step + 1 - alike) for k, weight in enumerate(weights)]
        assert sum(weights) == pytest.approx(1.0)
        expected = {name: sum(w * s for w, s in zip(weights, squares, strict=True)) for name, squares in seen.items()}
        assert_close(optimizer.responses(), expected)
    assert {float(state["measurements"]) for state in optimizer.state.values()} == {steps}


SETTINGS: list[dict[str, Any]] = [
    *({}, {"nesterov": False}, {"momentum": 0.0, "nesterov": False}, {"maximize": True}, {"foreach": True}, {"beta": 0.0}),
    *({"power": 0.25}, {"power": 1.0}, {"relative": False}, {"power": 0.0}, {"bound": 1.5}, {"max_change": 0.003}, {"interval": 1}),
]


@pytest.mark.parametrize("per", ["tensor", "unit"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_follow_the_equations(settings: dict[str, Any], per: str) -> None:
    net = network()
    optimizer = BackMatchSGD(net, 0.01, weight_decay=0.02, per=per, **settings)  # type: ignore[arg-type]
    chosen = {name: settings[name] for name in ("beta", "power", "relative", "bound") if name in settings}
    expected = reference(net, per=per, **chosen)
    for step in range(12):
        backward(net, step)
        expected.step(grads(net), optimizer.state_dict()["param_groups"])
        optimizer.step()
        assert_close(list(optimizer.responses().values()), expected.responses)
        assert_close(list(optimizer.paces().values()), expected.paces)
        assert_close(values(net), expected.params)


@pytest.mark.parametrize("model", [False, True])
def test_without_a_model_the_first_dimension_of_every_matrix_counts_its_units(model: bool) -> None:
    net = network()
    optimizer = BackMatchSGD(net.parameters(), model=net if model else None)
    backward(net, 0)
    expected = {name: mean_square(g, UNIT_DIMS.get(name)) for (name, _), g in zip(net.named_parameters(), grads(net), strict=True)}
    if not model:
        expected["3.weight"] = mean_square(grads(net)[4], 0)
    optimizer.step()
    assert_close(list(optimizer.responses().values()), list(expected.values()))


@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_every_unit_changes_by_lr_in_the_first_step(per: str) -> None:
    """The relative change r·g/w has a mean square of exactly 1, where neither the bound nor the floor of dead units acts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    dims = [0 if p.ndim > 1 else None for p in net.parameters()]
    before, sizes = values(net), Reference(list(net.parameters()), dims, per=per).sizes()
    optimizer = BackMatchSGD(net, 0.01, bound=1e9, per=per, max_stretch=math.inf, **PLAIN)  # type: ignore[arg-type]
    net(torch.randn(16, 6, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    for response, size in zip(optimizer.responses().values(), sizes, strict=True):
        assert (size.square() * response > 0.01 * (size.square() * response).mean()).all()
    for old, new, size, dim in zip(before, values(net), sizes, dims, strict=True):
        change = mean_square((new - old) / (0.01 * size), dim if per == "unit" else None)
        assert_close(change, torch.ones_like(change), rtol=1e-9, atol=0.0)


def test_a_head_that_starts_at_zero_moves_by_lr_though_nothing_below_has_a_gradient() -> None:
    """The median pace was that of the layers without a gradient, 1e17, and the head followed to within the bound."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    nn.init.zeros_(net[4].weight)  # type: ignore[arg-type]
    nn.init.zeros_(net[4].bias)  # type: ignore[arg-type]
    optimizer = BackMatchSGD(net, 0.01, **PLAIN)
    losses = []
    for _ in range(3):
        net.zero_grad()
        loss = (net(torch.ones(16, 6)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == 1:
            change = net[4].weight.detach() / (0.01 * 0.5 / math.sqrt(7))  # type: ignore[operator]
            assert_close(change.square().mean(dim=1), torch.ones(3))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_decay_ends_at_its_floor(per: str) -> None:
    """Without gradients ``w² − f²`` shrinks by ``1 − (1 − γλ (1 − f²/w²))² ≈ 2 γλ`` of itself a step: to ``e^(−2γλt)`` of what it was."""
    net = nn.Sequential(nn.Linear(9, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight.mul_(5.0)
        net[2].weight.copy_(torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.1, 0.1, -0.1, 0.1]]))
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = BackMatchSGD(net, 0.001, per=per, weight_decay=2.0, decay_floor=0.6)  # type: ignore[arg-type]
    for _ in range(200):
        optimizer.step()
    for name, fan_in in (("0.weight", 9), ("2.weight", 4)):
        p, floor = net.get_parameter(name), 0.36 / fan_in
        before, after = (mean_square(value.detach(), 0 if per == "unit" else None) for value in (first[name], p))
        expected = torch.where(before > floor, floor + (before - floor) * math.exp(-2 * 0.001 * 2.0 * 200), before)
        assert_close(after, expected, rtol=5e-3, atol=0)
        assert (before > floor).any()
    assert per == "tensor" or torch.equal(net[2].weight[1], first["2.weight"][1])
    assert all(torch.equal(p, first[name]) for name, p in net.named_parameters() if p.ndim == 1)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    ends = []
    for factor in (1.0, scale):
        net = network()
        optimizer = BackMatchSGD(net)
        for step in range(15):
            backward(net, step, scale=factor)
            optimizer.step()
        # A bias before a BatchNorm has no gradient but rounding.
        ends.append({name: p.detach() for name, p in net.named_parameters() if name != "0.bias"})
    assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_the_scale_of_weights_before_a_normalisation_does_not_matter() -> None:
    """They keep their factor, and all else is the same; they are the largest matrix, so vectors take their size from another.

    A floor of the decay is a size of its own.
    """
    torch.manual_seed(0)
    norm, layers = nn.BatchNorm1d(8, eps=1e-14), (nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    net = nn.Sequential(nn.Linear(6, 8, bias=False), norm, nn.Tanh(), *layers).double()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight.mul_(2.0)
        scaled[0].weight.mul_(2.0 * 7.0)
    for each in (net, scaled):
        optimizer = BackMatchSGD(each, 0.005, bound=1e9, decay_floor=0.0)
        for step in range(15):
            x, y = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(x.flatten(1)[:, :6]), y).backward()
            optimizer.step()
    with torch.no_grad():
        net[0].weight.mul_(7.0)
    assert_close(dict(scaled.named_parameters()), dict(net.named_parameters()), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:BackMatchSGD skipped")
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30], ids=["nan", "inf", "square overflows"])
def test_a_step_whose_gradients_are_not_finite_leaves_no_trace(bad: float, foreach: bool) -> None:
    """Not even as the very first: the run goes on as if it had not been."""
    skipped, net, other = (0, 1, 5), network(torch.float32), network(torch.float32)
    optimizer, expected = (BackMatchSGD(n, 0.01, foreach=foreach) for n in (net, other))
    for step in range(9):
        statistics = copy.deepcopy([net[1].running_mean, net[1].running_var])
        backward(net, step)
        if step in skipped:
            net[1].bias.grad[2] = bad  # type: ignore[union-attr]
            net[1].running_mean, net[1].running_var = statistics
            before = values(net)
            optimizer.step()
            assert all(torch.equal(old, new) for old, new in zip(before, values(net), strict=True))
            continue
        optimizer.step()
        backward(other, step)
        expected.step()
    assert optimizer.skipped_steps == len(skipped)
    assert_close(values(net), values(other), rtol=0.0, atol=0.0)
    assert_close(optimizer.state_dict()["state"], expected.state_dict()["state"], rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore:BackMatchSGD skipped")
@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
def test_a_gradient_whose_square_overflows_does_not_stay(shape: tuple[int, ...]) -> None:
    """A norm over a single entry is finite where its square is not."""
    p = nn.Parameter(torch.ones(shape))
    optimizer = BackMatchSGD([p])
    for value in (1.0, 1e25, 1.0):
        p.grad = torch.full(shape, value)
        optimizer.step()
    assert optimizer.skipped_steps == 1
    (response,) = optimizer.responses().values()
    assert_close(response, torch.ones_like(response))


def test_a_step_without_finite_gradients_at_first_makes_no_state_but_zeros() -> None:
    net = network()
    optimizer = BackMatchSGD(net)
    backward(net, 0)
    net[5].weight.grad[0, 0] = math.nan  # type: ignore[union-attr, index]
    before = values(net)
    optimizer.step()
    assert_close(values(net), before, rtol=0.0, atol=0.0)
    for state in optimizer.state.values():
        assert not any(state[name].any() for name in ("momentum_buffer", "response", "measurements"))
        assert state["pace"].isfinite().all()


def test_the_expected_mean_square_gradient_is_the_response_under_white_output_gradients() -> None:
    """``E[g²] = s σ² / N``, s from the whole Jacobian. The draws are the vectors of a basis, σ √(N d) e_k, each once: their second
    moment is that of independent entries of variance σ², and a mean square knows no higher one, so the mean is exact."""
    torch.manual_seed(0)
    samples, d_out, sigma = 5, 2, 0.3
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, d_out)).double()
    x = torch.randn(samples, 3, dtype=torch.float64)
    optimizer = BackMatchSGD(net, 0.0, beta=1.0 - 1e-9)
    draws = samples * d_out
    for draw in range(draws):
        delta = torch.zeros(draws, dtype=torch.float64)
        delta[draw] = sigma * math.sqrt(draws)
        optimizer.zero_grad()
        torch.autograd.backward(net(x), delta.reshape(samples, d_out) / samples)  # a loss that is a mean over samples
        optimizer.step()
    assert_close(optimizer.responses(), white_responses(net, x, sigma))


def test_the_mean_over_random_output_gradients_tends_to_the_response() -> None:
    """As above with Gaussian draws: a mean square of one Gaussian has the relative spread √2, and √(2 / draws) their mean."""
    torch.manual_seed(0)
    samples, sigma, draws = 5, 0.3, 2000
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(samples, 3, dtype=torch.float64)
    optimizer = BackMatchSGD(net, 0.0, beta=1.0 - 1e-9)
    for _ in range(draws):
        optimizer.zero_grad()
        torch.autograd.backward(net(x), sigma * torch.randn(samples, 2, dtype=torch.float64) / samples)
        optimizer.step()
    assert_close(optimizer.responses(), white_responses(net, x, sigma), rtol=4 * math.sqrt(2 / draws), atol=0.0)


def white_responses(net: nn.Module, x: Tensor, sigma: float) -> dict[str, Tensor]:
    """``s σ² / N`` per output unit; s is the mean over samples of the squared Jacobian, summed over outputs."""
    expected = {}
    for name, p in net.named_parameters():
        held = {other: q.detach() for other, q in net.named_parameters()}
        jacobian = jacrev(lambda value, name=name, held=held: functional_call(net, held | {name: value}, (x,)))(p.detach())
        response = jacobian.square().sum((0, 1)) / len(x)
        expected[name] = sigma**2 / len(x) * (response.mean(1, keepdim=True) if p.ndim > 1 else response.mean())
    return expected


def test_state_is_hardly_more_than_momentum() -> None:
    net = build_model("gpt-mini", in_shape=(64,), classes=65)
    optimizer = BackMatchSGD(net)
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    assert state_bytes(optimizer) / 4 <= 1.02 * sum(p.numel() for p in net.parameters())
    kinds = {name: value.dtype for state in optimizer.state.values() for name, value in state.items()}
    assert kinds.pop("axes") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}
