"""Accelerate saves and loads an optimizer's state the moment it prepares it, and wraps forward for mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from backmatch import BackMatchSGD
from tests.integrations.cases import BATCHES, SETTINGS, assert_same, loader, network, plain, run_example, trained

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: make test-integrations")


class Prepared:
    """A network, its optimizer and its batches, prepared and ready to train."""

    def __init__(
        self, *, batches: int = BATCHES, accumulate: int = 1, mixed_precision: str = "no", halve: bool = False, **settings: Any
    ) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=mixed_precision)
        net = network()
        self.inner = BackMatchSGD(net, **SETTINGS | settings)
        scheduler = LambdaLR(self.inner, lambda step: 0.5**step if halve else 1.0)
        self.net, self.optimizer, self.batches, self.scheduler = self.accelerator.prepare(net, self.inner, loader(batches), scheduler)

    def train(self, *, epochs: int = 2, clip: float | None = None) -> BackMatchSGD:
        self.net.train()
        for _ in range(epochs):
            for x, y in self.batches:
                with self.accelerator.accumulate(self.net):
                    self.accelerator.backward(cross_entropy(self.net(x), y))
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.net.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self.inner


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss", "rules"])
def test_a_prepared_loop_is_the_plain_one(estimator: str) -> None:
    assert_same(Prepared(estimator=estimator).train(), trained(estimator=estimator))


def test_a_prepared_scheduler_sets_the_rate() -> None:
    net = network()
    expected = BackMatchSGD(net, **SETTINGS)
    plain(net, expected, scheduler=LambdaLR(expected, lambda step: 0.5**step))
    assert_same(Prepared(halve=True).train(), expected)
    assert expected.param_groups[0]["lr"] == SETTINGS["lr"] * 0.5 ** (2 * BATCHES)


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss"])
def test_accumulation_and_clipping_are_those_of_the_plain_loop(estimator: str) -> None:
    run = Prepared(batches=6, accumulate=2, estimator=estimator).train(clip=0.1)
    assert run.param_groups[0]["step"] == 6
    assert_same(run, trained(accumulate=2, clip=0.1, estimator=estimator))


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss"])
def test_mixed_precision_is_autocast_within_forward(estimator: str) -> None:
    """Accelerate wraps ``model.forward``, beneath the hooks, and makes the output float32; the probe calls that same forward."""

    class Autocast(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(input).float()

    run = Prepared(mixed_precision="bf16", estimator=estimator).train()
    assert_same(run, trained(Autocast(*network()), estimator=estimator))


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_loaded_state_continues_as_the_uninterrupted_run(tmp_path: Path, epochs: int) -> None:
    first = Prepared()
    first.train(epochs=epochs)
    first.accelerator.save_state(str(tmp_path))
    again = Prepared()
    nn.init.zeros_(again.net[0].weight)
    again.accelerator.load_state(str(tmp_path))
    assert_same(again.train(epochs=2), trained(epochs=epochs + 2))


def test_a_loaded_state_replaces_that_of_a_trained_optimizer(tmp_path: Path) -> None:
    run = Prepared()
    run.train(epochs=1)
    run.accelerator.save_state(str(tmp_path))
    run.train(epochs=3)
    run.accelerator.load_state(str(tmp_path))
    assert_same(run.train(epochs=1), trained(epochs=2))


def test_an_optimizer_prepared_before_its_model_trains_it() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    net = network()
    optimizer = accelerator.prepare(BackMatchSGD(net, **SETTINGS))
    net = accelerator.prepare(net)
    plain(net, optimizer)
    assert_same(optimizer.optimizer, trained())


@pytest.mark.timeout(300)
def test_the_example_runs() -> None:
    assert "test accuracy from the saved state" in run_example("accelerate_digits.py")
