from __future__ import annotations

import pytest
import torch

from backmatch.outputs import output_tensors, predictions


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((8,), 8),
        ((8, 10), 8),
        ((8, 1), 8),
        ((8, 5, 10), 40),
        ((40, 10), 40),
        ((8, 10, 4, 6), 192),
        ((8, 10, 2, 3, 4), 192),
        ((0, 3), 0),
        ((8, 0), 0),
    ],
)
def test_predictions(shape: tuple[int, ...], count: int) -> None:
    assert predictions([torch.zeros(shape)]) == count


def test_what_counts_as_output() -> None:
    logits, hidden, ids = torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    assert output_tensors(logits) == [logits]
    assert [z.shape for z in output_tensors((torch.tensor(1.0), logits, {"deep": [hidden, ids]}))] == [(2, 3), (2, 5)]
    assert [z.shape for z in output_tensors({"loss": torch.tensor(1.0), "logits": logits, "cache": hidden})] == [(2, 3)]
    assert output_tensors("nothing") == []
