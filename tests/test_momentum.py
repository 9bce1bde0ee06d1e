"""``estimator="momentum"``: momentum paced by its size and by how far it leans to where gradients are, against its stated equations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from backmatch import BackMatch, BackMatchSGD
from tests.reference import Reference

TYPICAL = 9.0


class MomentumReference(Reference):
    """``b ← μ b + g``, ``s ← mean of u², averaged``, ``ρ ← n (b·g)²/(‖b‖²‖g‖²), averaged``, ``r = w/√(ρ s)``, ``θ ← θ − γ r u``.

    ``tables`` are the numbers of those whose rows are looked up.
    """

    def __init__(self, params: Sequence[Tensor], unit_dims: Sequence[int | None], *, per: str, tables: Sequence[int] = ()) -> None:
        super().__init__(params, unit_dims, per=per)
        self._tables = tables
        self.alignments: list[Tensor] = []
        self.measured = [0] * len(params)

    def _fan_in(self, i: int, unit_dim: int) -> int:
        return 1 if i in self._tables else super()._fan_in(i, unit_dim)

    def step(self, grads: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> None:
        """One step; all groups have the settings of the first."""
        self.count += 1
        mu, nesterov = groups[0]["momentum"], groups[0]["nesterov"]
        grads = [-grad for grad in grads] if groups[0]["maximize"] else grads
        if not self.alignments:
            self.alignments = [torch.full_like(self._mean(i, p), TYPICAL) for i, p in enumerate(self.params)]
        for i, (b, g) in enumerate(zip(self.momenta, grads, strict=True)):
            cosine = self._mean(i, b * g) / (self._mean(i, b * b) * self._mean(i, g * g)).sqrt()
            ratio = b.numel() / cosine.numel() * cosine.square()
            if i not in self._tables and not ratio.isnan().all():
                self.measured[i] += 1
                old, slow = self.alignments[i], max(1.0 / self.measured[i], 0.03)
                self.alignments[i] = torch.lerp(old, torch.where(ratio.isnan(), old, ratio), slow)
        self.momenta = [mu * b + g for b, g in zip(self.momenta, grads, strict=True)]
        ahead = [g + mu * b if nesterov else b for b, g in zip(self.momenta, grads, strict=True)]
        fresh = [self._mean(i, u.square()) for i, u in enumerate(ahead)]
        weight = max(1.0 / self.count, 1.0 - self._beta)
        plain = [torch.lerp(s, new, weight) for s, new in zip(self.responses or fresh, fresh, strict=True)]
        own = [min(count, 1.0 / 0.03) for count in self.measured]
        steady = [(k * rho + 10.0 * rho.mean()) / (k + 10.0) for k, rho in zip(own, self.alignments, strict=True)]
        self.responses = [s * rho.clamp_min(1.0) for s, rho in zip(plain, steady, strict=True)]
        self.paces = self._bounded(self.sizes())
        self.responses = plain
        for group in groups:
            for i in group["params"]:
                kept = 1 - group["lr"] * group["weight_decay"] * self._decayed(i, group["decay_floor"])
                self.params[i] = self.params[i] * kept - group["lr"] * self.paces[i] * ahead[i]


class Net(nn.Module):
    """A table, a convolution over its rows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv, self.head = nn.Embedding(7, 4), nn.Conv1d(4, 5, 3), nn.Linear(20, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.table(tokens).mT).tanh().flatten(1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 6, (8, 6), generator=generator), torch.randint(0, 3, (8,), generator=generator)  # no row 6


def train(net: nn.Module, optimizer: BackMatchSGD, step: int) -> list[Tensor]:
    """Gradients of a batch, at which the optimizer is yet to step."""
    tokens, labels = batch(step)
    optimizer.zero_grad()
    F.cross_entropy(net(tokens), labels).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_steps_follow_the_equations(per: Any, nesterov: bool, maximize: bool) -> None:
    net = Net()
    optimizer = BackMatchSGD(net, estimator="momentum", per=per, nesterov=nesterov, maximize=maximize)
    params = list(net.parameters())
    reference = MomentumReference(params, [0 if p.ndim > 1 else None for p in params], per=per, tables=[0])
    for step in range(40):
        reference.step(train(net, optimizer, step), optimizer.state_dict()["param_groups"])
        optimizer.step()
        for i, (name, p) in enumerate(net.named_parameters()):
            assert_close(
                optimizer.state[p]["alignment"], reference.alignments[i], check_dtype=False, msg=lambda text, name=name: name + text
            )
            assert_close(optimizer.paces()[name], reference.paces[i], check_dtype=False, msg=lambda text, name=name: name + text)
            assert_close(p.detach(), reference.params[i])


