"""Data sets by their name or place."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch

from backmatch.cli.images import ImageData, read_digits, read_images
from backmatch.cli.text import PYTHON_DOCS, TextData, read_text

TrainingData: TypeAlias = ImageData | TextData
"""What a model trains on: ``batches`` and ``evaluation_batches`` of inputs and labels, and what they are like."""


def load_data(source: str, *, validation: bool = False, seed: int = 0, limit: int | None = None) -> TrainingData:
    """Read a data set.

    Args:
        source: ``"digits"`` (8x8, comes with scikit-learn), a folder of parquet files or of images in one folder per class, or a name
            on the Hugging Face hub: images. Splits are ``train`` and ``test`` (or ``validation``); without the latter a tenth of the
            training images is held out, and a line says so. ``"python-docs"`` (comes with Python) or a text file: characters.
        validation: Put a tenth of the training data in place of the test data, which are then not read: for tuning.
        seed: Of the draws that hold images out and that ``limit`` makes; independent of a run's seed, so that runs share them.
        limit: Keep this many of the training images, drawn at random (sources are often sorted by class), or this many of the
            training text's windows, its first. All by default.

    Raises:
        FileNotFoundError: If there is no such source, or a folder holds no data.
        ValueError: If the data are not images of one size with one class label each, or text; the message names the first offender.
        ModuleNotFoundError: If the library that reads ``source`` is not installed.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"Invalid limit: {limit}. Must be at least 2 training samples.")
    if source == PYTHON_DOCS or Path(source).is_file():
        return read_text(source, validation, limit)
    read = read_digits if source == "digits" else read_images
    return read(source, validation, torch.Generator().manual_seed(seed), limit)
