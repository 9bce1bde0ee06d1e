"""Equations 1 and 2 against numpy's least squares, closed forms and autograd, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, float64, nn
from torch.nn import functional as F
from torch.testing import assert_close

from backmatch import exact
from backmatch.exact import BACK_PROPAGATION, Solver
from backmatch.layers import curvature, gain


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=float64)


def lstsq(matrix: Tensor, target: Tensor) -> Tensor:
    """numpy's minimum-norm solution; ``target`` is ``[m]`` or ``[m, k]``."""
    return torch.from_numpy(np.linalg.lstsq(matrix.detach().numpy(), target.numpy(), rcond=None)[0])


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(*a.shape[:-1], 1, dtype=a.dtype)], dim=-1)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=float64)
    module.weight.data = weight
    if bias is not None:
        module.bias.data = bias
    return module


def conv_matrix(module: nn.Conv2d, shape: tuple[int, int, int]) -> Tensor:
    """The convolution of one sample as a matrix, written out entry by entry."""
    c_in, height, width = shape
    stride, padding, kernel = module.stride[0], int(module.padding[0]), module.kernel_size[0]
    rows, columns = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
    matrix = torch.zeros(module.out_channels, rows, columns, c_in, height, width, dtype=float64)
    in_group, out_group = c_in // module.groups, module.out_channels // module.groups
    for o in range(module.out_channels):
        for p, q in np.ndindex(rows, columns):
            for c, k, m in np.ndindex(in_group, kernel, kernel):
                i, j = p * stride + k - padding, q * stride + m - padding
                if 0 <= i < height and 0 <= j < width:
                    matrix[o, p, q, o // out_group * in_group + c, i, j] += module.weight.data[o, c, k, m]
    return matrix.reshape(module.out_channels * rows * columns, -1)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width, dtype=float64), nn.Tanh(), nn.Linear(width, width, dtype=float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, dtype=float64),
        nn.BatchNorm2d(4, dtype=float64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16, 6, dtype=float64),
        nn.GELU(),
        Residual(6),
        nn.LayerNorm(6, dtype=float64),
        nn.Linear(6, 3, dtype=float64),
    )


# One layer: the input problem


def test_linear_input_is_the_pseudo_inverse() -> None:
    weight, dy = randn(7, 4), randn(5, 7)
    assert_close(exact.match_input(linear(weight), randn(5, 4), dy), lstsq(weight, dy.T).T)


def test_wide_linear_input_is_the_shortest_solution() -> None:
    weight, dy = randn(3, 8), randn(5, 3)
    change = exact.match_input(linear(weight), randn(5, 8), dy)
    assert_close(change, lstsq(weight, dy.T).T)
    assert_close(change @ weight.T, dy)


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)], ids=str)
def test_linear_input_at_every_position(positions: tuple[int, ...]) -> None:
    weight, dy = randn(7, 4), randn(5, *positions, 7)
    change = exact.match_input(linear(weight), randn(5, *positions, 4), dy)
    assert_close(change, lstsq(weight, dy.reshape(-1, 7).T).T.reshape(5, *positions, 4))


def test_orthogonal_columns_make_the_scalar_match_exact() -> None:
    module = linear(3 * torch.linalg.qr(randn(7, 4)).Q)
    x, dy = randn(5, 4), randn(5, 7)
    assert_close(exact.match_input(module, x, dy), dy @ module.weight.detach() / gain(module, x))


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"padding": 1}, {"stride": 2, "padding": 1, "groups": 2}],
    ids=str,
)
def test_conv_input_is_the_pseudo_inverse_of_the_unrolled_matrix(settings: dict[str, Any]) -> None:
    module = nn.Conv2d(2, 4, 3, dtype=float64, **settings)
    x = randn(3, 2, 5, 4)
    dy = torch.randn_like(module(x))
    matrix = conv_matrix(module, (2, 5, 4))
    assert_close(module(x).flatten(1), x.flatten(1) @ matrix.T + module(torch.zeros_like(x)).flatten(1))
    assert_close(exact.match_input(module, x, dy).flatten(1), lstsq(matrix, dy.flatten(1).T).T)


