"""Tasks: the published networks, and data of which the held-out part is apart."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("sklearn")

from benchmarks.tasks import TASKS, autoencoder, cifar10_3c3d, digits_cnn, friedman, reconstruction, regression_mlp


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_3c3d_is_deepobs_network() -> None:
    model = cifar10_3c3d(None)
    assert parameters(model) == 895_210  # Dangel, Kunstner and Hennig (2020), table of test problems
    shapes = []
    x = torch.randn(2, 3, 32, 32)
    for module in model:
        x = module(x)
        shapes += [tuple(x.shape[1:])] if isinstance(module, nn.MaxPool2d) else []
    assert shapes == [(64, 14, 14), (96, 6, 6), (128, 3, 3)]  # TensorFlow's "same" pooling
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_pooling_with_ceil_mode_is_padding_below_and_right_after_a_relu() -> None:
    x = torch.randn(2, 3, 28, 28).relu()
    padded = nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1)), 3, stride=2)
    assert torch.equal(nn.functional.max_pool2d(x, 3, stride=2, ceil_mode=True), padded)


def test_autoencoder_is_that_of_the_curvature_papers() -> None:
    model = autoencoder(None)
    assert parameters(model) == 2_837_314
    linears = [module for module in model if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linears] == [1000, 500, 250, 30, 250, 500, 1000, 784]
    assert isinstance(model[6], nn.Linear)  # the code of 30 is linear
    assert isinstance(model[7], nn.Linear)


@pytest.mark.parametrize(("build", "shape", "out"), [(digits_cnn, (1, 8, 8), 10), (regression_mlp, (10,), 1)])
def test_small_networks_take_their_data(build: object, shape: tuple[int, ...], out: int) -> None:
    assert build(None)(torch.randn(4, *shape)).shape == (4, out)  # type: ignore[operator]


def test_reconstruction_is_cross_entropy_summed_over_pixels() -> None:
    data = SimpleNamespace(moments=(torch.tensor(100.0), torch.tensor(50.0)))
    pixels = torch.tensor([[[[0.0, 255.0]]]])
    score = reconstruction(data, nn.Identity(), (pixels - 100) / 50, torch.tensor([0]))
    # The model gives the pixels back as logits, 0 for a pixel of 0 and 1 for a pixel of 1.
    assert score.loss.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(-1)))
    assert (score.count, score.correct) == (1, None)


def test_held_out_rows_are_apart_and_training_rows_standardised() -> None:
    whole, tuning = friedman(Path(), False), friedman(Path(), True)
    for data, sizes in ((whole, (4000, 1000)), (tuning, (3600, 400))):
        assert (len(data.train[0]), len(data.test[0])) == sizes
        for values in data.train:
            assert_close(values.mean(0), torch.zeros_like(values.mean(0)), atol=1e-5, rtol=0)
            assert_close(values.std(0), torch.ones_like(values.std(0)), atol=1e-4, rtol=0)
    rows = {tuple(row.tolist()) for row in tuning.train[0]}
    assert not rows & {tuple(row.tolist()) for row in tuning.test[0]}


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = friedman(Path(), False)

    def first(seed: int, epoch: int) -> torch.Tensor:
        return next(iter(data.batches(epoch=epoch, seed=seed, batch_size=32, augment="none")))[0]

    assert torch.equal(first(0, 1), first(0, 1))
    assert not torch.equal(first(0, 1), first(1, 1))
    assert not torch.equal(first(0, 1), first(0, 2))
    assert sum(len(x) for x, _ in data.batches(epoch=0, seed=0, batch_size=64, augment="none")) == 62 * 64
    elsewhere = data.to(torch.device("meta"))
    assert {tensor.device.type for part in (elsewhere.train, elsewhere.test) for tensor in part} == {"meta"}


def test_l2_is_half_the_squared_weights_and_no_biases() -> None:
    task = TASKS["cifar10-3c3d"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    plain = nn.functional.cross_entropy(model(x), y)
    assert_close(task.training_loss(None, model, x, y), plain + 1e-3 * model[1].weight.square().sum())
    assert task.score(None, model, x, y).loss.item() == pytest.approx(5 * plain.item(), rel=1e-5)
