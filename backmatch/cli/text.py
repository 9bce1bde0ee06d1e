"""Text as characters: a file, its alphabet, and the windows that a language model reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from backmatch.cli.checkpoint import crc32_of
from backmatch.cli.sampling import HELD_OUT, generator_of

PYTHON_DOCS = "python-docs"
"""Name of the text that comes with Python: ``pydoc_data.topics``, some 460,000 characters of English that differ by Python version."""

CONTEXT = 64
EVALUATION_BATCH = 128


@dataclass(frozen=True, eq=False)
class TextData:
    """A text in memory, as ``int64`` character numbers ``[T]`` for training and for testing.

    A sample is a window of :data:`CONTEXT` characters; its labels are the characters that follow each of them.
    """

    unit: ClassVar[str] = "windows"

    train_text: Tensor
    test_text: Tensor
    class_names: tuple[str, ...]

    @property
    def in_shape(self) -> tuple[int]:
        """Length of one window."""
        return (CONTEXT,)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many windows there are to train on and to test on."""
        return (len(self.train_text) - 1) // CONTEXT, (len(self.test_text) - 1) // CONTEXT

    @cached_property
    def checksum(self) -> int:
        """CRC-32 over all characters: two runs with equal checksums saw the same text."""
        return crc32_of(self.train_text, self.test_text)

    def to(self, device: torch.device) -> TextData:
        """The same text on ``device``."""
        return replace(self, train_text=self.train_text.to(device), test_text=self.test_text.to(device))

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches :meth:`batches` gives."""
        return max(1, self.sizes[0] // batch_size)

    def check_augment(self, augment: str) -> None:
        """Raise ValueError unless it is ``"none"``."""
        if augment != "none":
            raise ValueError(f"Invalid augment: {augment!r}. Text takes 'none'.")

    def batches(self, *, epoch: int, seed: int, batch_size: int, augment: str = "none", start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one epoch: windows ``[batch_size, CONTEXT]`` and the characters that follow, of the same shape.

        The text is cut into windows at an offset of the epoch's own, and every window comes once. Order and offset depend on
        ``(seed, epoch)`` only, so ``start=k`` gives the batches from the k-th on. The last batch is dropped unless it is full.

        Raises:
            ValueError: If ``augment`` is not ``"none"``.
        """
        self.check_augment(augment)
        count = self.sizes[0]
        batch_size = min(batch_size, count)
        generator = generator_of(seed, epoch)
        offset = int(torch.randint(len(self.train_text) - count * CONTEXT, (), generator=generator))
        order = torch.randperm(count, generator=generator).to(self.train_text.device)
        for index in range(start, self.steps_per_epoch(batch_size)):
            yield _windows(self.train_text, offset + CONTEXT * order[index * batch_size : (index + 1) * batch_size])

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All windows of the test text, in order, and the characters that follow."""
        for starts in (CONTEXT * torch.arange(self.sizes[1], device=self.test_text.device)).split(EVALUATION_BATCH):
            yield _windows(self.test_text, starts)


def read_text(source: str, validation: bool, limit: int | None) -> TextData:
    """The first nine tenths of a text to train on and the last tenth to test on; of the former the last tenth for ``validation``.

    The alphabet is that of the whole text, so that no test character is unknown.

    Raises:
        ValueError: If the file is not UTF-8, or too short.
    """
    try:
        text = _python_docs() if source == PYTHON_DOCS else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Cannot read text {source!r}: byte {error.start} is not UTF-8. Convert the file to UTF-8; of images or parquet files give "
            "the folder."
        ) from error
    alphabet = sorted(set(text))
    numbers = {character: number for number, character in enumerate(alphabet)}
    everything = torch.tensor([numbers[character] for character in text], dtype=torch.int64)
    train, test = _cut(everything)
    if validation:
        train, test = _cut(train)
    if limit is not None:
        train = train[: limit * CONTEXT + 1]
    if len(test) <= CONTEXT or len(train) <= 2 * CONTEXT:
        raise ValueError(
            f"Text {source!r} is too short: {len(train)} characters to train on and {len(test)} to test on. "
            f"Needs {2 * CONTEXT + 1} and {CONTEXT + 1}."
        )
    return TextData(train, test, tuple(alphabet))


def _cut(text: Tensor) -> tuple[Tensor, Tensor]:
    at = round((1 - HELD_OUT) * len(text))
    return text[:at], text[at:]


def _windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    rows = starts[:, None] + torch.arange(CONTEXT + 1, device=text.device)
    windows = text[rows]
    return windows[:, :-1], windows[:, 1:]


def _python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