@pytest.mark.parametrize(
    ("activation", "derivative"),
    [
        (nn.Tanh(), lambda x: 1 - x.tanh() ** 2),
        (nn.ReLU(), lambda x: (x > 0).double()),
        (nn.LeakyReLU(0.1, inplace=True), lambda x: torch.where(x > 0, 1.0, 0.1)),
    ],
    ids=["tanh", "relu", "leaky_relu"],
)
def test_elementwise_input_divides_by_the_derivative(activation: nn.Module, derivative: Callable[[Tensor], Tensor]) -> None:
    x, dy = randn(4, 6), randn(4, 6)
    slope, before = derivative(x), x.clone()
    assert_close(exact.match_input(activation, x, dy), torch.where(slope == 0, 0.0, dy / slope))
    assert_close(x, before)


def test_max_pool_sends_the_change_to_the_winner() -> None:
    x, dy = randn(2, 3, 4, 4), randn(2, 3, 2, 2)
    _, winners = F.max_pool2d(x, 2, return_indices=True)
    assert_close(exact.match_input(nn.MaxPool2d(2), x, dy), F.max_unpool2d(dy, winners, [2, 2]))


def test_average_pool_gives_every_element_the_whole_change() -> None:
    dy = randn(2, 3, 2, 2)
    assert_close(exact.match_input(nn.AvgPool2d(2), randn(2, 3, 4, 4), dy), dy.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_residual_block_inverts_one_plus_the_branch() -> None:
    block, x, dy = Residual(4), randn(3, 4), randn(3, 4)
    first, second = block.inner[0], block.inner[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    change = exact.match_input(block, x, dy)
    for i in range(3):
        slope = torch.diag(1 - first(x[i]).tanh() ** 2)
        jacobian = torch.eye(4, dtype=float64) + second.weight @ slope @ first.weight
        assert_close(change[i], lstsq(jacobian, dy[i]))


@pytest.mark.parametrize("eps", [0.1, 1e-5])
def test_batch_norm_is_matched_over_the_batch(eps: float) -> None:
    module = nn.BatchNorm1d(3, eps=eps, dtype=float64)
    module.weight.data = randn(3)
    x, dy = randn(6, 3), randn(6, 3)
    var, mean = torch.var_mean(x, 0, correction=0)
    x_hat = (x - mean) / (var + eps).sqrt()
    change = exact.match_input(module, x, dy)
    for c in range(3):
        kept = torch.eye(6, dtype=float64) - 1 / 6 - torch.outer(x_hat[:, c], x_hat[:, c]) / 6
        jacobian = module.weight.data[c] / (var[c] + eps).sqrt() * kept
        assert_close(change[:, c], torch.linalg.pinv(jacobian, rtol=1e-13) @ dy[:, c], rtol=1e-6, atol=1e-8)
    # A shift of the whole batch is undone by the norm, so none is asked for; the direction of x̂ is all but undone, and blown up.
    assert_close(change.mean(0) / change.norm(), torch.zeros(3, dtype=float64))


def test_batch_norm_on_running_statistics_is_matched_per_sample() -> None:
    module = nn.BatchNorm1d(3, dtype=float64).eval()
    running_var = torch.tensor([1.0, 4.0, 9.0], dtype=float64)
    module.get_buffer("running_var").copy_(running_var)
    dy = randn(6, 3)
    assert_close(exact.match_input(module, randn(6, 3), dy), dy * (running_var + module.eps).sqrt())


@pytest.mark.parametrize("samples", [2, 3, 5, 8])
def test_a_single_coupled_pair_is_found(samples: int) -> None:
    class Couples(nn.Module):
        def __init__(self, reader: int, source: int) -> None:
            super().__init__()
            self.reader, self.source = reader, source

        def forward(self, x: Tensor) -> Tensor:
            mixing = torch.eye(len(x), dtype=x.dtype)
            mixing[self.reader, self.source] = 0.5
            return mixing @ x

    dy = randn(samples, 2)
    for reader in range(samples):
        for source in set(range(samples)) - {reader}:
            expected = dy.clone()
            expected[reader] -= 0.5 * dy[source]
            assert_close(exact.match_input(Couples(reader, source), randn(samples, 2), dy), expected)


# One layer: the parameter problem


@pytest.mark.parametrize("positions", [(), (4,)], ids=str)
def test_linear_parameters_are_g_times_inverse_a(positions: tuple[int, ...]) -> None:
    x, dy = randn(20, *positions, 4), randn(20, *positions, 3)
    change = exact.match_parameters(linear(randn(3, 4), randn(3)), x, dy)
    a, d = with_ones(x).reshape(-1, 5), dy.reshape(-1, 3)
    g_times_inverse_a = (d.T @ a) @ torch.linalg.inv(a.T @ a)
    assert_close(torch.cat([change["weight"], change["bias"][:, None]], 1), g_times_inverse_a)


def test_few_samples_give_the_shortest_parameter_change() -> None:
    x, dy = randn(3, 8), randn(3, 2)
    change = exact.match_parameters(linear(randn(2, 8), randn(2)), x, dy)
    assert_close(torch.cat([change["weight"], change["bias"][:, None]], 1), lstsq(with_ones(x), dy).T)


def test_white_inputs_make_the_scalar_rate_exact() -> None:
    a = torch.linalg.qr(with_ones(randn(50, 4)).flip(1)).Q.flip(1) * math.sqrt(50)  # the last column stays constant
    x = (a * a[:, -1:].sign())[:, :4]
    module, dy = linear(randn(3, 4), randn(3)), randn(50, 3)
    change, m_w = exact.match_parameters(module, x, dy), curvature(module, x)
    assert_close(change["weight"], dy.T @ x / 50 / m_w["weight"])
    assert_close(change["bias"], dy.mean(0) / m_w["bias"])


def test_conv_parameters_are_a_least_squares_fit_to_patches() -> None:
    module = nn.Conv2d(2, 4, 3, padding=1, stride=2, dtype=float64)
    x = randn(6, 2, 5, 5)
    dy = torch.randn_like(module(x))
    patches = torch.stack(
        [F.pad(x, (1, 1, 1, 1))[:, :, i : i + 3, j : j + 3].flatten(1) for i in range(0, 5, 2) for j in range(0, 5, 2)], dim=1
    ).reshape(-1, 18)
    expected = lstsq(with_ones(patches), dy.permute(0, 2, 3, 1).reshape(-1, 4)).T
    change = exact.match_parameters(module, x, dy)
    assert_close(torch.cat([change["weight"].flatten(1), change["bias"][:, None]], 1), expected)


def test_batch_norm_parameters_are_a_line_fit_per_channel() -> None:
    module = nn.BatchNorm1d(3, dtype=float64)
    x, dy = randn(6, 3), randn(6, 3)
    x_hat = module(x).detach()
    change = exact.match_parameters(module, x, dy)
    for c in range(3):
        assert_close(torch.stack([change["weight"][c], change["bias"][c]]), lstsq(with_ones(x_hat[:, c : c + 1]), dy[:, c]))


def test_embedding_rows_get_the_mean_of_their_tokens() -> None:
    tokens, dy = torch.tensor([[0, 2, 2], [2, 0, 4]]), randn(2, 3, 3)
    change = exact.match_parameters(nn.Embedding(5, 3), tokens, dy)["weight"]
    expected = torch.zeros(5, 3, dtype=float64)
    for row in (0, 2, 4):
        expected[row] = dy[tokens == row].mean(0)
    assert_close(change, expected)


def test_frozen_and_unused_parameters() -> None:
    class Extra(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3, dtype=float64)
            self.unused = nn.Parameter(randn(2))

    module = Extra()
    module.bias.requires_grad_(False)
    x, dy = randn(20, 4), randn(20, 3)
    change = exact.match_parameters(module, x, dy)
    assert set(change) == {"weight", "unused"}
    assert_close(change["weight"], lstsq(x, dy).T)
    assert not change["unused"].any()
    assert exact.match_parameters(nn.Tanh(), x, randn(20, 4)) == {}


# Solvers


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_damping_is_relative_to_the_mean_eigenvalue(damping: float) -> None:
    weight, dy = randn(7, 4), randn(5, 7)
    hessian = weight.T @ weight
    damped = hessian + damping * hessian.trace() / 4 * torch.eye(4, dtype=float64)
    assert_close(exact.match_input(linear(weight), randn(5, 4), dy, Solver(damping=damping)), torch.linalg.solve(damped, (dy @ weight).T).T)


def test_large_damping_turns_every_match_into_the_gradient() -> None:
    module, x, dy = linear(randn(7, 4), randn(7)), randn(9, 4), randn(9, 7)
    solver = Solver(damping=1e8)
    x_leaf = x.clone().requires_grad_()
    gradients = torch.autograd.grad(module(x_leaf), [x_leaf, module.weight, module.bias], dy)
    changes = [exact.match_input(module, x, dy, solver), *exact.match_parameters(module, x, dy, solver).values()]
    for change, gradient in zip(changes, gradients, strict=True):
        assert_close(change / change.norm(), gradient / gradient.norm())


@pytest.mark.parametrize("rank", [1, 2, 4, 99])
def test_rank_keeps_the_largest_singular_directions(rank: int) -> None:
    weight, dy = randn(7, 4), randn(5, 7)
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    kept = min(rank, 4)
    truncated = (vh[:kept].T / s[:kept]) @ u[:, :kept].T
    assert_close(exact.match_input(linear(weight), randn(5, 4), dy, Solver(rank=rank)), dy @ torch.from_numpy(truncated).T)


def test_rtol_drops_small_singular_directions() -> None:
    weight = torch.diag(torch.tensor([2.0, 1.0, 0.1], dtype=float64))
    dy = randn(5, 3)
    assert_close(exact.match_input(linear(weight), randn(5, 3), dy, Solver(rtol=0.1)), dy * torch.tensor([0.5, 1.0, 0.0], dtype=float64))


def test_rank_and_damping_combine() -> None:
    weight = torch.diag(torch.tensor([2.0, 1.0], dtype=float64))
    change = exact.match_input(linear(weight), randn(1, 2), torch.ones(1, 2, dtype=float64), Solver(rank=1, damping=0.4))
    assert_close(change, torch.tensor([[2 / (4 + 0.4 * 2.5), 0.0]], dtype=float64))


def test_series_is_the_neumann_series() -> None:
    weight, dy, eta = randn(7, 4), randn(5, 7), 0.01
    step = torch.eye(4, dtype=float64) - eta * weight.T @ weight
    expected = eta * sum((torch.linalg.matrix_power(step, j) @ weight.T @ dy.T for j in range(5)), torch.zeros(4, 5, dtype=float64)).T
    assert_close(exact.match_input(linear(weight), randn(5, 4), dy, Solver(terms=5, eta=eta)), expected)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)], ids=str)
