"""Handwritten digits with Lightning: the optimizer goes into ``configure_optimizers``.

Run: pip install lightning scikit-learn; python examples/lightning_digits.py
"""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from backmatch import BackMatchSGD


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> BackMatchSGD:
        # The module that training_step calls. Lightning does not call this one: no forward of it would be seen.
        return BackMatchSGD(self.net)


if __name__ == "__main__":
    lightning.seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train, test = random_split(data, (1500, 297))
    model = Digits()
    trainer = lightning.Trainer(
        max_epochs=10,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = trainer.validate(model, DataLoader(test, 297), verbose=False)[0]["accuracy"]
    trainer.fit(model, DataLoader(train, 50, shuffle=True), DataLoader(test, 297))
    after = trainer.callback_metrics["accuracy"].item()
    print(f"test accuracy before {before:.3f}, after {trainer.max_epochs} epochs {after:.3f}")
    assert after > 0.9
