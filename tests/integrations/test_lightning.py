"""Lightning runs the step's forward in a closure, before zero_grad; it must be the plain loop all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from backmatch import BackMatchSGD
from tests.integrations.cases import BATCHES, SETTINGS, assert_same, loader, network, plain, run_example, trained

lightning = pytest.importorskip("lightning", reason="lightning is not installed: make test-integrations")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning")


class Classifier(lightning.LightningModule):
    """``settings`` are the optimizer's; ``kind`` is how the network is trained."""

    def __init__(self, kind: str = "network", **settings: Any) -> None:
        super().__init__()
        self.net = network()
        self.kind, self.settings = kind, SETTINGS | settings
        self.automatic_optimization = kind != "manual"

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self(x) if self.kind == "forward" else self.net(x), y)
        if self.kind == "manual":
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, _ = batch
        self(9.0 * x)

    def configure_optimizers(self) -> Any:
        optimizer = BackMatchSGD(self if self.kind == "forward" else self.net, **self.settings)
        return ([optimizer], [CosineAnnealingLR(optimizer, T_max=2)]) if self.kind == "scheduled" else optimizer


def fit(model: Classifier, *, batches: int = BATCHES, resume: Path | None = None, **arguments: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(**{"max_epochs": 2, "accelerator": "cpu"} | quiet | arguments)
    trainer.fit(model, loader(batches), loader(1), ckpt_path=resume, weights_only=None if resume is None else True)
    return trainer


def optimizer_of(model: Classifier) -> BackMatchSGD:
    optimizer = model.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, BackMatchSGD)
    return optimizer


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss", "rules"])
@pytest.mark.parametrize("kind", ["network", "manual"])
def test_fit_is_the_plain_loop(kind: str, estimator: str) -> None:
    model = Classifier(kind, estimator=estimator)
    fit(model)
    assert_same(optimizer_of(model), trained(estimator=estimator))


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
def test_a_lightning_module_whose_forward_is_called_may_be_the_model(estimator: str) -> None:
    model = Classifier("forward", estimator=estimator)
    fit(model)
    assert_same(optimizer_of(model), trained(estimator=estimator))
    assert set(optimizer_of(model).paces()) == {name for name, _ in model.named_parameters()}


@pytest.mark.filterwarnings("error:BackMatchSGD")
def test_a_lightning_module_whose_forward_is_not_called_is_told_of() -> None:
    class Wrong(Classifier):
        def configure_optimizers(self) -> BackMatchSGD:
            return BackMatchSGD(self, estimator="probe")

    with pytest.raises(UserWarning, match="Build it on the model that you call"):
        fit(Wrong())


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss"])
def test_accumulation_and_clipping_are_those_of_the_plain_loop(estimator: str) -> None:
    model = Classifier(estimator=estimator)
    trainer = fit(model, batches=6, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert trainer.global_step == 6
    assert_same(optimizer_of(model), trained(estimator=estimator, accumulate=2, clip=0.1))
    unclipped = trained(estimator=estimator, accumulate=2)
    assert any(not torch.equal(a, b) for a, b in zip(model.net.parameters(), unclipped.param_groups[0]["params"], strict=True))


def test_a_scheduler_sets_the_rate() -> None:
    model, net = Classifier("scheduled"), network()
    fit(model)
    expected = BackMatchSGD(net, **SETTINGS)
    plain(net, expected, epochs=1)
    expected.param_groups[0]["lr"] = SETTINGS["lr"] / 2
    plain(net, expected, epochs=1)
    assert_same(optimizer_of(model), expected, rtol=1e-6, atol=1e-8)


def test_bfloat16_autocast_is_that_of_the_plain_loop() -> None:
    class Wide(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, y = batch
            return cross_entropy(self.net(x).float(), y)

    model = Wide()
    fit(model, precision="bf16-mixed")
    assert_same(optimizer_of(model), trained(autocast=True))


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path, epochs: int) -> None:
    """One and two epochs end between two measurements, four at one."""
    file = tmp_path / "last.ckpt"
    fit(Classifier(), max_epochs=epochs).save_checkpoint(file)
    (state,) = torch.load(file, weights_only=True)["optimizer_states"]
    assert state["param_groups"][0]["step"] == BATCHES * epochs
    model = Classifier()
    nn.init.zeros_(model.net[0].weight)
    fit(model, max_epochs=epochs + 2, resume=file)
    assert_same(optimizer_of(model), trained(epochs=epochs + 2))


@pytest.mark.timeout(300)
def test_the_example_runs() -> None:
    assert "test accuracy before" in run_example("lightning_digits.py")