def test_long_series_is_the_pseudo_inverse(shape: tuple[int, int]) -> None:
    module, x, dy = linear(randn(*shape), randn(shape[0])), randn(3, shape[1]), randn(3, shape[0])
    many = Solver(terms=3000)
    assert_close(exact.match_input(module, x, dy, many), exact.match_input(module, x, dy))
    assert_close(exact.match_parameters(module, x, dy, many), exact.match_parameters(module, x, dy))


@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.cross_entropy], ids=lambda f: f.__name__)
def test_first_term_is_back_propagation(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    net, x = conv_net(), randn(5, 2, 4, 4)
    targets = randn(5, 3) if loss_fn is F.mse_loss else torch.tensor([0, 2, 1, 1, 0])
    matches = exact.match(net, x, lambda z: loss_fn(z, targets), BACK_PROPAGATION)  # draws the dropout mask of the next forward
    x.requires_grad_()
    loss_fn(net(x), targets).backward()
    assert x.grad is not None
    assert_close(matches[0].input_change, 5 * x.grad)  # δ is a sample's own gradient, without the loss's 1/N
    changes = {f"{m.name}.{name}": change / 5 for m in matches for name, change in m.parameter_change.items()}
    assert_close(changes, {name: p.grad for name, p in net.named_parameters()})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4, dtype=float64), nn.Linear(4, 4, dtype=float64)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x).tanh())


