from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from backmatch import BackMatchSGD
from backmatch.contract import is_due


def conv_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Flatten(), nn.Linear(16, 3)).to(
        dtype
    )


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 4, 4, generator=generator).to(dtype), torch.randint(0, 3, (8,), generator=generator)


def train_steps(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = batch(step, next(net.parameters()).dtype)
        torch.manual_seed(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("estimator", ["gradient", "probe", "rules", "loss"])
def test_pace_one_is_sgd_bit_for_bit(nesterov: bool, momentum: float, estimator: str) -> None:
    if nesterov and momentum == 0.0:
        pytest.skip("refused by both optimizers")
    ours, theirs = conv_net(), conv_net()
    settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "estimator": estimator}
    mine = BackMatchSGD(ours, 0.1, **settings, weight_decay=0.0, power=0.0, relative=False, max_change=math.inf, per="tensor")
    train_steps(ours, mine, range(25))
    train_steps(theirs, torch.optim.SGD(theirs.parameters(), 0.1, momentum=momentum, nesterov=nesterov), range(25))
    assert all(torch.equal(p, q) for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_pace_one_is_sgd_bit_for_bit_in_narrow_dtypes(dtype: torch.dtype, foreach: bool | None) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((8, 5), (8,), (300, 300))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "foreach": foreach}
    mine = BackMatchSGD(ours, 0.1, **settings, weight_decay=0.0, power=0.0, relative=False)
    sgd = torch.optim.SGD(theirs, 0.1, momentum=0.95, nesterov=True, foreach=False)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.clone()
        mine.step()
        sgd.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_steps_follow_the_equations(nesterov: bool, per: str) -> None:
    net = conv_net(torch.float64)
    settings: dict[str, Any] = {"estimator": "probe", "per": per, "interval": 3, "max_change": math.inf}
    optimizer = BackMatchSGD(net, 0.1, nesterov=nesterov, weight_decay=0.02, **settings)
    buffers = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(7):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        train_steps(net, optimizer, range(step, step + 1))
        pace = optimizer.paces()
        for name, p in net.named_parameters():
            assert p.grad is not None
            buffers[name] = 0.9 * buffers[name] + pace[name] * p.grad
            move = pace[name] * p.grad + 0.9 * buffers[name] if nesterov else buffers[name]
            assert_close(p.detach(), before[name] * (1 - 0.1 * 0.02) - 0.1 * move)


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_paces_are_sizes_over_the_root_of_responses(per: str, estimator: str) -> None:
    net = conv_net(torch.float64)
    optimizer = BackMatchSGD(net, 0.0, weight_decay=0.0, per=per, estimator=estimator)  # type: ignore[arg-type]
    train_steps(net, optimizer, range(1))
    responses, paces = optimizer.responses(), optimizer.paces()
    sizes = {}
    for name, p in net.named_parameters():
        if p.ndim > 1:
            dims = tuple(range(1, p.ndim)) if per == "unit" else tuple(range(p.ndim))
            sizes[name] = p.detach().square().mean(dim=dims, keepdim=per == "unit").sqrt().clamp_min(0.5 / p[0].numel() ** 0.5)
    typical = min(size.square().mean().sqrt() for size in sizes.values())
    for name in paces:
        size = sizes.get(name, typical)
        if name != "0.bias":  # no response before a BatchNorm: its pace is the bound
            assert_close(paces[name], size / responses[name].sqrt(), check_dtype=False, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
def test_a_burst_of_gradients_moves_no_further_than_the_bound(estimator: str) -> None:
    net = nn.Linear(3, 2, bias=False).double()
    settings: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "max_change": 0.01, "estimator": estimator}
    optimizer = BackMatchSGD(net, 0.1, **settings)
    before = net.weight.detach().clone()
    (1e6 * net(torch.ones(4, 3, dtype=torch.float64))).sum().backward()
    optimizer.step()
    assert_close((net.weight.detach() - before).norm(), 0.01 * before.norm())


def test_responses_average_the_probes() -> None:
    from backmatch.probe import Inputs, squared_response_gradients

    net = conv_net()
    optimizer = BackMatchSGD(net, 0.0, weight_decay=0.0, estimator="probe", interval=2, beta=0.75, samples=4, per="tensor")
    train_steps(net, optimizer, range(20))  # lr 0: the weights stay, the batches change
    expected: dict[str, Tensor] = {}
    for seen, step in enumerate(step for step in range(20) if is_due(step, 2)):
        measured = squared_response_gradients(net, Inputs((batch(step)[0][:4],), {}), seed=step)
        weight = max(0.25, 1 / (seen + 1))
        expected = {name: (1 - weight) * expected.get(name, torch.tensor(0.0)) + weight * value.mean() for name, value in measured.items()}
    assert_close(optimizer.responses(), expected)


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
@pytest.mark.parametrize("per", ["tensor", "unit"])
@pytest.mark.parametrize("stop", [1, 7, 10, 11])
def test_resume_equals_the_uninterrupted_run(stop: int, per: str, estimator: str) -> None:
    net = conv_net()
    settings: dict[str, Any] = {"per": per, "interval": 5, "estimator": estimator}
    optimizer = BackMatchSGD(net, 0.05, **settings)
    train_steps(net, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train_steps(net, optimizer, range(stop, 20))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = conv_net()
    resumed = BackMatchSGD(again, 0.9, **settings)
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train_steps(again, resumed, range(stop, 20))
    assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(pace, resumed.paces()[name]) for name, pace in optimizer.paces().items())


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
def test_averages_of_bfloat16_parameters_keep_float32_through_a_checkpoint(estimator: str) -> None:
    net = conv_net(torch.bfloat16)
    optimizer = BackMatchSGD(net, estimator=estimator)  # type: ignore[arg-type]
    train_steps(net, optimizer, range(3))
    resumed = BackMatchSGD(net, estimator=estimator)  # type: ignore[arg-type]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for kept, loaded in ((optimizer.paces(), resumed.paces()), (optimizer.responses(), resumed.responses())):
        assert all(loaded[name].dtype == torch.float32 and torch.equal(value, loaded[name]) for name, value in kept.items())


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
def test_output_units_have_their_own_pace(estimator: str) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9, 4))
    optimizer = BackMatchSGD(net, estimator=estimator)  # type: ignore[arg-type]
    net(torch.randn(6, 3, 2, 2)).square().mean().backward()
    optimizer.step()
    shapes = {name: tuple(pace.shape) for name, pace in optimizer.paces().items()}
    assert shapes == {"0.weight": (1, 5, 1, 1), "0.bias": (), "3.weight": (4, 1), "3.bias": ()}


