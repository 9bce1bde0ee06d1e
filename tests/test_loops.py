"""Training loops as users write them: each equals the plain loop, in weights and in what is measured."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from backmatch import BackMatch, BackMatchSGD
from backmatch.estimators import EstimatorName
from backmatch.observer import silent
from backmatch.probe import Inputs, squared_response_gradients

ESTIMATORS = pytest.mark.parametrize("estimator", ["gradient", "probe", "loss"])
BOTH = pytest.mark.parametrize("estimator", ["gradient", "probe"])
STEPS = range(10)
"""With ``interval=4``: the estimators that watch the model measure at all of these steps but the last."""

Step = Callable[[nn.Module, BackMatchSGD, Tensor, Tensor], None]
Run = tuple[nn.Module, BackMatchSGD]


def mlp(dtype: torch.dtype = torch.float32, *, inplace: bool = False, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.ReLU(inplace), nn.Dropout(dropout), nn.Linear(8, 7), nn.ReLU(inplace), nn.Linear(7, 3)
    return nn.Sequential(*layers).to(dtype)


def conv_net(dtype: torch.dtype = torch.float32, *, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, *shape, generator=generator).to(dtype), torch.randint(0, 3, (8,), generator=generator)


def plain(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(net(x), y).backward()
    optimizer.step()


def train(
    step: Step, net: nn.Module | None = None, *, steps: Any = STEPS, around: Callable[[nn.Module], Any] | None = None, **settings: Any
) -> Run:
    """Train ``net`` by ``step``; ``around(net)``, where given, is called in its place."""
    net = mlp() if net is None else net
    optimizer = BackMatchSGD(net, **{"interval": 4, "samples": 4} | settings)
    called = net if around is None else around(net)
    drive(step, called, optimizer, steps)
    return net, optimizer


def drive(step: Step, net: Any, optimizer: BackMatchSGD, steps: Any) -> None:
    dtype = optimizer.param_groups[0]["params"][0].dtype
    shape = (2, 4, 4) if any(p.ndim == 4 for p in optimizer.param_groups[0]["params"]) else (6,)
    for i in steps:
        torch.manual_seed(i)
        step(net, optimizer, *batch(i, dtype, shape))


def assert_same(run: Run, expected: Run, *, buffers: bool = True, **tolerance: float) -> None:
    """Weights, paces and responses; bit for bit unless a tolerance is given."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    for read in (BackMatchSGD.paces, BackMatchSGD.responses):
        assert read(expected[1])
        assert_close(list(read(run[1]).values()), list(read(expected[1]).values()), **tolerance)
    values = [list((net.state_dict() if buffers else dict(net.named_parameters())).values()) for net, _ in (run, expected)]
    assert_close(*values, **tolerance)


ROUNDING = {"rtol": 1e-9, "atol": 1e-12}
"""For float64, where the order of sums differs."""


# ---- gradients


