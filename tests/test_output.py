"""``estimator="output"``: momentum paced by how far it moves the outputs of every layer, against its stated equations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from backmatch import BackMatch, BackMatchSGD, coverage
from tests.reference import Reference


class OutputReference(Reference):
    """``u = g + μ b``, ``s ← mean of u², averaged``, ``ρ ← n E[(u·x)²] / (‖u‖² E[‖x‖²])``, ``r = w / √(ρ s)``, ``θ ← θ − γ r u``."""

    def __init__(self, params: Sequence[Tensor], unit_dims: Sequence[int | None], *, per: str) -> None:
        super().__init__(params, unit_dims, per=per)
        self.alignments: dict[int, Tensor] = {}

    def advance(self, grads: Sequence[Tensor], rows: dict[int, Tensor], groups: Sequence[dict[str, Any]]) -> None:
        """One step. ``rows`` are what the matrices of these numbers multiply, ``[n, d_in]``."""
        mu = groups[0]["momentum"]
        self.momenta = [mu * b + g for b, g in zip(self.momenta, grads, strict=True)]
        ahead = [g + mu * b for b, g in zip(self.momenta, grads, strict=True)]
        weight = max(1.0 / (self.count + 1), 1.0 - self._beta)
        for i, x in rows.items():
            u = ahead[i].flatten(1)
            moved, alike = (x @ u.T).square().mean(0), u.square().sum(1) * x.square().sum(1).mean() / u.shape[1]
            ratio = (moved / alike).clamp_min(1.0) if self._per == "unit" else (moved.sum() / alike.sum()).clamp_min(1.0)
            ratio = ratio.reshape(-1, *[1] * (ahead[i].ndim - 1)) if self._per == "unit" else ratio
            self.alignments[i] = ratio if i not in self.alignments else torch.lerp(self.alignments[i], ratio, weight)
        self.count += 1
        fresh = [self._mean(i, u.square()) for i, u in enumerate(ahead)]
        old = self.responses or fresh
        self.responses = [torch.lerp(s, new, weight) for s, new in zip(old, fresh, strict=True)]
        plain = self.responses
        self.responses = [s * self.alignments.get(i, torch.tensor(9.0)) for i, s in enumerate(plain)]
        self.paces = self._bounded(self.sizes())
        self.responses = plain
        for group in groups:
            for i in group["params"]:
                kept = 1 - group["lr"] * group["weight_decay"] * self._decayed(i, group["decay_floor"])
                self.params[i] = self.params[i] * kept - group["lr"] * self.paces[i] * ahead[i]


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return 1.0 + torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (8,), generator=generator)


def rows_of(net: nn.Sequential, x: Tensor) -> dict[int, Tensor]:
    """By the number of the weight among the parameters: patches, and the inputs of the linear layers."""
    rows, number = {}, 0
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            rows[number] = F.unfold(x, layer.kernel_size, padding=layer.padding).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]
        elif isinstance(layer, nn.Linear):
            rows[number] = x
        number += len(list(layer.parameters()))
        x = layer(x)
    return {i: found.detach() for i, found in rows.items()}


@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_steps_follow_the_equations(per: Any) -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net, estimator="output", per=per, interval=1)
    params = list(net.parameters())
    reference = OutputReference(params, [0 if p.ndim > 1 else None for p in params], per=per)
    for step in range(6):
        x, y = batch(step)
        rows = rows_of(net, x)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        reference.advance([p.grad for p in params if p.grad is not None], rows, optimizer.state_dict()["param_groups"])
        optimizer.step()
        for i, (name, p) in enumerate(net.named_parameters()):
            assert_close(optimizer.paces()[name], reference.paces[i], check_dtype=False, msg=lambda text, name=name: f"{name}: {text}")
            assert_close(p.detach(), reference.params[i])


def test_the_first_step_moves_every_output_by_lr_of_what_white_weights_of_that_size_make_of_the_inputs() -> None:
    net = nn.Linear(40, 7).double()
    optimizer = BackMatchSGD(net, 0.03, estimator="output", weight_decay=0.0)
    x = 2.0 + torch.randn(50, 40, dtype=torch.float64)
    before = net.weight.detach().clone()
    F.cross_entropy(net(x), torch.randint(0, 7, (50,))).backward()
    optimizer.step()
    moved = (x @ (net.weight.detach() - before).T).square().mean(0).sqrt()
    usual = before.square().mean(1).sqrt() * x.square().sum(1).mean().sqrt()
    assert_close(moved / usual, torch.full((7,), 0.03, dtype=torch.float64))


class Recurrent(nn.Module):
    """One layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return self.head(x)


def test_a_layer_called_several_times_is_measured_on_all_its_inputs() -> None:
    net = Recurrent().double()
    optimizer = BackMatchSGD(net, 0.0, estimator="output", weight_decay=0.0)
    x = torch.randn(8, 6, dtype=torch.float64)
    F.cross_entropy(net(x), torch.arange(8) % 3).backward()
    inputs = [x, net.layer(x).tanh(), net.layer(net.layer(x).tanh()).tanh()]
    optimizer.step()
    rows, u = torch.cat(inputs).detach(), net.layer.weight.grad
    assert u is not None
    expected = 6 * (rows @ u.T).square().mean(0) / (u.square().sum(1) * rows.square().sum(1).mean())
    assert_close(optimizer.state[net.layer.weight]["alignment"].squeeze(1), expected.clamp_min(1.0))