@pytest.mark.parametrize("tied", [True, False])
def test_first_term_is_back_propagation_for_tied_and_derived_weights(tied: bool) -> None:
    module = Tied() if tied else nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, dtype=float64))
    x, dy = randn(5, 4), randn(5, 4)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(module(x), parameters, dy)
    assert_close(exact.match_parameters(module, x, dy, BACK_PROPAGATION), dict(zip(names, gradients, strict=True)))


# Networks


def test_chain_of_invertible_layers_is_the_pseudo_inverse_of_the_chain() -> None:
    weights = [randn(4, 4) for _ in range(3)]
    dy = randn(5, 4)
    matches = exact.match(nn.Sequential(*(linear(w) for w in weights)), randn(5, 4), dy)
    assert_close(matches[0].input_change, torch.linalg.solve(weights[2] @ weights[1] @ weights[0], dy.T).T)
    assert_close(matches[2].input_change, torch.linalg.solve(weights[2], dy.T).T)


@pytest.mark.parametrize(("widths", "equal"), [((5, 3, 5), True), ((3, 5, 7), False), ((7, 5, 3), False), ((3, 7, 3), False)], ids=str)
def test_pseudo_inverses_chain_through_a_bottleneck_only(widths: tuple[int, int, int], equal: bool) -> None:
    lower, upper, dy = randn(widths[1], widths[0]), randn(widths[2], widths[1]), randn(4, widths[2])
    change = exact.match(nn.Sequential(linear(lower), linear(upper)), randn(4, widths[0]), dy)[0].input_change
    assert change is not None
    assert torch.allclose(change, dy @ torch.linalg.pinv(upper @ lower).T) == equal