@pytest.mark.parametrize("backwards", ["each", "together"])
@ESTIMATORS
def test_two_micro_batches_are_one_batch(estimator: str, backwards: str) -> None:
    """``probe`` sees the last micro-batch, so that one comes first in the whole batch, and ``samples`` is its length. ``loss`` takes the
    mean over micro-batches, which is that over the batch where they are the same."""

    def same_halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x, y) if estimator == "probe" else (x[:4].repeat(2, 1), y[:4].repeat(2))

    def accumulate(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        x, y = same_halves(x, y)
        losses = [cross_entropy(net(x[part]), y[part]) / 2 for part in (slice(4, 8), slice(0, 4))]
        for loss in losses if backwards == "each" else [sum(losses)]:
            loss.backward()  # type: ignore[union-attr]
        optimizer.step()

    def whole(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        plain(net, optimizer, *same_halves(x, y))

    runs = [train(step, mlp(torch.float64, dropout=0.0), estimator=estimator) for step in (accumulate, whole)]
    assert_same(runs[0], runs[1], **ROUNDING)


@BOTH
def test_clipping_is_a_smaller_loss(estimator: str) -> None:
    factors: list[float] = []

    def clip(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        factors.append(0.1 / nn.utils.clip_grad_norm_(net.parameters(), 0.1).item())
        optimizer.step()

    clipped = train(clip, mlp(torch.float64), max_change=math.inf, estimator=estimator)
    assert max(factors) < 1.0
    remaining = iter(factors)

    def scale(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        (next(remaining) * cross_entropy(net(x), y)).backward()
        optimizer.step()

    # clip_grad_norm_ adds 1e-6 to the norm.
    assert_same(clipped, train(scale, mlp(torch.float64), max_change=math.inf, estimator=estimator), rtol=1e-4, atol=1e-7)


def zero_then(order: str) -> Step:
    def step(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        if order == "before forward, zeros":
            optimizer.zero_grad(set_to_none=False)
        if order == "model, before forward":
            net.zero_grad()
        loss = cross_entropy(net(x), y)
        if order.startswith("before backward"):
            optimizer.zero_grad(set_to_none="zeros" not in order)
        if order == "model, before backward":
            net.zero_grad()
        loss.backward()
        optimizer.step()
        if order.startswith("after step"):
            optimizer.zero_grad(set_to_none="zeros" not in order)
        if order == "model, after step, zeros":
            net.zero_grad(set_to_none=False)

    return step


ORDERS = ["before forward, zeros", "before backward", "before backward, zeros", "after step", "after step, zeros"]


@ESTIMATORS
@pytest.mark.parametrize("order", [*ORDERS, "model, before forward", "model, before backward", "model, after step, zeros"])
def test_zero_grad_may_come_anywhere(order: str, estimator: str) -> None:
    assert_same(train(zero_then(order), estimator=estimator), train(plain, estimator=estimator))


@BOTH
def test_a_closure_is_the_plain_step(estimator: str) -> None:
    def step(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            return loss.item()

        optimizer.step(closure)

    assert_same(train(step, estimator=estimator), train(plain, estimator=estimator))


@ESTIMATORS
def test_two_backwards_through_one_graph_are_twice_the_loss(estimator: str) -> None:
    def twice(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    def double(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        (2 * cross_entropy(net(x), y)).backward()
        optimizer.step()

    assert_same(train(twice, estimator=estimator), train(double, estimator=estimator))


# ---- precision


@ESTIMATORS
@pytest.mark.parametrize("overflows", [[], [0], [4], [5, 8]], ids=str)
def test_a_grad_scaler_changes_nothing_and_its_skipped_steps_are_none(overflows: list[int], estimator: str) -> None:
    """A scale that is a power of two is exact."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    calls = iter(range(100))

    def scaled(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y) * (math.inf if next(calls) in overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    run = train(scaled, estimator=estimator)
    assert scaler.get_scale() == 2.0 ** (10 - len(overflows))
    assert_same(run, train(plain, steps=[i for i in STEPS if i not in overflows], estimator=estimator))


@ESTIMATORS
def test_autocast_measures_nearly_the_same(estimator: str) -> None:
    def autocast(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    # Where steps are held, what the leading directions leave of a gradient counts for more, and with it the rounding of bfloat16.
    settings = {"max_stretch": math.inf} if estimator == "gradient" else {}
    runs = [train(step, mlp(dropout=0.0), estimator=estimator, steps=STEPS[:4], **settings) for step in (autocast, plain)]
    assert_same(runs[0], runs[1], rtol=0.03, atol=0.003)
    assert {pace.dtype for pace in runs[0][1].paces().values()} == {torch.float32}


@BOTH
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_bfloat16_parameters_resume_bit_for_bit_with_float32_averages(stop: int, estimator: EstimatorName) -> None:
    net, optimizer = train(plain, mlp(torch.bfloat16), steps=STEPS[:stop], estimator=estimator)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = mlp(torch.bfloat16)
    again.load_state_dict(weights)
    resumed = BackMatchSGD(again, interval=4, samples=4, estimator=estimator)
    resumed.load_state_dict(state)
    drive(plain, net, optimizer, STEPS[stop:])
    drive(plain, again, resumed, STEPS[stop:])
    assert {value.dtype for value in (*resumed.paces().values(), *resumed.responses().values())} == {torch.float32}
    assert_same((again, resumed), (net, optimizer))


# ---- forwards


class Checkpointed(nn.Sequential):
    """As nn.Sequential; the second to the fourth layer run again in the backward."""

    reentrant = False

    def forward(self, input: Tensor) -> Tensor:
        first, *inner, fifth, last = self
        return last(fifth(checkpoint(nn.Sequential(*inner), first(input), use_reentrant=self.reentrant)))


@ESTIMATORS
@pytest.mark.parametrize("whole", [False, True], ids=["within", "around"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, whole: bool, estimator: str) -> None:
    net: nn.Module = mlp()
    if not whole:
        net = Checkpointed(*net)  # type: ignore[misc]
        net.reentrant = reentrant  # type: ignore[assignment]

    def around(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)

    run = train(plain, net, around=around if whole else None, estimator=estimator)
    assert_same(run, train(plain, estimator=estimator))


@pytest.mark.parametrize("estimator", ["gradient", "probe", "rules", "loss"])
def test_in_place_activations_change_nothing(estimator: str) -> None:
    assert_same(train(plain, mlp(inplace=True), estimator=estimator), train(plain, estimator=estimator))


def test_an_input_changed_in_place_is_measured_as_it_was_given() -> None:
    class Normalized(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.mul_(2.0).add_(1.0))

    class Copied(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input * 2.0 + 1.0)

    given: list[Tensor] = []

    def keep(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        expected = x * 2.0 + 1.0
        plain(net, optimizer, x, y)
        given.append(x - expected)

    assert_same(train(keep, Normalized(*mlp()), estimator="probe"), train(plain, Copied(*mlp()), estimator="probe"))
    assert not torch.stack(given).any()


@ESTIMATORS
def test_channels_last_changes_nothing(estimator: str) -> None:
    def last(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        plain(net, optimizer, x.to(memory_format=torch.channels_last), y)

    nets = [conv_net(torch.float64, dropout=0.0) for _ in range(2)]  # dropout draws its mask in memory's order
    run = train(last, nets[0].to(memory_format=torch.channels_last), estimator=estimator)
    assert_same(run, train(plain, nets[1], estimator=estimator), **ROUNDING)


@ESTIMATORS
@pytest.mark.parametrize(("training", "gradients"), [(False, False), (False, True), (True, False)])
def test_passes_without_training_or_gradients_are_not_measured(training: bool, gradients: bool, estimator: str) -> None:
    def other_pass(net: nn.Module, x: Tensor) -> None:
        net.train(training)
        with torch.set_grad_enabled(gradients):
            net(x)
        net.train()

    def evaluated(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        other_pass(net, 3.0 * x)
        loss = cross_entropy(net(x), y)
        other_pass(net, 5.0 * x)
        loss.backward()
        other_pass(net, 7.0 * x)
        optimizer.step()

    nets = [mlp(dropout=0.0) if training else conv_net() for _ in range(2)]  # training passes move statistics and draw masks
    assert_same(train(evaluated, nets[0], estimator=estimator), train(plain, nets[1], estimator=estimator))


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_copies_neither_disturb_nor_are_disturbed(average: Any) -> None:
    net = conv_net()
    kept: list[AveragedModel] = []
    seen: list[list[Tensor]] = []

    def averaged(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        if not kept:
            kept.append(AveragedModel(net, multi_avg_fn=average))
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        with torch.random.fork_rng():
            kept[0](2.0 * x)  # in training mode, as update_bn runs it
            update_bn([3.0 * x], kept[0])
        loss.backward()
        optimizer.step()
        kept[0].update_parameters(net)
        seen.append([p.detach().clone() for p in net.parameters()])

    run = train(averaged, net, estimator="probe")
    assert_same(run, train(plain, conv_net(), estimator="probe"))
    expected = seen[0]
    for i, values in enumerate(seen[1:], start=1):
        weight = 1 / (i + 1) if average is None else 0.1
        expected = [torch.lerp(old, new, weight) for old, new in zip(expected, values, strict=True)]
    assert_close(list(kept[0].module.parameters()), expected, rtol=1e-5, atol=1e-6)
    hooks = [hook for m in kept[0].modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert hooks == [silent]


# ---- torch.func


@ESTIMATORS
def test_functional_calls_under_transforms_are_not_measured(estimator: str) -> None:
    def transformed(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(net, params, (x[None],)), y[None])

        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        params = {name: p.detach() for name, p in net.named_parameters()}
        per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(params, 9.0 * x, y)
        assert_close(per_sample["3.bias"].shape, (8, 7))
        optimizer.step()

    runs = [train(step, mlp(dropout=0.0), estimator=estimator) for step in (transformed, plain)]
    assert_same(runs[0], runs[1])


@BOTH
@pytest.mark.parametrize("given", [False, True], ids=["closed over", "argument"])
def test_gradients_by_torch_func_are_the_plain_step(given: bool, estimator: str) -> None:
    def functional(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        def loss(params: dict[str, Tensor], *data: Tensor) -> Tensor:
            return cross_entropy(functional_call(net, params, data or (x,)), y)

        params = dict(net.named_parameters())
        for name, value in grad(loss)({name: p.detach() for name, p in params.items()}, *([x] if given else [])).items():
            params[name].grad = value
        optimizer.step()

    assert_same(train(functional, estimator=estimator), train(plain, estimator=estimator))


# ---- layers


class Recurrent(nn.Module):
    """One layer called three times; ``functional``: its weights used without calling it."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functional = functional
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = nn.functional.linear(x, self.layer.weight, self.layer.bias) if self.functional else self.layer(x)
            x = x.tanh()
        return self.head(x)


@BOTH
def test_a_layer_may_be_called_several_times(estimator: str) -> None:
    runs = [train(plain, Recurrent(functional), estimator=estimator) for functional in (False, True)]
    assert_same(runs[0], runs[1])


class Branches(nn.Module):
    """Uses the branch it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.use = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(x).tanh())


@ESTIMATORS
@pytest.mark.parametrize("zeros", [False, True])
def test_an_unused_layer_keeps_its_average_until_it_is_used(zeros: bool, estimator: str) -> None:
    net = Branches()
    optimizer = BackMatchSGD(net, interval=1, per="tensor", estimator=estimator)  # type: ignore[arg-type]

    def step(i: int, use: nn.Linear) -> dict[str, Tensor]:
        net.use = use
        optimizer.zero_grad(set_to_none=not zeros)
        x, y = batch(i)
        cross_entropy(net(x), y).backward()
        optimizer.step()
        return optimizer.responses()

    step(0, net.first)
    second = step(1, net.second)
    frozen = step(2, net.first)
    # A gradient of zeros is a measurement for what reads gradients; no gradient is none.
    kept = 0.5 if zeros and estimator == "gradient" else 1.0
    assert_close(frozen["second.weight"], kept * second["second.weight"])
    assert not torch.equal(frozen["first.weight"], second["first.weight"])
    if estimator == "probe":
        before = copy.deepcopy(net)
        used = step(3, net.second)
        before.use = before.second
        fresh = squared_response_gradients(before, Inputs((batch(3)[0],), {}), seed=3)["second.weight"].mean()
        assert_close(used["second.weight"], (second["second.weight"] + fresh) / 2)
    assert all(value.isfinite().all() for value in (*optimizer.paces().values(), *net.parameters()))


# ---- torch.compile

LONG = range(25)


@pytest.mark.parametrize(
    ("how", "backend", "graphs"), [("before", "eager", 2), ("after", "eager", 2), ("in place", "eager", 3), ("in place", "aot_eager", 3)]
)
def test_a_compiled_model_is_one_graph_that_lasts(how: str, backend: str, graphs: int) -> None:
    """``fullgraph`` refuses breaks. Compiled before the optimizer was built, the hook stays outside: one graph of training, one of the
    probe, whose batch is smaller. After: one with the hook at work and one without; in place, the probe's as well."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    counts: list[int] = []

    def count(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        plain(net, optimizer, x, y)
        counts.append(counter.frame_count)

    def compiled(net: nn.Module) -> nn.Module:
        if how == "in place":
            net.compile(backend=counter, fullgraph=True)
            return net
        return torch.compile(net, backend=counter, fullgraph=True)  # type: ignore[return-value]

    settings: dict[str, Any] = {"steps": LONG, "estimator": "probe"}
    expected = train(plain, **settings)
    net = mlp()
    run = train(count, compiled(net), **settings) if how == "before" else train(count, net, around=compiled, **settings)
    assert_same(run, expected)
    assert counts[12:] == [graphs] * 13


@BOTH
@pytest.mark.parametrize(("foreach", "inner"), [(False, True), (True, False)], ids=["called inside", "itself, foreach"])
def test_a_compiled_step_is_two_graphs_that_last(foreach: bool, inner: bool, estimator: str) -> None:
    """That of the first step, which makes the state, and that of all others, whatever lr a scheduler sets. What reads gradients has
    nothing to do on the host, so a whole step is one graph without a break."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounter()
    counts: list[int] = []
    steps: list[Callable[[], None]] = []

    def scheduled(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        optimizer.param_groups[0]["lr"] *= 0.9
        plain(net, optimizer, x, y)

    def compiled(net: nn.Module, optimizer: BackMatchSGD, x: Tensor, y: Tensor) -> None:
        if not steps:
            called = (lambda: optimizer.step()) if inner else optimizer.step
            steps.append(torch.compile(called, backend=counter, fullgraph=estimator == "gradient"))
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        steps[0]()
        counts.append(counter.frame_count)

    settings: dict[str, Any] = {"steps": LONG, "foreach": foreach, "estimator": estimator}
    run = train(compiled, **settings)
    assert_same(run, train(scheduled, **settings))
    assert counts == [1] + [2] * 24
    broken = torch._dynamo.utils.counters["graph_break"]
    assert [("_on_host" in reason) for reason in broken] == ([True] if estimator == "probe" else [])


# ---- randomness


@pytest.mark.parametrize("estimator", ["gradient", "probe", "rules", "loss"])
def test_measuring_leaves_training_by_sgd_as_it_is(estimator: str) -> None:
    """Dropout masks, data noise, running statistics and weights: an optimizer that measures and does not move changes none."""
    nets, noises = [conv_net(), conv_net()], []
    watcher = BackMatchSGD(nets[0], 0.0, weight_decay=0.0, interval=2, estimator=estimator)  # type: ignore[arg-type]
    for net in nets:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        drawn = []
        for i in range(9):
            x, y = batch(i, shape=(2, 4, 4))
            optimizer.zero_grad()
            cross_entropy(net(x + torch.randn_like(x)), y).backward()
            if net is nets[0]:
                watcher.step()
            optimizer.step()
            drawn.append(torch.rand(3))
        noises.append(torch.stack(drawn))
    assert watcher.responses()
    assert torch.equal(*noises)
    assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("make", [lambda net: BackMatchSGD(net, estimator="loss"), BackMatch], ids=["loss", "BackMatch"])
def test_a_graph_shared_with_a_model_without_hooks_is_told_of(make: Callable[[nn.Module], BackMatchSGD], reset: bool) -> None:
    """torch.compile shares graphs between models of a class, and does not look whether hooks have come."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(dropout=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    (x, y), first, net = batch(0), Net(), Net()
    cross_entropy(torch.compile(first, backend="eager")(x), y).backward()
    optimizer = make(net)
    if reset:
        torch._dynamo.reset()
    cross_entropy(torch.compile(net, backend="eager")(x), y).backward()
    if reset:
        optimizer.step()
        assert all(state["measurements"] == 1 for state in optimizer.state.values() if "measurements" in state)
    else:
        with pytest.warns(UserWarning, match=r"after torch._dynamo.reset\(\) if one of its class was compiled before"):
            optimizer.step()