def test_of_noise_the_alignment_is_the_rayleigh_quotient_of_its_second_moment() -> None:
    """Gradients of covariance C in every unit, and a momentum that they hardly change: ρ → n bᵀCb / (‖b‖² tr C)."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(400, 6, dtype=torch.float64, generator=generator))
    optimizer = BackMatchSGD([weight], 0.0, estimator="momentum", momentum=0.0, nesterov=False, weight_decay=0.0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    covariance = root @ root.T
    for _ in range(500):
        weight.grad = torch.randn(400, 6, dtype=torch.float64, generator=generator) @ root.T
        optimizer.step()
    # Without momentum b is the last gradient, of the same covariance: the mean of the quotient over such b.
    b = torch.randn(100_000, 6, dtype=torch.float64, generator=generator) @ root.T
    g = torch.randn(100_000, 6, dtype=torch.float64, generator=generator) @ root.T
    expected = 6 * F.cosine_similarity(b, g).square().mean()
    assert_close(optimizer.state[weight]["alignment"].mean(), expected, rtol=0.02, atol=0.0)
    quotient = 6 * (covariance @ covariance).trace() / covariance.trace() ** 2
    assert 1.5 < expected < 2.0 * quotient


def test_the_first_step_moves_by_a_third_of_lr_relative_to_the_weights() -> None:
    torch.manual_seed(0)
    net = nn.Linear(40, 7).double()
    optimizer = BackMatchSGD(net, 0.03, estimator="momentum", weight_decay=0.0)
    before = net.weight.detach().clone()
    F.cross_entropy(net(torch.randn(50, 40, dtype=torch.float64)), torch.randint(0, 7, (50,))).backward()
    optimizer.step()
    moved = (net.weight.detach() - before).square().mean(1).sqrt()
    assert_close(moved / before.square().mean(1).sqrt(), torch.full((7,), 0.01, dtype=torch.float64))


def test_momentum_that_has_nothing_to_add_is_no_measurement() -> None:
    """Units whose gradient, or whose momentum, is 0 keep what they have; all, in the first step."""
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = BackMatchSGD([weight], estimator="momentum")
    weight.grad = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    optimizer.step()
    assert (optimizer.state[weight]["alignment"] == 9.0).all()
    weight.grad = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    optimizer.step()
    assert_close(optimizer.state[weight]["alignment"].flatten(), torch.tensor([4 * (20 / 30) ** 2, 9.0, 9.0]))
    weight.grad = torch.zeros(3, 4)
    optimizer.step()
    assert optimizer.state[weight]["alignments"] == 1


MAKERS: dict[str, Callable[[nn.Module], BackMatchSGD]] = {
    "gradient": BackMatchSGD,
    "momentum": lambda net: BackMatchSGD(net, estimator="momentum", decay_floor=0.0),
    "probe": lambda net: BackMatchSGD(net, estimator="probe"),
    "ladder": BackMatch,
}


@pytest.mark.parametrize(
    ("saved", "loading"), [("gradient", "momentum"), ("momentum", "gradient"), ("momentum", "probe"), ("momentum", "ladder")]
)
def test_a_checkpoint_of_momentum_in_other_units_is_refused(saved: str, loading: str) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizers = [MAKERS[name](net) for name in (saved, loading)]
    F.cross_entropy(net(torch.randn(5, 6)), torch.arange(5) % 3).backward()
    optimizers[0].step()
    before = copy.deepcopy(optimizers[1].state_dict())
    with pytest.raises(ValueError, match="not one of BackMatch"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state_dict() == before


def test_a_checkpoint_of_other_paces_is_measured_anew() -> None:
    net = Net()
    saved, resumed = (BackMatchSGD(net, estimator="momentum", per=per) for per in ("tensor", "unit"))  # type: ignore[arg-type]
    train(net, saved, 0)
    saved.step()
    resumed.load_state_dict(saved.state_dict())
    train(net, resumed, 1)
    resumed.step()
    assert resumed.state[net.conv.weight]["alignment"].shape == (5, 1, 1)
    assert resumed.state[net.conv.weight]["alignments"] == 1


def test_a_momentum_that_is_scheduled_leaves_nothing_behind() -> None:
    """Its factors are numbers, as a tensor kept for each new value would be one for every step of a OneCycleLR."""
    net = Net()
    optimizer = BackMatchSGD(net, estimator="momentum")
    kept = []
    for step in range(4):
        optimizer.param_groups[0]["momentum"] = 0.9 + 0.01 * step
        train(net, optimizer, step)
        optimizer.step()
        assert optimizer._latest is not None
        kept.append(len(optimizer._latest[1]._layout._constants))
    assert kept[1:] == kept[:-1]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 5000.0), (torch.float32, 2e18), (torch.bfloat16, 2e18)])
def test_gradients_whose_momentum_would_overflow_are_skipped(dtype: torch.dtype, size: float) -> None:
    net = nn.Linear(4, 3).to(dtype)
    optimizer = BackMatchSGD(net, estimator="momentum")
    before = copy.deepcopy(net.state_dict())
    for _ in range(30):
        for p in net.parameters():
            p.grad = torch.full_like(p, size)
        optimizer.step()
    assert optimizer.skipped_steps == 30
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(value.any() for state in optimizer.state.values() for name, value in state.items() if name == "momentum_buffer")


def test_a_layer_that_no_gradient_reaches_has_no_pace() -> None:
    net = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    optimizer = BackMatchSGD(net, estimator="momentum")
    F.cross_entropy(net["used"](torch.randn(5, 4)), torch.arange(5) % 3).backward()
    optimizer.step()
    assert optimizer.paces().keys() == {"used.weight", "used.bias"}
