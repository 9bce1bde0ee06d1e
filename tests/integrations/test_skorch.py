"""skorch builds the optimizer itself, anew for every fit and every clone that scikit-learn makes."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from backmatch import BackMatchSGD
from tests.integrations.cases import EXAMPLES, SETTINGS, assert_same, dataset, network, run_example, tensors, trained

pytest.importorskip("skorch", reason="skorch is not installed: make test-integrations")
sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed: make test-integrations")
from sklearn.base import clone  # noqa: E402
from sklearn.model_selection import cross_val_score  # noqa: E402

spec = importlib.util.spec_from_file_location("skorch_digits", EXAMPLES / "skorch_digits.py")
assert spec is not None
assert spec.loader is not None
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def classifier(**changes: Any) -> Any:
    settings = {"lr": SETTINGS["lr"]} | {f"optimizer__{name}": value for name, value in SETTINGS.items() if name != "lr"}
    usual = {"optimizer": BackMatchSGD, "batch_size": 8, "max_epochs": 2, "train_split": None, "verbose": 0}
    return example.BackMatchClassifier(network, criterion=nn.CrossEntropyLoss, **usual | settings | changes)


X, Y = (tensor.numpy() for tensor in dataset().tensors)


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss", "rules"])
def test_fit_is_the_plain_loop(estimator: str) -> None:
    assert_same(classifier(optimizer__estimator=estimator).fit(X, Y).optimizer_, trained(estimator=estimator))


def test_fit_starts_afresh_and_partial_fit_goes_on() -> None:
    net = classifier().fit(X, Y)
    assert_same(net.fit(X, Y).optimizer_, trained())
    assert_same(net.partial_fit(X, Y).optimizer_, trained(epochs=4))


def test_predictions_are_not_measured() -> None:
    net = classifier(max_epochs=1).fit(X, Y)
    net.predict_proba(9 * X)
    assert_same(net.partial_fit(X, Y).optimizer_, trained())


def test_a_clone_trains_a_network_of_its_own() -> None:
    net = classifier().fit(X, Y)
    copied = clone(net).fit(X, Y)
    assert not set(tensors(copied.optimizer_)) & set(tensors(net.optimizer_))
    assert_same(copied.optimizer_, trained())
    scores = cross_val_score(classifier(), X, Y, cv=2)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_saved_parameters_continue_as_the_uninterrupted_run(tmp_path: Path, epochs: int) -> None:
    files = {"f_params": tmp_path / "net.pt", "f_optimizer": tmp_path / "optimizer.pt", "f_history": tmp_path / "history.json"}
    classifier(max_epochs=epochs).fit(X, Y).save_params(**files)
    net = classifier().initialize()
    nn.init.zeros_(net.module_[0].weight)
    net.load_params(**files)
    assert_same(net.partial_fit(X, Y).optimizer_, trained(epochs=epochs + 2))


def test_a_pickled_classifier_continues_as_the_uninterrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skorch_digits", example)
    net = pickle.loads(pickle.dumps(classifier().fit(X, Y)))
    assert net.optimizer_._model is net.module_
    assert_same(net.partial_fit(X, Y).optimizer_, trained(epochs=4))


def test_set_params_sets_the_rate_of_every_group() -> None:
    net = classifier(max_epochs=1, optimizer__param_groups=[("0.*", {"weight_decay": 0.0})]).fit(X, Y)
    net.set_params(lr=0.0)
    assert [group["lr"] for group in net.optimizer_.param_groups] == [0.0, 0.0]
    before = [p.detach().clone() for p in tensors(net.optimizer_)]
    net.partial_fit(X, Y)
    assert all(torch.equal(p, old) for p, old in zip(tensors(net.optimizer_), before, strict=True))
    assert [group["weight_decay"] for group in net.optimizer_.param_groups] == [0.0, 1e-3]


@pytest.mark.timeout(300)
def test_the_example_runs() -> None:
    assert "cross-validation chose" in run_example("skorch_digits.py")