def test_autocast_reaches_the_probe() -> None:
    seen: list[torch.dtype] = []

    class Spy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            seen.append(output.dtype)
            return output

    net = Spy(4, 2)
    optimizer = BackMatchSGD(net, estimator="probe")
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(torch.randn(8, 4)).float().square().mean()
    loss.backward()
    optimizer.step()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_detach_leaves_no_hook() -> None:
    """What reads gradients hangs no hook in the first place."""
    for estimator in ("probe", "rules", "loss"):
        net = conv_net()
        optimizer = BackMatchSGD(net, estimator=estimator, per="tensor")  # type: ignore[arg-type]
        assert any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
        optimizer.detach()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    net = conv_net()
    optimizer = BackMatchSGD(net)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    optimizer.detach()
    train_steps(net, optimizer, range(1))
    assert optimizer.responses()


def test_a_copied_model_does_not_feed_the_optimizer() -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net, estimator="probe")
    clone = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    clone(batch(0)[0])
    train_steps(net, optimizer, range(2))
    assert optimizer.paces()


def test_closure_is_run_with_gradients_and_its_loss_returned() -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net)
    x, y = batch(0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss.item()

    assert math.isfinite(optimizer.step(closure))
    assert optimizer.paces()


def test_a_model_that_was_never_called_warns_with_the_remedy() -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net, estimator="probe")
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="Build it on the model that you call"):
        optimizer.step()


def test_a_square_that_only_a_wider_dtype_beside_it_holds_is_skipped() -> None:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2, dtype=torch.float64))]
    optimizer = BackMatchSGD(params)
    for p in params:
        p.grad = torch.ones_like(p)
    assert params[0].grad is not None
    params[0].grad[0, 0] = 1e30
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for p in params:
        assert_close(p, torch.ones_like(p), rtol=0.0, atol=0.0)


BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.1}, ValueError, r"Invalid lr: -0.1. Must be in \[0.0, inf\)"),
    ({"lr": torch.tensor(-0.5)}, ValueError, "Invalid lr: -0.5"),
    ({"lr": math.nan}, ValueError, "Invalid lr: nan"),
    ({"lr": "0.1"}, TypeError, "Invalid lr"),
    ({"momentum": 1.0}, ValueError, "Invalid momentum: 1.0"),
    ({"weight_decay": -1e-3}, ValueError, "Invalid weight_decay"),
    ({"interval": 0}, ValueError, "Invalid interval: 0"),
    ({"interval": 2.5}, TypeError, "Must be a whole number"),
    ({"samples": 0}, ValueError, "Invalid samples"),
    ({"beta": 1.0}, ValueError, "Invalid beta"),
    ({"power": 1.5}, ValueError, "Invalid power: 1.5"),
    ({"power": math.nan}, ValueError, "Invalid power: nan"),
    ({"bound": 0.5}, ValueError, "Invalid bound"),
    ({"max_change": 0.0}, ValueError, r"Invalid max_change: 0.0. Must be in \(0.0, inf\]"),
    ({"estimator": "guess"}, ValueError, "Must be one of gradient, probe, rules, loss"),
    ({"per": "row"}, ValueError, "Must be one of tensor, unit"),
    ({"estimator": "rules", "per": "unit"}, ValueError, "Use per='tensor', or estimator='gradient' or 'probe'"),
    ({"nesterov": True, "momentum": 0.0}, ValueError, "needs momentum > 0"),
]


@pytest.mark.parametrize(("settings", "error", "text"), BAD_SETTINGS, ids=[str(case[0]) for case in BAD_SETTINGS])
def test_bad_settings(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BackMatchSGD(conv_net(), **settings)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: nn.ReLU(), ValueError, "no trainable parameter"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), ValueError, "no trainable parameter"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), TypeError, "Invalid model: DataParallel"),
        (lambda: nn.Linear(2, 2).weight, TypeError, "iterable"),
        (lambda: [], ValueError, "empty parameter list"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), TypeError, "Invalid parameter: complex"),
    ],
)
def test_bad_models(build: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BackMatchSGD(build())


@pytest.mark.parametrize("estimator", ["rules", "loss"])
def test_unknown_layers_are_named_with_the_remedy(estimator: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 2))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = net[0], net[1]

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x, x)

    wrapped = Wrapped()
    before = copy.deepcopy(wrapped.state_dict())
    with pytest.raises(NotImplementedError, match=r"(?s)second.*Bilinear.*estimator='probe'"):
        train_on_noise(wrapped, estimator)
    assert all(torch.equal(p, before[name]) for name, p in wrapped.state_dict().items())


def train_on_noise(net: nn.Module, estimator: str) -> None:
    optimizer = BackMatchSGD(net, estimator=estimator, per="tensor")  # type: ignore[arg-type]
    net(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("estimator", ["gradient", "probe", "rules", "loss"])
@pytest.mark.parametrize("build", [conv_net, lambda: nn.Linear(32, 3)])
def test_every_estimator_works_with_its_defaults(estimator: str, build: Callable[[], nn.Module]) -> None:
    net = build()
    optimizer = BackMatchSGD(net, estimator=estimator)  # type: ignore[arg-type]
    x, y = batch(0)
    nn.functional.cross_entropy(net(x if isinstance(net, nn.Sequential) else x.flatten(1)), y).backward()
    optimizer.step()
    assert set(optimizer.paces()) == {name for name, _ in net.named_parameters()}


def test_a_step_without_gradients_changes_nothing() -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net)
    before = copy.deepcopy(net.state_dict())
    net(batch(0)[0])
    before["1.running_mean"], before["1.running_var"] = net[1].running_mean, net[1].running_var  # type: ignore[assignment]
    optimizer.step()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items() if "num_batches" not in name)


def test_a_parameter_of_no_group_is_left_alone() -> None:
    net = conv_net()
    net[0].requires_grad_(False)
    optimizer = BackMatchSGD(net)
    net[0].requires_grad_(True)
    before = net[0].weight.detach().clone()  # type: ignore[operator]
    train_steps(net, optimizer, range(2))
    optimizer.state_dict()
    assert torch.equal(net[0].weight, before)  # type: ignore[arg-type]
    assert not any(name.startswith("0.") for name in optimizer.paces())


