"""Image data sets as tensors: where they come from, and how they are cut into batches."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from backmatch.cli.checkpoint import crc32_of
from backmatch.cli.sampling import HELD_OUT, generator_of, split_rows

if TYPE_CHECKING:
    import datasets

Augment = Literal["none", "crop-flip"]

CROP_PADDING = 4
EVALUATION_BATCH = 500
_TEST_SPLITS = ("test", "validation", "valid", "val")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in memory: ``uint8`` images ``[N, C, H, W]`` and ``int64`` labels ``[N]`` for training and for testing."""

    unit: ClassVar[str] = "images"

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel over the training images, each ``[C, 1, 1]``, in units of a pixel (0 to 255)."""
        values = torch.arange(256, dtype=torch.float64)
        counts = [torch.bincount(channel.reshape(-1).cpu(), minlength=256) for channel in self.train_images.unbind(1)]
        shares = torch.stack(counts) / counts[0].sum().double()
        mean = shares @ values
        std = (shares @ values.square() - mean.square()).clamp_min(0).sqrt()
        std[std == 0] = 1  # a constant channel carries nothing, and must not carry inf
        device = self.train_images.device
        return mean.float().view(-1, 1, 1).to(device), std.float().view(-1, 1, 1).to(device)

    @cached_property
    def checksum(self) -> int:
        """CRC-32 over all images and labels: two runs with equal checksums saw the same data."""
        return crc32_of(self.train_images, self.train_labels, self.test_images, self.test_labels)

    def to(self, device: torch.device) -> ImageData:
        """The same data on ``device``."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def normalize(self, images: Tensor) -> Tensor:
        """``uint8`` images to ``float32`` with the training set's mean 0 and standard deviation 1 in every channel."""
        mean, std = self.moments
        return images.float().sub_(mean).div_(std)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many images there are to train on and to test on."""
        return len(self.train_images), len(self.test_images)

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches :meth:`batches` gives."""
        return max(1, len(self.train_images) // batch_size)

    def check_augment(self, augment: str) -> None:
        """Raise ValueError unless it is known."""
        if augment not in ("none", "crop-flip"):
            raise ValueError(f"Invalid augment: {augment!r}. Must be 'none' or 'crop-flip'.")

    def batches(
        self, *, epoch: int, seed: int, batch_size: int, augment: Augment = "none", start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one epoch: normalised images ``[batch_size, C, H, W]`` (channels last) and their labels.

        Order and augmentation depend on ``(seed, epoch, batch index)`` only, so ``start=k`` gives the batches from the k-th on, bit
        for bit. The last batch is dropped unless it is full: all steps weigh their images alike, and no batch normalisation sees
        one image. A training set smaller than ``batch_size`` is one batch.

        Raises:
            ValueError: If ``augment`` is not known.
        """
        self.check_augment(augment)
        images, labels = self.train_images, self.train_labels
        batch_size = min(batch_size, len(images))
        order = torch.randperm(len(images), generator=generator_of(seed, epoch)).to(images.device)
        for index in range(start, self.steps_per_epoch(batch_size)):
            rows = order[index * batch_size : (index + 1) * batch_size]
            batch = images[rows]
            if augment == "crop-flip":
                batch = crop_flip(batch, generator_of(seed, epoch, index))
            yield self.normalize(batch).clone(memory_format=layout(batch.device)), labels[rows]

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images, normalised, in order, and their labels."""
        pairs = zip(self.test_images.split(EVALUATION_BATCH), self.test_labels.split(EVALUATION_BATCH), strict=True)
        for images, labels in pairs:
            yield self.normalize(images).clone(memory_format=layout(images.device)), labels


def layout(device: torch.device) -> torch.memory_format:
    """How images and convolutions lie in memory: channels last is faster, but only where it is safe.

    On CPUs without AVX-512 the backward of a 1x1 convolution with stride 2 corrupts memory then in torch 2.13 (oneDNN), and kills the
    process. A clone in this format, unlike ``contiguous``, also settles the strides of a single channel, which could pass for either.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to 4 pixels each way, filling with 0 (black), and mirror half of them.

    Args:
        images: ``[N, C, H, W]``, any dtype.
        generator: On the CPU, whatever the device of ``images``: the draws do not depend on the device.

    Returns:
        A new tensor of the same shape.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns) + left[:, None]
    rows = torch.arange(height) + top[:, None]
    padded = torch.nn.functional.pad(images, (CROP_PADDING,) * 4).permute(0, 2, 3, 1).contiguous()
    index = (torch.arange(count)[:, None, None] * padded.shape[1] + rows[:, :, None]) * padded.shape[2] + columns[:, None, :]
    pixels = padded.flatten(0, 2).index_select(0, index.flatten().to(images.device))
    return pixels.view(count, height, width, -1).permute(0, 3, 1, 2)


def read_digits(source: str, validation: bool, generator: torch.Generator, limit: int | None) -> ImageData:
    """scikit-learn's handwritten digits, 8x8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError("The data set 'digits' comes with scikit-learn: pip install 'backmatch[demo]'.") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    # One draw for every seed: a test set that moved with a seed would not be comparable between runs.
    train, test = split_rows(len(images), 360, torch.Generator().manual_seed(0))
    if validation:
        keep, held_out = split_rows(len(train), round(HELD_OUT * len(train)), generator)
        train, test = train[keep], train[held_out]
    train = train[:limit]
    return ImageData(images[train], labels[train], images[test], labels[test], tuple(str(digit) for digit in range(10)))


def read_images(source: str, validation: bool, generator: torch.Generator, limit: int | None) -> ImageData:
    """What Hugging Face ``datasets`` opens under ``source``."""
    splits = _open(source)
    if "train" not in splits:
        raise ValueError(f"Data set {source!r} has no split 'train'. Found: {', '.join(splits)}.")
    train_split = splits["train"]
    test_name = next((name for name in _TEST_SPLITS if name in splits), None)
    train = torch.arange(len(train_split))
    if validation or test_name is None:
        if not validation:
            print(f"{source}: no test split; {HELD_OUT:.0%} of the training images are held out for testing.", file=sys.stderr)
            generator = torch.Generator().manual_seed(0)
        train, test = split_rows(len(train), round(HELD_OUT * len(train)), generator)
        test_split = train_split
    else:
        test_split = splits[test_name]
        test = torch.arange(len(test_split))
    if limit is not None and limit < len(train):
        train = train[torch.randperm(len(train), generator=generator)[:limit]]
    train, test = train.sort().values, test.sort().values  # in stored order: reading is several times faster
    if len(train) < 2 or len(test) == 0:
        raise ValueError(f"Data set {source!r} is too small: {len(train)} images to train and {len(test)} to test. Needs 2 and 1.")

    image_column, label_column = _columns(source, train_split.features)
    train_labels = _labels(source, train_split, train, label_column)
    test_labels = _labels(source, test_split, test, label_column)
    names = getattr(train_split.features[label_column], "names", None)
    if names is None:
        labels = torch.cat([train_labels, test_labels])
        highest, different = int(labels.max()), len(labels.unique())
        if highest >= _MANY_CLASSES and highest >= 10 * different:
            raise ValueError(
                f"Data set {source!r}: its highest label is {highest}, of only {different} that are used, and the model would have "
                "an output for each up to it. Number the classes from 0 on, without gaps."
            )
        names = [str(index) for index in range(1 + highest)]
    for labels in (train_labels, test_labels):
        if int(labels.max()) >= len(names):
            raise ValueError(f"Data set {source!r}: label {int(labels.max())} is out of range for {len(names)} classes.")
    pixels = _images(source, train_split, train, image_column)
    pixels += _images(source, test_split, test, image_column, size=pixels[0].shape[:2])
    train_images, test_images = _stack(pixels).split([len(train), len(test)])
    return ImageData(train_images, train_labels, test_images, test_labels, tuple(names))


_KNOWN_SOURCES = "Give 'digits', a folder of parquet files or of images, a text file, 'python-docs', or a name on the Hugging Face hub."
_MANY_CLASSES = 10_000
"""Labels beyond this are taken for what numbers something else, if few of them are used."""


def _open(source: str) -> dict[str, datasets.Dataset]:
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(f"Reading {source!r} needs Hugging Face datasets: pip install 'backmatch[data]'.") from error
    folder = Path(source)
    if not source or (not folder.exists() and (source.startswith(("/", ".", "~")) or folder.suffix[1:].isalpha())):
        raise FileNotFoundError(f"No file or folder {source!r}. {_KNOWN_SOURCES}")  # nor the name of a data set, which the hub knows
    if folder.is_dir() and not any(folder.iterdir()):
        raise FileNotFoundError(f"Data folder {source!r} is empty. Put parquet files, or images in one folder per class, there.")
    try:
        return dict(datasets.load_dataset(source))
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"No data set {source!r}: {_first_line(error)} {_KNOWN_SOURCES}") from error
    except Exception as error:  # a broken file raises whatever its reader raises: ArrowInvalid, DatasetGenerationError, ...
        cause = error.__cause__ or error
        raise ValueError(f"Cannot read data set {source!r}: {_first_line(cause)} Check its files, or fetch them anew.") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."


def _columns(source: str, features: dict[str, Any]) -> tuple[str, str]:
    """Names of the image column and the label column."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name, feature in features.items() if str(getattr(feature, "dtype", "")).startswith(("int", "uint"))]
    found = ", ".join(f"{name} ({getattr(feature, 'dtype', None) or type(feature).__name__})" for name, feature in features.items())
    if len(images) != 1:
        raise ValueError(f"Data set {source!r} must have one image column, but has {len(images)}. Columns: {found}.")
    preferred = [name for name in _LABEL_COLUMNS if name in labels] or labels
    if not preferred or (len(preferred) > 1 and preferred == labels):
        raise ValueError(f"Data set {source!r} must have one column of class labels, best called 'label'. Columns: {found}.")
    return images[0], preferred[0]


def _labels(source: str, split: datasets.Dataset, rows: Tensor, column: str) -> Tensor:
    labels = list(split.select(rows.tolist())[column])
    for row, label in zip(rows.tolist(), labels, strict=True):
        if label is None or label < 0:
            what = "missing" if label is None else str(label)
            raise ValueError(f"Data set {source!r}: label of {split.split} image {row} is {what}. Every image needs a class from 0 up.")
    return torch.tensor(labels, dtype=torch.int64)


def _images(source: str, split: datasets.Dataset, rows: Tensor, column: str, size: tuple[int, ...] | None = None) -> list[np.ndarray]:
    """Every image as ``[H, W]`` (grey) or ``[H, W, 3]``; all of ``size`` (that of the first by default)."""
    import datasets
    from PIL import Image

    decoded: list[np.ndarray] = []
    indices = rows.tolist()
    stored_images = split.select(indices).select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for batch in stored_images.iter(1000):
        for stored in batch[column]:
            name = f"{split.split} image {indices[len(decoded)]}"
            if not stored or (stored["bytes"] is None and stored["path"] is None):
                raise ValueError(f"Data set {source!r}: {name} is missing.")
            name += f" ({stored['path']})" if stored["path"] else ""
            try:
                with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]) as image:
                    if image.mode.startswith(("I", "F")):
                        raise ValueError(f"mode {image.mode} has more than 8 bits per channel; convert it to 8 bits")
                    decoded.append(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
            # What Pillow raises for damaged files, and for those that would take gigabytes.
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"Data set {source!r}: cannot decode {name}: {_first_line(error)}") from error
            size = size or decoded[0].shape[:2]
            if decoded[-1].shape[:2] != size:
                seen = "x".join(str(side) for side in decoded[-1].shape[:2])
                raise ValueError(
                    f"Data set {source!r}: {name} is {seen} (height x width), the first is {size[0]}x{size[1]}. Resize them to one size."
                )
    return decoded


def _stack(images: list[np.ndarray]) -> Tensor:
    """``[N, C, H, W]``; grey images among coloured ones become coloured."""
    if len({image.ndim for image in images}) > 1:
        images = [np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image for image in images]
    stacked = torch.from_numpy(np.stack(images))
    return (stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)).contiguous()