def test_rows_of_large_inputs_are_sampled() -> None:
    net = nn.Linear(3, 2)
    optimizer = BackMatchSGD(net, estimator="output", rows=10)
    net(torch.randn(50, 20, 3)).sum().backward()
    assert optimizer._observer is not None
    assert len(optimizer._observer.take()["weight".rpartition(".")[0]]) <= 11  # type: ignore[index]


def test_what_multiplies_no_rows_counts_as_typically_aligned() -> None:
    """Embeddings, a tied head, a parametrized weight, norms and biases."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5)
            self.own = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.plain = nn.Linear(4, 4)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.plain(self.own(self.table(tokens)))))

    net = Tied()
    optimizer = BackMatchSGD(net, estimator="output")
    F.cross_entropy(net(torch.arange(5)), torch.arange(5)).backward()
    optimizer.step()
    measured = {name for name, p in net.named_parameters() if optimizer.state[p]["alignments"] > 0}
    assert measured == {"plain.weight"}
    assert all((optimizer.state[p]["alignment"] == 9.0).all() for name, p in net.named_parameters() if name not in measured)
    rules = {rule.names[0]: rule.rule for rule in coverage(net, estimator="output", quiet=True)}
    assert "moves" in rules["plain.weight"]
    assert not any("moves" in rule for name, rule in rules.items() if name not in measured)


def test_without_a_model_all_counts_as_typically_aligned() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = BackMatchSGD([weight], estimator="output")
    weight.grad = torch.randn(3, 4)
    optimizer.step()
    assert (optimizer.state[weight]["alignment"] == 9.0).all()


MAKERS: dict[str, Callable[[nn.Module], BackMatchSGD]] = {
    "gradient": BackMatchSGD,
    "output": lambda net: BackMatchSGD(net, estimator="output", decay_floor=0.0),
    "probe": lambda net: BackMatchSGD(net, estimator="probe"),
    "ladder": BackMatch,
}


@pytest.mark.parametrize(("saved", "loading"), [("gradient", "output"), ("output", "gradient"), ("output", "probe"), ("output", "ladder")])
def test_a_checkpoint_of_momentum_in_other_units_is_refused(saved: str, loading: str) -> None:
    net = conv_net()
    optimizers = [MAKERS[name](net) for name in (saved, loading)]
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    optimizers[0].step()
    before = copy.deepcopy(optimizers[1].state_dict())
    with pytest.raises(ValueError, match="not one of BackMatch"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state_dict() == before


def test_a_checkpoint_of_other_paces_is_measured_anew() -> None:
    net = conv_net()
    saved, resumed = (BackMatchSGD(net, estimator="output", per=per) for per in ("tensor", "unit"))  # type: ignore[arg-type]
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    saved.step()
    resumed.load_state_dict(saved.state_dict())
    resumed.zero_grad()
    F.cross_entropy(net(batch(1)[0]), batch(1)[1]).backward()
    resumed.step()
    assert resumed.state[net[0].weight]["alignment"].shape == (4, 1, 1, 1)
    assert resumed.state[net[0].weight]["alignments"] == 1


def test_a_model_that_was_never_called_warns_with_the_remedy() -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net, estimator="output")
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="Build it on the model that you call"):
        optimizer.step()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 5000.0), (torch.float32, 2e18), (torch.bfloat16, 2e18)])
def test_gradients_whose_momentum_would_overflow_are_skipped(dtype: torch.dtype, size: float) -> None:
    net = nn.Linear(4, 3).to(dtype)
    optimizer = BackMatchSGD(net, estimator="output")
    before = copy.deepcopy(net.state_dict())
    for _ in range(30):
        for p in net.parameters():
            p.grad = torch.full_like(p, size)
        optimizer.step()
    assert optimizer.skipped_steps == 30
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(value.any() for state in optimizer.state.values() for name, value in state.items() if name == "momentum_buffer")


def test_compiled_micro_batches_in_one_buffer_are_measured_as_they_were() -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = BackMatchSGD(net, estimator="output")
        forward = torch.compile(net) if compiled else net
        buffer = torch.empty(5, 6)
        for step in range(2):
            buffer.copy_(torch.randn(5, 6, generator=torch.Generator().manual_seed(step)))
            F.cross_entropy(forward(buffer), torch.arange(5) % 3).backward()
        assert optimizer._observer is not None
        found.append(optimizer._observer.take())
    assert_close(found[1], found[0])
    assert [len(rows) for rows in found[0].values()] == [10, 10]  # type: ignore[union-attr]


def test_a_layer_that_is_wrapped_later_is_still_measured() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = BackMatchSGD(net, estimator="output")
    net[0] = nn.Sequential(net[0])
    F.cross_entropy(net(torch.randn(5, 6)), torch.arange(5) % 3).backward()
    optimizer.step()
    assert optimizer.state[net[0][0].weight]["alignments"] == 1


def test_a_layer_that_no_gradient_reaches_has_no_pace() -> None:
    net = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    optimizer = BackMatchSGD(net, estimator="output")
    F.cross_entropy(net["used"](torch.randn(5, 4)), torch.arange(5) % 3).backward()
    optimizer.step()
    assert optimizer.paces().keys() == {"used.weight", "used.bias"}


def test_a_layer_that_is_parametrized_later_keeps_the_step_going() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = BackMatchSGD(net, estimator="output")
    nn.utils.parametrizations.orthogonal(net[0])
    before = net[2].weight.detach().clone()
    F.cross_entropy(net(torch.randn(5, 6)), torch.arange(5) % 3).backward()
    optimizer.step()
    assert optimizer.state[net[2].weight]["alignments"] == 1
    assert not torch.equal(net[2].weight, before)