def test_a_parameter_not_measured_yet_takes_the_middle_pace() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    optimizer = BackMatchSGD(net, estimator="probe", interval=5)
    net[1].requires_grad_(False)
    for step in range(10):
        if step == 9:
            net[1].requires_grad_(True)
        net(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    paces = optimizer.paces()
    assert paces["1.weight"] == torch.stack([paces["0.weight"].mean(), paces["0.bias"].mean()]).median()


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss"])
def test_a_parameter_without_elements_is_passed_over(estimator: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Linear(0, 3))
    optimizer = BackMatchSGD(net, 0.1, estimator=estimator)
    before = net[2].bias.detach().clone()  # type: ignore[union-attr]
    for _ in range(2):
        optimizer.zero_grad()
        (net(torch.randn(5, 4)) - 1).square().mean().backward()
        optimizer.step()
    assert not torch.equal(net[2].bias, before)  # type: ignore[arg-type]
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("estimator", ["probe", "rules", "loss"])
def test_an_empty_batch_is_not_measured(estimator: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = BackMatchSGD(net, estimator=estimator, interval=1)

    def step(samples: int) -> dict[str, Tensor]:
        optimizer.zero_grad()
        net(torch.randn(samples, 4)).sum().backward()
        optimizer.step()
        return optimizer.responses()

    before = step(5)
    with pytest.warns(UserWarning, match="saw no sample go through its model"):
        assert_close(step(0), before, rtol=0, atol=0)
    assert all(not torch.equal(new, before[name]) for name, new in step(5).items() if name != "2.bias")
    assert all(p.isfinite().all() for p in net.parameters())


def test_one_measurement_that_is_not_finite_does_not_stay() -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net, estimator="probe", interval=1)
    train_steps(net, optimizer, range(2))
    kept = optimizer.responses()
    x, y = batch(2)
    net(torch.full_like(x, math.nan))  # what the probe sees
    assert optimizer._observer is not None
    optimizer._observer.active = False
    nn.functional.cross_entropy(net.eval()(x), y).backward()
    net.train()
    optimizer.step()
    after = optimizer.responses()
    assert all(value.isfinite().all() for value in after.values())
    assert torch.equal(after["0.weight"], kept["0.weight"])


def test_a_state_dict_of_another_optimizer_is_refused() -> None:
    net = conv_net()
    with pytest.raises(ValueError, match="not one of BackMatchSGD"):
        BackMatchSGD(net).load_state_dict(torch.optim.SGD(net.parameters(), 0.1).state_dict())


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_a_checkpoint_of_other_paces_is_measured_anew(per: Any, estimator: Any) -> None:
    """The responses of matrices, which have other shapes."""
    net, fresh = conv_net(), conv_net()
    saved = BackMatchSGD(net, estimator=estimator, per="unit" if per == "tensor" else "tensor")
    train_steps(net, saved, range(3))
    fresh.load_state_dict(net.state_dict())
    resumed, theirs = (BackMatchSGD(model, estimator=estimator, per=per) for model in (net, fresh))
    resumed.load_state_dict(saved.state_dict())
    theirs.load_state_dict(saved.state_dict() | {"state": {}})
    for model, optimizer in ((net, resumed), (fresh, theirs)):
        train_steps(model, optimizer, range(3, 4))
    matrices = [name for name, p in net.named_parameters() if p.ndim > 1]
    assert all(torch.equal(resumed.responses()[name], theirs.responses()[name]) for name in matrices)
    assert all(resumed.paces()[name].shape == theirs.paces()[name].shape for name in matrices)


def test_sgd_takes_no_pace_from_a_checkpoint() -> None:
    net = conv_net()
    saved = BackMatchSGD(net, weight_decay=0.0)
    train_steps(net, saved, range(3))
    sgd = BackMatchSGD(net, power=0.0, relative=False)
    sgd.load_state_dict(saved.state_dict())
    train_steps(net, sgd, range(1))
    assert all(pace.ndim == 0 and pace == 1.0 for pace in sgd.paces().values())
    assert not sgd.responses()


def test_measurements_are_dense_early_and_regular_later() -> None:
    steps = [step for step in range(80) if is_due(step, 10)]
    assert steps == [*range(9), 10, 12, 15, 16, 20, 24, 28, 32, 36, 40, 50, 60, 70]
    assert all(is_due(step, 1) for step in range(50))


def test_a_checkpoint_whose_counts_are_numbers_goes_on_as_it_would() -> None:
    nets = conv_net(), conv_net()
    optimizers = [BackMatchSGD(net, estimator="probe", interval=2) for net in nets]
    train_steps(nets[0], optimizers[0], range(5))
    saved = copy.deepcopy(optimizers[0].state_dict())
    for state in saved["state"].values():
        state["measurements"] = int(state["measurements"])
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(saved)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train_steps(net, optimizer, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(*(net.state_dict().values() for net in nets), strict=True))
