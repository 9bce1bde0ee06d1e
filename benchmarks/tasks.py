"""What is trained: data, model, loss and number of steps of every task of the panel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backmatch.cli.checkpoint import crc32_of
from backmatch.cli.data import load_data
from backmatch.cli.models import build_model
from backmatch.cli.sampling import HELD_OUT, generator_of, split_rows

Budget = Literal["small", "full"]


class Data(Protocol):
    """What a task trains on; :class:`backmatch.cli.images.ImageData` and :class:`backmatch.cli.text.TextData` are such."""

    def batches(self, *, epoch: int, seed: int, batch_size: int, augment: Any) -> Iterator[tuple[Tensor, Tensor]]: ...

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def to(self, device: torch.device) -> Any: ...

    @property
    def checksum(self) -> int: ...


@dataclass(frozen=True)
class Score:
    """Of one batch: the loss summed over its predictions, how many those are, and how many of them hit (None where none can)."""

    loss: Tensor
    count: int
    correct: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """One row of the panel.

    Attributes:
        name: As in file names and on the command line.
        title: As in the report.
        unit: Of the loss that is compared.
        load: From the folder of all data and whether to hold out training data in place of the test data.
        model: From the data, with initial weights from torch's global generator.
        score: From the data, the model, inputs and labels.
        steps: Of every run, by the budgets that have this task.
        batch_size: Samples per step.
        augment: As in ``backmatch train``.
        l2: Factor of half the squared length of all weights (no biases) in the training loss; it is part of the task, so all peers
            have it, and no evaluation does.
    """

    name: str
    title: str
    unit: str
    load: Callable[[Path, bool], Any]
    model: Callable[[Any], nn.Module]
    score: Callable[[Any, nn.Module, Tensor, Tensor], Score]
    steps: Mapping[Budget, int] = field(default_factory=dict)
    batch_size: int = 128
    augment: str = "none"
    l2: float = 0.0

    def check_data(self, folder: Path) -> None:
        """Raise FileNotFoundError if what it is to load is not in the folder of all data."""
        if isinstance(self.load, Stored):
            self.load.check(folder)

    def training_loss(self, data: Any, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over the predictions of a batch, and the task's L2 term."""
        score = self.score(data, model, inputs, labels)
        loss = score.loss / score.count
        if self.l2:
            loss = loss + 0.5 * self.l2 * sum(p.square().sum() for name, p in model.named_parameters() if name.endswith("weight"))
        return loss


def classification(data: Any, model: nn.Module, inputs: Tensor, labels: Tensor) -> Score:
    """Cross-entropy; of text, every position is a prediction."""
    logits, labels = model(inputs).flatten(0, -2), labels.flatten()
    return Score(F.cross_entropy(logits, labels, reduction="sum"), labels.numel(), (logits.argmax(-1) == labels).sum())


def reconstruction(data: Any, model: nn.Module, inputs: Tensor, labels: Tensor) -> Score:
    """Cross-entropy of every pixel, from 0 to 1, with its reconstruction, summed over the pixels of an image."""
    mean, std = data.moments
    images = (inputs * std + mean).flatten(1).div(255.0).clamp(0.0, 1.0)
    return Score(F.binary_cross_entropy_with_logits(model(images), images, reduction="sum"), len(images))


def regression(data: Any, model: nn.Module, inputs: Tensor, labels: Tensor) -> Score:
    """Squared error."""
    return Score(F.mse_loss(model(inputs).squeeze(-1), labels, reduction="sum"), len(labels))


@dataclass(frozen=True, eq=False)
class TableData:
    """Rows of numbers and a number to predict from each, both with mean 0 and standard deviation 1 over the training rows."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def batches(self, *, epoch: int, seed: int, batch_size: int, augment: Any) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.train
        order = torch.randperm(len(inputs), generator=generator_of(seed, epoch)).to(inputs.device)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            yield inputs[rows], targets[rows]

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.test

    @cached_property
    def checksum(self) -> int:
        """CRC-32 over all numbers: two runs with equal checksums saw the same data."""
        return crc32_of(*self.train, *self.test)

    def to(self, device: torch.device) -> TableData:
        """The same rows on ``device``."""
        return TableData(*(tuple(tensor.to(device) for tensor in part) for part in (self.train, self.test)))  # type: ignore[arg-type]


def friedman(folder: Path, validation: bool) -> TableData:
    """Friedman's first problem: ``10 sin(π x₁ x₂) + 20 (x₃ − ½)² + 10 x₄ + 5 x₅`` and noise; of ten inputs five say nothing."""
    from sklearn.datasets import make_friedman1

    inputs, targets = (torch.from_numpy(values).float() for values in make_friedman1(5000, noise=1.0, random_state=0))
    rows = torch.arange(4000), torch.arange(4000, 5000)
    if validation:
        rows = split_rows(4000, round(HELD_OUT * 4000), torch.Generator().manual_seed(0))
    kept = rows[0]
    inputs = (inputs - inputs[kept].mean(0)) / inputs[kept].std(0)
    targets = (targets - targets[kept].mean()) / targets[kept].std()
    train, test = ((inputs[part], targets[part]) for part in rows)
    return TableData(train, test)


