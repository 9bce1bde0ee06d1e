"""Checkpoints that are damaged, foreign or hostile: refused with one clear line, and neither executed nor overwritten."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from backmatch.cli import train as train_module
from backmatch.cli.checkpoint import read_checkpoint, save_checkpoint
from backmatch.cli.data import load_data
from backmatch.cli.main import main
from backmatch.cli.train import TrainConfig, train
from tests.cli.test_train import assert_equal
from tests.faults.runs import config, files

pytestmark = pytest.mark.timeout(60)

FLIPS, CUTS = 400, 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that stopped after its first checkpoint but one."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(config(out, epochs=1, steps=8), load_data("digits"))
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    for name, content in files(trained).items():
        (tmp_path / "run" / name).write_bytes(content)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data("digits")
    monkeypatch.setattr(train_module, "load_data", lambda *args, **settings: data)


def command_line(out: Path, **changes: Any) -> list[str]:
    settings = config(out, epochs=1, steps=8, resume=True, **changes)
    given = {field.name: getattr(settings, field.name) for field in fields(TrainConfig) if getattr(settings, field.name) != field.default}
    flags = [[f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])] for name, value in given.items()]
    return ["train", *(word for flag in flags for word in flag)]


def refused(out: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """What --resume says; it must leave the folder as it is."""
    before = files(out)
    assert main(command_line(out, **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert files(out) == before
    assert line.startswith("backmatch: error: ")
    return line


def test_flipped_bits_are_refused_or_of_no_consequence(out: Path) -> None:
    path, draw, survived = out / "checkpoint.pt", random.Random(0), 0
    content, expected = path.read_bytes(), read_checkpoint(path)
    for _ in range(FLIPS):
        bit = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(ValueError):
            assert_equal(read_checkpoint(path), expected)
            survived += 1
    print(f"{FLIPS} flips: {FLIPS - survived} refused, {survived} outside the content")
    assert survived < FLIPS // 4


def test_cut_off_files_are_refused(out: Path) -> None:
    path, draw = out / "checkpoint.pt", random.Random(0)
    content = path.read_bytes()
    for length in (0, 1, 4, 30, len(content) - 1, *(draw.randrange(len(content)) for _ in range(CUTS - 5))):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
            read_checkpoint(path)


class Hostile:
    """Makes a file when it is unpickled by what does not look."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trap),)


def hostile_zip(path: Path, trap: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", f"cbuiltins\nexec\n(S'import os; os.mkdir({str(trap)!r})'\ntR.".encode())
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


HOSTILE: dict[str, Callable[[Path, Path], Any]] = {
    "a pickle": lambda path, trap: path.write_bytes(pickle.dumps(Hostile(trap))),
    "torch.save": lambda path, trap: torch.save(Hostile(trap), path),
    "torch.save, older format": lambda path, trap: torch.save(Hostile(trap), path, _use_new_zipfile_serialization=False),
    "inside a checkpoint": lambda path, trap: save_checkpoint(path, {"model": Hostile(trap)}, {}),
    "exec in an archive": hostile_zip,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_not_executed(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    HOSTILE[name](out / "checkpoint.pt", tmp_path / "trap")
    assert "is damaged or not a checkpoint. Restore it, or choose another --out." in refused(out, capsys)
    assert main(["inspect", "--model", "mlp", "--checkpoint", str(out / "checkpoint.pt"), "--out", str(tmp_path / "look")]) == 2
    assert not (tmp_path / "trap").exists()


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "mlp-15"}, "belongs to another run: model is 'mlp' there and 'mlp-15' here"),
        ({"optimizer": "adamw"}, "optimizer is 'backmatch-sgd' there and 'adamw' here"),
        ({"width": 0.2}, "width is 0.1 there and 0.2 here. Resume with its settings, or choose another --out."),
        ({"seed": 1}, "seed is 0 there and 1 here"),
    ],
)
def test_checkpoints_of_other_runs_are_refused(out: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], text: str) -> None:
    line = refused(out, capsys, **changes)
    assert str(out / "checkpoint.pt") in line
    assert text in line


FOREIGN: list[tuple[Any, str]] = [
    ({"weight": torch.zeros(3)}, "has format None; this version of backmatch reads format 1"),
    ([1], "has format None"),
    ({"format": torch.ones(2)}, "has format None"),
    ({"format": 99}, "has format 99"),
    ({"format": 1}, "lacks its settings or its state"),
    ({"format": 1, "settings": [1], "state": {}}, "lacks its settings or its state"),
]


@pytest.mark.parametrize(("content", "text"), FOREIGN)
def test_foreign_files_are_refused(out: Path, capsys: pytest.CaptureFixture[str], content: Any, text: str) -> None:
    torch.save(content, out / "checkpoint.pt")
    line = refused(out, capsys)
    assert str(out / "checkpoint.pt") in line
    assert text in line


@pytest.mark.parametrize("part", ["model", "optimizer", "generator", "progress"])
@pytest.mark.parametrize("how", ["missing", "other"])
def test_a_state_that_does_not_fit_is_refused(out: Path, capsys: pytest.CaptureFixture[str], part: str, how: str) -> None:
    """Of equal settings, as another version of the package may write it."""
    content = read_checkpoint(out / "checkpoint.pt")
    content["state"][part] = {"a": torch.zeros(3)}
    if how == "missing":
        del content["state"][part]
    save_checkpoint(out / "checkpoint.pt", content["state"], content["settings"])
    line = refused(out, capsys)
    assert f"The state in checkpoint {out / 'checkpoint.pt'} does not fit this model and optimizer" in line
    assert "Continue with the version of backmatch that wrote it" in line


def test_a_folder_in_its_place_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "checkpoint.pt").unlink()
    (out / "checkpoint.pt").mkdir()
    assert f"Cannot read checkpoint {out / 'checkpoint.pt'}: Is a directory. Allow reading it" in refused(out, capsys)


def test_missing_rights_are_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "checkpoint.pt").chmod(0)
    if os.access(out / "checkpoint.pt", os.R_OK):
        pytest.skip("this user may read everything")
    assert main(command_line(out)) == 2
    assert f"Cannot read checkpoint {out / 'checkpoint.pt'}: Permission denied" in capsys.readouterr().err
    (out / "checkpoint.pt").chmod(0o600)
    out.chmod(0o500)
    assert main(command_line(out)) == 2
    out.chmod(0o700)
    assert f"Cannot write to {out}: Permission denied. Choose another --out." in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"{broken\n", b"\xff\xfe\n", b"[1]\n", b'{"event": "evaluation"}\n', b"\n"])
def test_a_damaged_log_is_refused_rather_than_cut(out: Path, capsys: pytest.CaptureFixture[str], line: bytes) -> None:
    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    (out / "log.jsonl").write_bytes(b"".join([lines[0], line, *lines[1:]]))
    assert f"Log {out / 'log.jsonl'} is damaged in line 2. Restore it, or choose another --out." in refused(out, capsys)
