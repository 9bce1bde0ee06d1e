"""Handwritten digits with skorch: a classifier for scikit-learn whose optimizer is told of its module.

Run: pip install skorch scikit-learn; python examples/skorch_digits.py
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from skorch import NeuralNetClassifier
from torch import nn

from backmatch import BackMatchSGD


class BackMatchClassifier(NeuralNetClassifier):
    def get_params_for_optimizer(self, prefix: str, named_parameters: Any) -> tuple[Any, dict[str, Any]]:
        args, kwargs = super().get_params_for_optimizer(prefix, named_parameters)
        return args, kwargs | {"model": self.module_}


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split((x / 16).astype("float32"), y, test_size=297, random_state=0)
    net = BackMatchClassifier(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=BackMatchSGD,
        lr=0.01,
        optimizer__momentum=0.9,
        batch_size=50,
        max_epochs=10,
        train_split=None,
        verbose=0,
    )
    before = net.initialize().score(x_test, y_test)
    print(f"test accuracy before {before:.3f}, after {net.max_epochs} epochs {net.fit(x_train, y_train).score(x_test, y_test):.3f}")

    search = GridSearchCV(net, {"lr": [0.003, 0.01, 0.03], "max_epochs": [5]}, cv=2).fit(x_train, y_train)
    after = search.score(x_test, y_test)
    print(f"cross-validation chose lr {search.best_params_['lr']}: test accuracy {after:.3f}")
    assert after > 0.9
