"""Text as data: windows and labels against the text itself."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from backmatch.cli.data import load_data
from backmatch.cli.main import main
from backmatch.cli.text import CONTEXT, TextData

TEXT = "".join(random.Random(0).choices("abcdefgh ", k=40 * CONTEXT)) + "é\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def read(path: Path, **settings: object) -> TextData:
    data = load_data(str(path), **settings)  # type: ignore[arg-type]
    assert isinstance(data, TextData)
    return data


def spelled(data: TextData, numbers: torch.Tensor) -> str:
    return "".join(data.class_names[i] for i in numbers.flatten().tolist())


def test_text_is_cut_in_order(file: Path) -> None:
    data = read(file)
    assert spelled(data, data.train_text) + spelled(data, data.test_text) == TEXT
    assert len(data.test_text) == round(0.1 * len(TEXT))
    assert data.class_names == tuple(sorted(set(TEXT)))
    tuning = read(file, validation=True)
    assert spelled(tuning, tuning.train_text) + spelled(tuning, tuning.test_text) == spelled(data, data.train_text)
    assert spelled(data, read(file, limit=3).train_text) == TEXT[: 3 * CONTEXT + 1]


def test_an_epoch_holds_every_window_once_and_labels_follow_inputs(file: Path) -> None:
    data = read(file)
    text = spelled(data, data.train_text)
    found = []
    for inputs, labels in data.batches(epoch=2, seed=1, batch_size=5):
        assert inputs.shape == labels.shape == (5, CONTEXT)
        for window, following in zip(inputs, labels, strict=True):
            at = text.index(spelled(data, window))
            assert spelled(data, following) == text[at + 1 : at + 1 + CONTEXT]
            found.append(at)
    offset = min(found) % CONTEXT
    assert len(found) == 5 * data.steps_per_epoch(5) == 35
    assert len(set(found)) == len(found)
    assert all(at % CONTEXT == offset for at in found)


def test_batches_start_anywhere_and_depend_on_seed_and_epoch(file: Path) -> None:
    data = read(file)
    whole = [labels for _, labels in data.batches(epoch=0, seed=0, batch_size=4)]
    later = [labels for _, labels in data.batches(epoch=0, seed=0, batch_size=4, start=6)]
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], later, strict=True))
    for other in ({"epoch": 1, "seed": 0}, {"epoch": 0, "seed": 1}):
        assert not torch.equal(next(data.batches(**other, batch_size=4))[1], whole[0])


def test_evaluation_reads_all_windows_in_order(file: Path) -> None:
    data = read(file)
    inputs = torch.cat([inputs for inputs, _ in data.evaluation_batches()])
    labels = torch.cat([labels for _, labels in data.evaluation_batches()])
    count = (len(data.test_text) - 1) // CONTEXT
    assert torch.equal(inputs.flatten(), data.test_text[: count * CONTEXT])
    assert torch.equal(labels.flatten(), data.test_text[1 : count * CONTEXT + 1])


def test_python_docs_need_no_file() -> None:
    data = load_data("python-docs")
    assert isinstance(data, TextData)
    assert len(data.train_text) > 100_000
    assert "assert" in spelled(data, data.train_text)


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"too short", "is too short: 8 characters"), (b"", "is too short: 0"), (b"abc\xff" * 1000, "byte 3 is not UTF-8")],
)
def test_bad_files(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        load_data(str(tmp_path / "bad.txt"))


def test_augmentation_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="Text takes 'none'"):
        next(read(file).batches(epoch=0, seed=0, batch_size=4, augment="crop-flip"))


def test_train_and_compare_and_inspect(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    shared = ["--data", str(file), "--model", "gpt-mini", "--width", "0.125", "--batch-size", "8", "--threads", "1"]
    assert main(["train", *shared, "--steps", "7", "--out", str(tmp_path / "run")]) == 0
    end, evaluation = (json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()[:-3:-1])
    assert (end["step"], evaluation["step"]) == (7, 7)
    assert 0 < evaluation["test_loss"] < 5
    assert main(["compare", *shared, "--steps", "3", "--lr-factors", "1", "--seeds", "0", "--out", str(tmp_path / "two")]) == 0
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert [entry["epochs"][-1] for entry in summary["entries"]] == [3 / 4, 3 / 4]
    assert "3 steps" in (tmp_path / "two/report.html").read_text()
    assert (
        main(
            [
                "inspect",
                "--checkpoint",
                str(tmp_path / "run/checkpoint.pt"),
                "--data",
                str(file),
                "--batch-size",
                "2",
                "--out",
                str(tmp_path / "look"),
            ]
        )
        == 0
    )
    rows = list(csv.DictReader((tmp_path / "look/layers.csv").open()))
    assert {"tokens", "blocks.0.attention.qkv", "head"} <= {row["layer"] for row in rows}
    assert main(["train", "--data", str(file), "--model", "resnet20", "--out", str(tmp_path / "no")]) == 2
    assert "does not take text" in capsys.readouterr().err