def test_each_layer_is_matched_to_the_change_from_above() -> None:
    net, x, dy = conv_net(), randn(5, 2, 4, 4), randn(5, 3)
    net[4] = nn.Identity()  # in place of dropout, whose mask differs from call to call
    of_input, of_parameters = Solver(damping=0.1), Solver(damping=0.5)
    matches = exact.match(net, x, dy, of_input, parameter_solver=of_parameters)
    assert [m.name for m in matches] == [name for name, _ in net.named_children()]
    for i, found in enumerate(matches):
        below = net[:i](x.clone())
        wanted = matches[i + 1].input_change if i + 1 < len(net) else dy
        assert wanted is not None
        assert_close(found.input_change, exact.match_input(net[i], below, wanted, of_input))
        assert_close(found.parameter_change, exact.match_parameters(net[i], below, wanted, of_parameters))


def test_residuals_are_what_the_match_leaves_over() -> None:
    weight, x, dy = randn(7, 4), randn(9, 4), randn(9, 7)
    (found,) = exact.match([("only", linear(weight, randn(7)))], x, dy)
    left_input = dy - lstsq(weight, dy.T).T @ weight.T
    left_parameters = dy - with_ones(x) @ lstsq(with_ones(x), dy)
    assert found.input_residual == pytest.approx(float(left_input.square().sum() / dy.square().sum()))
    assert found.parameter_residual == pytest.approx(float(left_parameters.square().sum() / dy.square().sum()))
    (zero,) = exact.match(nn.Sequential(linear(weight)), x, torch.zeros(9, 7))
    assert (zero.input_residual, zero.parameter_residual) == (0.0, 0.0)
    (dead,) = exact.match(nn.Sequential(nn.ReLU()), -torch.ones(2, 3), torch.ones(2, 3))
    assert (dead.input_residual, dead.parameter_residual) == (1.0, None)


def test_indices_are_read_by_the_first_layer_only() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    matches = exact.match(net, torch.tensor([[0, 1], [4, 1], [2, 2]]), randn(3, 2))
    assert (matches[0].input_change, matches[0].input_residual) == (None, None)
    assert matches[0].parameter_change["weight"].shape == (5, 3)
    with pytest.raises(ValueError, match="int64 has no derivative"):
        exact.match_input(net[0], torch.tensor([[0, 1]]), randn(1, 2, 3))


def test_a_module_used_twice_is_two_layers() -> None:
    shared, dy = linear(randn(4, 4)), randn(5, 4)
    matches = exact.match(nn.Sequential(shared, nn.Tanh(), shared), randn(5, 4), dy)
    assert [m.name for m in matches] == ["0", "1", "2"]


