"""The inspect command: what it prints and writes is what the records hold."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from backmatch.cli.checkpoint import save_checkpoint
from backmatch.cli.data import load_data
from backmatch.cli.inspect import InspectConfig, inspect
from backmatch.cli.main import main
from backmatch.cli.models import build_model
from backmatch.cli.train import TrainConfig, train
from backmatch.inspection import inspect_layers


def test_files_hold_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = inspect(InspectConfig(model="vgg11-bn", width=0.05, batch_size=8, out=tmp_path))
    with open(tmp_path / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [record.name for record in records]
    for row, record in zip(rows, records, strict=True):
        assert float(row["scale"]) == record.scale
        assert float(row["pace"]) == record.pace
        assert record.input_hessian is not None
        assert float(row["input_high"]) == record.input_hessian.high
        assert row["weight_method"] == record.weight_hessian.method
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [record.name for record in records]
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "layers.svg").read_text()


def test_fresh_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    records = inspect(InspectConfig(model="mlp", width=0.1, seed=3, batch_size=16, power=1.0, out=tmp_path))
    torch.manual_seed(3)
    data = load_data("digits")
    model = build_model("mlp", in_shape=data.in_shape, classes=10, width=0.1)
    images, _ = next(data.batches(epoch=0, seed=3, batch_size=16))
    assert records == inspect_layers(model, images, power=1.0)


def test_checkpoint_brings_model_width_and_weights(tmp_path: Path) -> None:
    train(TrainConfig(model="mlp", width=0.1, optimizer="sgd", epochs=1, limit=64, threads=1, out=tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    records = inspect(InspectConfig(checkpoint=checkpoint, batch_size=16, out=tmp_path / "out"))
    data = load_data("digits")
    model = build_model("mlp", in_shape=data.in_shape, classes=10, width=0.1)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state"]["model"])
    images, _ = next(data.batches(epoch=0, seed=0, batch_size=16))
    assert records == inspect_layers(model, images)


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    save_checkpoint(tmp_path / "other.pt", {"model": {}}, {"model": "mlp", "width": 1.0})
    for flags, text in (
        (["--checkpoint", str(tmp_path / "absent.pt")], "There is no checkpoint"),
        (["--checkpoint", str(tmp_path / "no.pt")], "no.pt is no checkpoint of 'backmatch train'"),
        (["--checkpoint", str(tmp_path / "other.pt")], "do not fit the shape or classes of 'digits'"),
        (["--batch-size", "1"], "Invalid batch_size: 1"),
        (["--power", "-1"], "Invalid power: -1.0"),
        (["--model", "vgg12"], "Unknown model 'vgg12'"),
    ):
        assert main(["inspect", "--out", str(tmp_path / "out"), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
