"""Random draws of the data sets: each a function of its key alone, so a stopped run goes on with the batches it would have seen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.1
"""Share of the training data kept apart for validation, or for testing where the source has no test data."""


def generator_of(*key: int) -> torch.Generator:
    """An independent random stream for every key, as ``(seed, epoch, batch index)``."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def split_rows(count: int, held_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows kept and rows held out of ``count``, each in random order."""
    order = torch.randperm(count, generator=generator)
    return order[held_out:], order[:held_out]