# Training


def test_one_step_solves_a_linear_least_squares_problem() -> None:
    module, x, y = nn.Linear(4, 3), randn(30, 4).float(), randn(30, 3).float()
    before = F.mse_loss(module(x), y).item()
    loss = exact.train_step(nn.Sequential(module), x, y, F.mse_loss, lr=3 / 2)  # mse_loss: δ = (2/3)(z − y)
    assert loss.item() == pytest.approx(before, rel=1e-5)
    expected = lstsq(with_ones(x.double()), y.double()).T.float()
    assert_close(torch.cat([module.weight, module.bias[:, None]], 1).detach(), expected, rtol=1e-4, atol=1e-6)


def test_back_propagation_step_is_sgd() -> None:
    net, x, y = conv_net(), randn(5, 2, 4, 4), randn(5, 3)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(step)
        exact.train_step(net, x, y, F.mse_loss, 0.1 / 5, BACK_PROPAGATION)
        drawn = torch.rand(1)
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.mse_loss(twin(x), y).backward()
        optimizer.step()
        assert drawn == torch.rand(1)  # both used as many random numbers
    assert_close(net.state_dict(), twin.state_dict())


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_alone_moves_the_output_as_wanted(layer: int) -> None:
    # Both layers can fit 4 samples, and everything above either is onto, so nothing is left over.
    net = nn.Sequential(nn.Linear(5, 6, dtype=float64), nn.Tanh(), nn.Linear(6, 2, dtype=float64), nn.Tanh())
    x, wanted, lr = randn(4, 5), randn(4, 2), 1e-6
    before = net(x).detach()
    found = exact.match(net, x, wanted)[layer]
    assert found.parameter_residual == pytest.approx(0.0, abs=1e-20)
    with torch.no_grad():
        for name, change in found.parameter_change.items():
            net[layer].get_parameter(name).add_(change, alpha=lr)
    assert_close((net(x).detach() - before) / lr, wanted, rtol=1e-3, atol=1e-3)


# State, dtypes, refusals


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_touched(training: bool) -> None:
    net, x = conv_net().float().train(training), randn(5, 2, 4, 4).float()
    net[4].train()
    modes = [m.training for m in net.modules()]
    net(x).sum().backward()
    state, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters() if p.grad is not None]
    random_state, x_before = torch.get_rng_state(), x.clone()
    with torch.no_grad():
        matches = exact.match(net, x, torch.ones(5, 3), Solver(damping=0.1))
        assert not torch.is_grad_enabled()
        exact.match_parameters(net, x, torch.ones(5, 3), Solver(damping=0.1))
        exact.match_input(net, x, torch.ones(5, 3), Solver(damping=0.1))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, x_before)
    assert [m.training for m in net.modules()] == modes
    assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert_close([p.grad for p in net.parameters()], grads, rtol=0, atol=0)
    for found in matches:
        for change in [found.input_change, *found.parameter_change.values()]:
            assert change is not None
            assert (change.dtype, change.requires_grad) == (float64, False)


