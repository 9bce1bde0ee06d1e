"""Checkpoints: whole or untouched, and refused where they do not belong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from backmatch.cli import checkpoint
from backmatch.cli.checkpoint import load_checkpoint, save_checkpoint, write_atomic

SETTINGS = {"model": "mlp", "width": 0.5, "lr": None, "image_shape": [1, 8, 8]}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    state = {"weights": {"a": torch.randn(3), "b": torch.randn(2).bfloat16()}, "step": 7, "groups": [{"lr": 0.1, "params": [0]}]}
    save_checkpoint(path, {"step": 1}, SETTINGS)
    save_checkpoint(path, state, SETTINGS)
    loaded = load_checkpoint(path, SETTINGS)
    assert all(torch.equal(loaded["weights"][key], value) for key, value in state["weights"].items())
    assert (loaded["step"], loaded["groups"]) == (state["step"], state["groups"])
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


class Unsafe:
    def __reduce__(self) -> tuple:
        return os.putenv, ("BACKMATCH_UNSAFE", "1")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        ("truncated", "damaged"),
        (Unsafe(), "damaged or not a checkpoint"),
        ({"format": 99, "settings": {}, "state": {}}, "has format 99; this version of backmatch reads format 1"),
        ([1], "has format None"),
        ({"format": 1, "settings": SETTINGS | {"width": 1.0, "model": "vgg11"}, "state": {}}, "model is 'vgg11' there and 'mlp' here"),
        ({"format": 1, "settings": SETTINGS | {"old": 3}, "state": {}}, "old is 3 there and None here"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(tmp_path: Path, content: object, text: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        save_checkpoint(path, {"a": torch.randn(1000)}, SETTINGS)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=text):
        load_checkpoint(path, SETTINGS)
    assert path.read_bytes() == before


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "checkpoint.pt", SETTINGS)
    assert checkpoint.FORMAT_VERSION == 1
