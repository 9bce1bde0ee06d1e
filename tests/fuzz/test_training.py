"""What every optimizer promises of every step, on random networks, batches and settings."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from backmatch import BackMatch, BackMatchSGD, coverage
from tests.fuzz.architectures import Problem, problems
from tests.fuzz.optimizers import KINDS, Setup, clear_refusals, setups

# What the optimizers warn of (layers that are never called, steps skipped) is tested by name elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def momenta(optimizer: BackMatchSGD) -> list[Tensor]:
    """Copies; none before the first step."""
    return [state["momentum_buffer"].clone() for state in optimizer.state.values() if "momentum_buffer" in state]


def assert_same(found: Any, expected: Any) -> None:
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def state_tensors(optimizer: BackMatchSGD) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def assert_bounded(optimizer: BackMatchSGD) -> None:
    """All paces within ``bound`` of one number: where every tensor has one pace, of the median of those that respond."""
    paces, reach = optimizer.paces(), math.log(optimizer.bound) + 1e-4
    if not paces:
        return
    logs = torch.cat([pace.double().flatten() for pace in paces.values()]).log()
    assert logs.max() - logs.min() <= 2 * reach
    living = [paces[name].double().log() for name, response in optimizer.responses().items() if response.any()]
    if living and all(pace.ndim == 0 for pace in paces.values()):
        median = torch.stack(living).median()
        assert abs(median) > 82 or (logs - median).abs().max() <= reach  # at the ends of float32's range the interval ends too


@EVERY_KIND
@given(problem=problems(scales=(1.0, 1e-25, 1e-6, 1e6, 1e15)), data=st.data())
def test_training_stays_finite_and_moves_what_has_a_gradient_alone(kind: str, problem: Problem, data: st.DataObject) -> None:
    model = problem.fresh()
    with clear_refusals(kind):
        optimizer = data.draw(setups(kind)).build(model)
        for step in range(len(problem.batches)):
            before = parameters(model)
            problem.backward(model, step)
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            for name, p in model.named_parameters():
                assert p.isfinite().all(), name
                if name in grads:
                    assert_same(p.grad, grads[name])
                else:
                    assert_same(p.detach(), before[name])
            assert all(value.isfinite().all() for value in state_tensors(optimizer))
            if kind != "ladder":
                assert_bounded(optimizer)


@EVERY_KIND
@given(problem=problems(), data=st.data(), bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_a_step_whose_gradients_are_not_finite_changes_nothing(kind: str, problem: Problem, data: st.DataObject, bad: float) -> None:
    model = problem.fresh()
    with clear_refusals(kind):
        optimizer = data.draw(setups(kind)).build(model)
        poisoned = data.draw(st.integers(0, len(problem.batches) - 1))
        for step in range(poisoned + 1):
            problem.backward(model, step)
            if step == poisoned:
                grads = [p.grad for p in model.parameters() if p.grad is not None and p.numel()]
                assume(grads)
                grad = data.draw(st.sampled_from(grads))
                grad[(0,) * grad.ndim] = math.inf if grad.dtype == torch.float64 and bad == 1e30 else bad  # float64 holds its square
                skipped, before, buffers = optimizer.skipped_steps, parameters(model), momenta(optimizer)
            optimizer.step()
        assert optimizer.skipped_steps == skipped + 1
        assert_same(parameters(model), before)
        assert_same(momenta(optimizer), buffers or [torch.zeros_like(buffer) for buffer in momenta(optimizer)])


@EVERY_KIND
@given(problem=problems(), data=st.data())
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, problem: Problem, data: st.DataObject) -> None:
    model = problem.fresh()
    with clear_refusals(kind):
        setup = data.draw(setups(kind))
        optimizer = setup.build(model)
        saved = data.draw(st.integers(1, len(problem.batches) - 1))
        for step in range(len(problem.batches)):
            if step == saved:
                file = io.BytesIO()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            problem.backward(model, step)
            optimizer.step()
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
        resumed_model = problem.fresh()
        resumed = setup.build(resumed_model)
        resumed_model.load_state_dict(checkpoint["model"])
        resumed.load_state_dict(checkpoint["optimizer"])
        for step in range(saved, len(problem.batches)):
            problem.backward(resumed_model, step)
            resumed.step()
        assert_same(resumed_model.state_dict(), model.state_dict())
        assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


@given(problem=problems(), kind=st.sampled_from(KINDS[:4]), foreach=st.booleans(), maximize=st.booleans(), data=st.data())
def test_with_every_pace_1_it_is_sgd(problem: Problem, kind: str, foreach: bool, maximize: bool, data: st.DataObject) -> None:
    momentum = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    shared = {"lr": 0.01, "momentum": momentum, "nesterov": momentum > 0 and data.draw(st.booleans()), "maximize": maximize}
    model, expected = problem.fresh(), problem.fresh()
    setup = Setup(kind, shared | {"foreach": foreach, "power": 0.0, "relative": False, "weight_decay": 0.0, "max_change": math.inf})
    # On a CPU torch's own foreach rounds momentum to bfloat16 first, and so differs from its own loop.
    pairs = [(model, setup.build(model)), (expected, torch.optim.SGD(expected.parameters(), foreach=False, **shared))]
    for step in range(len(problem.batches)):
        for net, optimizer in pairs:
            problem.backward(net, step)
            if all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None):
                optimizer.step()
    assert_same(parameters(model), parameters(expected))


@EVERY_KIND
@given(problem=problems(sizes=(0,), steps=2), data=st.data())
def test_empty_batches_move_nothing_but_by_weight_decay(kind: str, problem: Problem, data: st.DataObject) -> None:
    model = problem.fresh()
    with clear_refusals(kind):
        optimizer = data.draw(setups(kind)).build(model)
        optimizer.param_groups[0]["decay_floor"] = 0.0  # tests/test_gradient.py has decay with a floor
        for step in range(len(problem.batches)):
            before = parameters(model)
            problem.backward(model, step)
            optimizer.step()
            group, slow = optimizer.param_groups[0], isinstance(optimizer, BackMatch)
            for name, p in model.named_parameters():
                lr = float(group["lr"]) * (0.1 if slow and "lr / 10" in optimizer.rules().get(name, "") else 1.0)
                moved = p.grad is not None and not optimizer.skipped_steps
                expected = before[name] * (1 - lr * group["weight_decay"]) if moved else before[name]
                coarsest = [p.dtype, group["lr"].dtype if isinstance(group["lr"], Tensor) else p.dtype]
                assert_close(p.detach(), expected, rtol=max(torch.finfo(dtype).eps for dtype in coarsest), atol=0)


@given(problem=problems())
def test_coverage_has_a_rule_for_every_parameter_and_counts_the_paces_it_gets(problem: Problem) -> None:
    model = problem.fresh()
    optimizer = BackMatchSGD(model)
    problem.backward(model, 0)
    optimizer.step()
    rules = coverage(model, quiet=True)
    assert [name for rule in rules for name in rule.names if name == rule.names[0]] == [name for name, _ in model.named_parameters()]
    assert sorted(name for rule in rules for name in rule.names) == sorted(n for n, _ in model.named_parameters(remove_duplicate=False))
    assert all((rule.paces > 0) == model.get_parameter(rule.names[0]).requires_grad for rule in rules if 0 not in rule.shape)
    stated = {rule.names[0]: rule.paces for rule in rules}
    for name, pace in optimizer.paces().items():
        assert pace.numel() == stated[name], name


@given(problem=problems(sizes=(1, 3)))
def test_loss_refuses_exactly_what_coverage_says(problem: Problem) -> None:
    model = problem.fresh()
    refused = any(rule.rule.startswith("refused") for rule in coverage(model, estimator="loss", quiet=True))
    try:
        BackMatchSGD(model, estimator="loss")
    except NotImplementedError:
        assert refused
    else:
        assert not refused
