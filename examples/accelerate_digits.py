"""Handwritten digits with Accelerate: the optimizer is prepared like any other, and saved with everything else.

Run: pip install accelerate scikit-learn; python examples/accelerate_digits.py
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset, random_split

from backmatch import BackMatchSGD

EPOCHS = 10

if __name__ == "__main__":
    set_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train, test = random_split(data, (1500, 297))

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = BackMatchSGD(model)
    scheduler = CosineAnnealingLR(optimizer, T_max=EPOCHS * 30)
    model, optimizer, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, DataLoader(train, 25, shuffle=True))
    x_test, y_test = (tensor.to(accelerator.device) for tensor in test[:])

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        return (model(x_test).argmax(1) == y_test).float().mean().item()

    before = accuracy()
    for _ in range(EPOCHS):
        model.train()
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    after = accuracy()
    accelerator.print(f"test accuracy before {before:.3f}, after {EPOCHS} epochs {after:.3f}")

    with TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        nn.init.zeros_(accelerator.unwrap_model(model)[0].weight)
        accelerator.load_state(folder)
    accelerator.print(f"test accuracy from the saved state {accuracy():.3f}")
    assert accuracy() == after > 0.9