@lru_cache(maxsize=2)
def _read(source: str, validation: bool) -> Any:
    return load_data(source, validation=validation)


@dataclass(frozen=True)
class Stored:
    """A folder or file in the folder of all data."""

    name: str

    def __call__(self, folder: Path, validation: bool) -> Any:
        self.check(folder)
        return _read(str(folder / self.name), validation)

    def check(self, folder: Path) -> None:
        """Raise FileNotFoundError if it is not there."""
        if not (folder / self.name).exists():
            raise FileNotFoundError(
                f"No {self.name} in {str(folder)!r}. Give as --data the folder of cifar10/, mnist/ and tinyshakespeare.txt."
            )


def digits(folder: Path, validation: bool) -> Any:
    """They come with scikit-learn."""
    return _read("digits", validation)


def _named(name: str, width: float = 1.0) -> Callable[[Any], nn.Module]:
    return lambda data: build_model(name, in_shape=data.in_shape, classes=len(data.class_names), width=width)


def digits_cnn(data: Any) -> nn.Module:
    """Three convolutions and two linear layers for 8x8 images, torch's default initialisation."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def autoencoder(data: Any) -> nn.Module:
    """784-1000-500-250-30 and back (Hinton and Salakhutdinov 2006), ReLU, torch's default initialisation."""
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(d_in, d_out)] if index in (3, len(sizes) - 2) else [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers)


def cifar10_3c3d(data: Any) -> nn.Module:
    """DeepOBS's test problem (Schneider, Balles and Hennig 2019): 895,210 parameters, Xavier weights, biases 0.

    Its pooling pads as TensorFlow's "same" does, below and to the right; after a ReLU ``ceil_mode`` gives the same values.
    """
    pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), pool),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), pool),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), pool),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            initialise = nn.init.xavier_normal_ if isinstance(module, nn.Conv2d) else nn.init.xavier_uniform_
            initialise(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


def regression_mlp(data: Any) -> nn.Module:
    """Ten inputs, two hidden layers of 64, torch's default initialisation."""
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


_NATS, _TEXT = "cross-entropy, nats", "tinyshakespeare.txt"
_CIFAR: dict[str, Any] = {"load": Stored("cifar10"), "score": classification, "unit": _NATS, "augment": "crop-flip"}

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("digits-cnn", "CNN, digits", _NATS, digits, digits_cnn, classification, {"small": 150, "full": 400}, 64),
        Task("friedman", "MLP, regression (Friedman 1)", "squared error / variance", friedman, regression_mlp, regression,
             {"small": 300, "full": 1500}, 64),
        Task("mnist-mlp", "MLP, MNIST", _NATS, Stored("mnist"), _named("mlp"), classification, {"small": 200, "full": 1400}),
        Task("mnist-mlp-15", "MLP of 15 layers, MNIST", _NATS, Stored("mnist"), _named("mlp-15"), classification, {"full": 1400}),
        Task("mnist-autoencoder", "Deep autoencoder, MNIST", "cross-entropy per image, nats", Stored("mnist"), autoencoder, reconstruction,
             {"full": 1400}),
        Task("cifar10-vgg13-bn", "VGG13-BN (0.25), CIFAR-10", model=_named("vgg13-bn", 0.25), steps={"full": 780}, **_CIFAR),
        Task("cifar10-vgg13", "VGG13 (0.25) without BN, CIFAR-10", model=_named("vgg13", 0.25), steps={"full": 780}, **_CIFAR),
        Task("cifar10-resnet20", "ResNet-20, CIFAR-10", model=_named("resnet20"), steps={"full": 780}, **_CIFAR),
        Task("cifar10-vit", "ViT, CIFAR-10", model=_named("vit"), steps={"full": 250}, **_CIFAR),
        Task("cifar10-3c3d", "3c3d, CIFAR-10 (DeepOBS)", model=cifar10_3c3d, steps={"full": 780}, l2=2e-3, **_CIFAR),
        Task("gpt", "GPT, characters", _NATS, Stored(_TEXT), _named("gpt-mini"), classification, {"full": 500}, 32),
        Task("gpt-short", "GPT at half width, characters", _NATS, Stored(_TEXT), _named("gpt-mini", 0.5), classification,
             {"small": 150}, 16),
    )
}  # fmt: skip
