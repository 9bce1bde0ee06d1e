from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from backmatch import BackMatchSGD
from backmatch.probe import Inputs, first_samples, squared_response_gradients


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 2)
    ).double()


def test_one_draw_is_the_jacobian_times_the_noise() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    found = squared_response_gradients(net, Inputs((x,), {}), seed=7)
    torch.manual_seed(7)
    noise = torch.randn(6, 3).double()
    for name, p in net.named_parameters():
        jacobian = jacrev(lambda value, name=name: functional_call(net, {name: value}, (x,)))(p.detach())
        assert_close(found[name], torch.tensordot(noise, jacobian, dims=2).square() / 6)


def test_expectation_is_the_mean_square_jacobian() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    draws = 3000
    mean = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for seed in range(draws):
        for name, square in squared_response_gradients(net, Inputs((x,), {}), seed=seed).items():
            mean[name] += square / draws
    for name, p in net.named_parameters():
        jacobian = jacrev(lambda value, name=name: functional_call(net, {name: value}, (x,)))(p.detach())
        truth = jacobian.square().sum(dim=(0, 1)) / 5
        # One draw has a relative standard deviation of √2 around each element's mean.
        assert_close(mean[name], truth, rtol=6 * (2 / draws) ** 0.5, atol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    net = small_net()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    net(x).sum().backward()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    squared_response_gradients(net, Inputs((x,), {}), seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert all(torch.equal(p.grad, grads[name]) for name, p in net.named_parameters() if p.grad is not None)


def test_same_seed_same_draw_whatever_the_global_state() -> None:
    net, x = small_net(), torch.randn(4, 2, 4, 4, dtype=torch.float64)
    first = squared_response_gradients(net, Inputs((x,), {}), seed=3)
    torch.rand(5)
    again = squared_response_gradients(net, Inputs((x,), {}), seed=3)
    other = squared_response_gradients(net, Inputs((x,), {}), seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_unused_and_frozen_parameters() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.used(self.frozen(x)), "loss": self.used.weight.sum()}

    found = squared_response_gradients(Branches(), Inputs((torch.randn(4, 3),), {}), seed=0)
    assert set(found) == {"used.weight", "used.bias"}
    assert found["used.bias"].count_nonzero() == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_same_and_leave_the_model_as_it_was(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net[2:](checkpoint(self.net[1], self.net[0](x), use_reentrant=reentrant))

    net, x = Checkpointed(), torch.randn(4, 2, 4, 4, dtype=torch.float64)
    net(x).sum().backward()
    before = copy.deepcopy(net)
    kept = [(p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None]
    found = squared_response_gradients(net, Inputs((x,), {}), seed=1)
    assert_close(found, {f"net.{name}": value for name, value in squared_response_gradients(net.net, Inputs((x,), {}), seed=1).items()})
    assert all(torch.equal(b, c) for b, c in zip(net.state_dict().values(), before.state_dict().values(), strict=True))
    assert all(p.grad is grad and torch.equal(grad, value) for p, (grad, value) in zip(net.parameters(), kept, strict=True))


def test_an_output_without_batch_is_refused() -> None:
    class OnlyLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean()

    with pytest.raises(ValueError, match="Return the network's outputs"):
        squared_response_gradients(OnlyLoss(), Inputs((torch.randn(4, 3),), {}), seed=0)


def test_packed_sequences_are_kept_whole() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (4, 3, 1)])
    inputs = first_samples(Inputs((packed,), {"rows": torch.zeros(8)}), 2)
    assert torch.equal(inputs.args[0].data, packed.data)
    assert inputs.args[0].data is not packed.data
    assert torch.equal(inputs.args[0].batch_sizes, packed.batch_sizes)
    assert len(inputs.kwargs["rows"]) == 8

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Any) -> Tensor:
            return self.last(self.lstm(x)[0].data)  # type: ignore[no-any-return]

    net = Tagger()
    optimizer = BackMatchSGD(net, estimator="probe", samples=2)
    net(packed).square().sum().backward()
    optimizer.step()
    assert optimizer.responses().keys() == dict(net.named_parameters()).keys()


def test_a_forward_that_does_not_take_what_was_kept_is_told_of() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return mask.expand(len(x), 6, 6) @ self.inner(x)  # type: ignore[no-any-return]

    net = Masked()
    optimizer = BackMatchSGD(net, estimator="probe", samples=4)
    net(torch.randn(6, 6, 3), torch.ones(6, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the first 4 of the batch .* set samples to the size of the batch"):
        optimizer.step()


def test_first_samples_follow_the_batch_dimension() -> None:
    x, mask, table = torch.randn(8, 3), torch.ones(8, 5), torch.randn(6, 3)
    kept = first_samples(Inputs((x, table), {"mask": mask, "scale": 2.0}), 3)
    assert kept.args[0].shape == (3, 3)
    assert kept.args[1].shape == (6, 3)
    assert kept.kwargs["mask"].shape == (3, 5)
    assert kept.kwargs["scale"] == 2.0
    first = x[0].clone()
    x.zero_()
    assert torch.equal(kept.args[0][0], first)