def test_autocast_and_low_precision_do_not_reach_the_solve() -> None:
    module, x, dy = linear(randn(3, 4), randn(3)).bfloat16(), randn(9, 4).bfloat16(), randn(9, 3).bfloat16()
    wide = copy.deepcopy(module).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(exact.match_input(module, x, dy), exact.match_input(wide, x.double(), dy.double()), rtol=0, atol=0)
        assert_close(exact.match_parameters(module, x, dy), exact.match_parameters(wide, x.double(), dy.double()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"damping": -0.1}, ValueError, r"Invalid damping: -0.1. Must be in \[0.0, inf\)"),
        ({"damping": math.nan}, ValueError, "Invalid damping: nan"),
        ({"damping": math.inf}, ValueError, "Invalid damping: inf"),
        ({"damping": "1"}, TypeError, "Invalid damping: '1'"),
        ({"rank": 0}, ValueError, r"Invalid rank: 0. Must be in \[1, inf\)"),
        ({"rank": math.nan}, ValueError, "Invalid rank: nan"),
        ({"rank": 1.5}, TypeError, "Invalid rank: 1.5. Must be a whole number"),
        ({"rtol": 1.0}, ValueError, r"Invalid rtol: 1.0. Must be in \[0.0, 1.0\)"),
        ({"rtol": math.nan}, ValueError, "Invalid rtol: nan"),
        ({"terms": 0}, ValueError, r"Invalid terms: 0. Must be in \[1, inf\)"),
        ({"terms": math.nan}, ValueError, "Invalid terms: nan"),
        ({"terms": 2.5}, TypeError, "Invalid terms: 2.5. Must be a whole number"),
        ({"terms": 1, "eta": 0.0}, ValueError, r"Invalid eta: 0.0. Must be in \(0.0, inf\)"),
        ({"terms": 1, "eta": math.nan}, ValueError, "Invalid eta: nan"),
        ({"eta": 1.0}, ValueError, "Invalid eta: 1.0 without terms"),
        ({"terms": 1, "damping": 0.1}, ValueError, "Use either terms"),
        ({"terms": 1, "rank": 1}, ValueError, "Use either terms"),
        ({"terms": 1, "rtol": 0.0}, ValueError, "Use either terms"),
    ],
    ids=str,
)
def test_settings_are_refused(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Solver(**settings)


def test_diverging_series_is_refused() -> None:
    module, x, dy = linear(2 * torch.eye(3, dtype=float64)), randn(2, 3), randn(2, 3)
    assert_close(exact.match_input(module, x, dy, Solver(terms=1, eta=1.0)), 2 * dy)
    with pytest.raises(ValueError, match=r"Invalid eta: 1.0. .* at most 0.5"):
        exact.match_input(module, x, dy, Solver(terms=2, eta=1.0))


class Bad(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class OwnForward(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


X, DY = torch.ones(2, 3), torch.ones(2, 3)
TANH = nn.Sequential(nn.Tanh())


@pytest.mark.parametrize(
    ("layers", "x", "output_change", "error", "text"),
    [
        (nn.Sequential(), X, DY, ValueError, "Invalid layers: none"),
        (OwnForward(nn.Tanh()), X, DY, TypeError, "OwnForward has its own forward"),
        (TANH, torch.ones(0, 3), torch.ones(0, 3), ValueError, r"Invalid input of layer '0' \(Tanh\): shape \[0, 3\]"),
        (TANH, torch.tensor(1.0), torch.tensor(1.0), ValueError, r"shape \[\]. Must be \[N, ...\]"),
        (TANH, X * math.nan, DY, ValueError, "Invalid input of layer '0' .* not finite"),
        (TANH, X.to(torch.complex64), DY, TypeError, "must be real tensors"),
        (TANH, X, torch.ones(2, 4), ValueError, r"Invalid output_change: shape \[2, 4\]. Must be the output's, \[2, 3\]"),
        (TANH, X, DY * math.inf, ValueError, "Invalid output_change: it holds values that are not finite"),
        (TANH, X, lambda z: z.sum(1), ValueError, r"Invalid loss: shape \[2\]"),
        (nn.Sequential(Bad(lambda x: (x, x))), X, DY, TypeError, r"layer '0' \(Bad\): it returns tuple"),
        (nn.Sequential(Bad(lambda x: x.argmax(1))), X, DY, TypeError, "it returns torch.int64"),
        (nn.Sequential(nn.Flatten(0)), X, DY, ValueError, "the batch as first dimension"),
        (nn.Sequential(Bad(lambda x: x / 0)), X, DY, ValueError, "its output holds values that are not finite"),
        (nn.Sequential(Bad(torch.sqrt)), 0 * X, DY, ValueError, "its Jacobian is not finite"),
    ],
)
def test_bad_layers_and_inputs_are_refused(layers: nn.Sequential, x: Tensor, output_change: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        exact.match(layers, x, output_change)


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf])
def test_bad_lr_leaves_the_layers_unchanged(lr: float) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="Invalid lr"):
        exact.train_step(net, X, torch.ones(2, 2), F.mse_loss, lr)
    assert_close(net.state_dict(), before, rtol=0, atol=0)
