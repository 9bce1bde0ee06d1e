"""Training runs: a resumed run equals the uninterrupted one bit for bit, and the log says what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from backmatch import BackMatchSGD
from backmatch.cli import train as train_module
from backmatch.cli.data import load_data
from backmatch.cli.images import ImageData
from backmatch.cli.main import main
from backmatch.cli.models import build_model
from backmatch.cli.optimizers import DEFAULT_LR, BackMatchOptions, build_optimizer
from backmatch.cli.train import TrainConfig, lr_factor, train
from backmatch.estimators import EstimatorName
from backmatch.ladder import BackMatch

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits", limit=200)


def config(out: Path, **changes: Any) -> TrainConfig:
    """12 steps in 2 epochs of 6, a checkpoint every 4."""
    tiny = TrainConfig(
        model="resnet20", width=0.25, optimizer="sgd", epochs=2, batch_size=32, limit=200, checkpoint_every=4, threads=1, out=out
    )
    return replace(tiny, **changes)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in records]


def assert_same_run(first: Path, second: Path) -> None:
    """Equal weights, optimizer state, generator and log, bit for bit; times apart."""
    states = [torch.load(out / "checkpoint.pt", weights_only=True)["state"] for out in (first, second)]
    for state in states:
        for name in ("seconds", "seconds_at_evaluation"):
            del state["progress"][name]
    assert_equal(states[0], states[1])
    logs = [untimed(read_log(out)[1:]) for out in (first, second)]
    assert logs[0] == logs[1]


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


class Stop(Exception):
    pass


def stop_after_checkpoint(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the run die right after it wrote its ``number``-th checkpoint."""
    save, left = train_module.save_checkpoint, [number]

    def save_then_stop(*args: Any) -> None:
        save(*args)
        left[0] -= 1
        if not left[0]:
            raise Stop

    monkeypatch.setattr(train_module, "save_checkpoint", save_then_stop)


RUNS: dict[str, dict[str, Any]] = {
    "sgd": {"augment": "crop-flip", "evals_per_epoch": 3},
    "adamw-bf16": {"optimizer": "adamw", "precision": "bf16"},
    "backmatch-sgd": {"optimizer": "backmatch-sgd", "augment": "crop-flip"},
    "backmatch-sgd-probe": {"optimizer": "backmatch-sgd", "estimator": "probe", "interval": 3, "augment": "crop-flip"},
    "backmatch": {"optimizer": "backmatch", "interval": 3, "augment": "crop-flip"},
    "backmatch-sgd-loss": {"optimizer": "backmatch-sgd", "estimator": "loss", "per": "tensor", "interval": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train(config(tmp_path / "whole", **RUNS[name]), data)
    for number in (1, 2):  # after step 4, inside the first epoch, and after step 8, inside the second
        out = tmp_path / f"stopped{number}"
        with monkeypatch.context() as patch:
            stop_after_checkpoint(patch, number)
            with pytest.raises(Stop):
                train(config(out, **RUNS[name]), data)
        torch.manual_seed(123)
        result = train(config(out, **RUNS[name], resume=True), data)
        assert result.steps == 12
        assert_same_run(tmp_path / "whole", out)
        assert untimed(result.records) == untimed(read_log(out)[1:-1])


def test_run_is_a_plain_training_loop(tmp_path: Path, data: ImageData) -> None:
    train(config(tmp_path, epochs=2, lr=0.05, momentum=0.8, weight_decay=1e-3, augment="crop-flip", warmup=3, seed=4), data)
    torch.manual_seed(4)
    model = build_model("resnet20", in_shape=(1, 8, 8), classes=10, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, 12, 3, "cosine"))
    for epoch in range(2):
        for images, labels in data.batches(epoch=epoch, seed=4, batch_size=32, augment="crop-flip"):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
    assert_equal(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["model"], dict(model.state_dict()))
    model.eval()
    logits = model(data.normalize(data.test_images))
    last = read_log(tmp_path)[-2]
    assert last["test_accuracy"] == (logits.argmax(1) == data.test_labels).double().mean().item()
    assert last["test_loss"] == pytest.approx(cross_entropy(logits, data.test_labels).item(), rel=1e-5)


def test_log(tmp_path: Path, data: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(config(tmp_path, epochs=2, evals_per_epoch=4, checkpoint_every=None), data)
    first, *evaluations, end = read_log(tmp_path)
    assert first["event"] == "settings"
    assert first["settings"]["model"] == "resnet20"
    assert first["versions"]["torch"] == torch.__version__
    assert (first["seed"], first["threads"], first["train_samples"]) == (0, 1, 200)
    assert [record["step"] for record in evaluations] == [2, 3, 5, 6, 8, 9, 11, 12]
    assert [record["epoch"] for record in evaluations] == [step / 6 for step in (2, 3, 5, 6, 8, 9, 11, 12)]
    assert result.records == evaluations
    assert result.test_accuracy == evaluations[-1]["test_accuracy"]
    seconds = [record["seconds"] for record in evaluations]
    assert seconds == sorted(seconds)
    assert evaluations[0]["seconds_per_step"] == pytest.approx(seconds[0] / 2)
    assert evaluations[1]["seconds_per_step"] == pytest.approx(seconds[1] - seconds[0])
    assert (end["event"], end["step"], end["diverged"]) == ("end", 12, False)
    assert end["optimizer_state_bytes_per_parameter"] == 4.0  # one momentum buffer in float32
    assert capsys.readouterr().out.count("test accuracy") == 2


def test_divergence_ends_the_run_and_is_logged(tmp_path: Path, data: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(config(tmp_path, model="mlp", width=0.1, lr=1e30, checkpoint_every=None), data)
    assert result.diverged
    assert result.steps < 12
    end = read_log(tmp_path)[-1]
    assert (end["event"], end["diverged"], end["step"]) == ("end", True, result.steps)
    assert "Diverged" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()  # which is no JSON


def interrupt_at(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    batches = ImageData.batches

    def interrupted_batches(data: ImageData, **settings: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(data, **settings)):
            if number == index:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(ImageData, "batches", interrupted_batches)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests run as a background job, which a shell starts with the signal ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_saves_the_last_finished_step(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path / "whole"), data)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "stopped", checkpoint_every=None), data)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Stopped after step 3 of 12. Add --resume to continue." in capsys.readouterr().err
    train(config(tmp_path / "stopped", resume=True), data)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.usefixtures("interruptible")
def test_interrupted_command_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 0)
    flags = ["--model", "mlp", "--optimizer", "sgd", "--epochs", "1", "--out", str(tmp_path)]
    assert main(["train", *flags]) == 130
    monkeypatch.undo()
    assert main(["train", *flags, "--resume"]) == 0
    assert read_log(tmp_path)[-1]["event"] == "end"


def test_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    flags = ["--model", "mlp", "--width", "0.25", "--optimizer", "backmatch-sgd", "--epochs", "3"]
    flags += ["--augment", "crop-flip", "--limit", "1280", "--batch-size", "16", "--checkpoint-every", "25", "--evals-per-epoch", "8"]
    flags += ["--threads", "1"]
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "backmatch.cli.main", "train", *flags, "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not (killed / "checkpoint.pt").exists() or len((killed / "log.jsonl").read_text().splitlines()) < 5:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert read_log(killed)[-1]["event"] != "end"
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"event": "evaluation", "st')  # a line cut off by the kill
    assert main(["train", *flags, "--out", str(killed), "--resume"]) == 0
    assert main(["train", *flags, "--out", str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "whole", killed)


def test_killed_before_the_first_checkpoint_starts_over(tmp_path: Path, data: ImageData) -> None:
    train(config(tmp_path / "whole"), data)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "log.jsonl").write_text('{"event": "settings"}\n{"event": "evalu')
    train(config(tmp_path / "killed", resume=True), data)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_finished_run_without_its_checkpoint_is_not_written_over(tmp_path: Path, data: ImageData) -> None:
    train(config(tmp_path, epochs=1), data)
    log = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(FileExistsError, match="holds a finished run whose checkpoint is gone"):
        train(config(tmp_path, epochs=1, lr=0.01, resume=True), data)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_finished_run_resumes_to_itself(tmp_path: Path, data: ImageData) -> None:
    train(config(tmp_path), data)
    before = read_log(tmp_path)
    result = train(config(tmp_path, resume=True), data)
    assert read_log(tmp_path) == before
    assert result.records == before[1:-1]


def test_lr_factor() -> None:
    assert [lr_factor(step, 10, 4, "constant") for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(0, 10, 0.2, "cosine") == 0.5  # a fraction: 2 steps
    assert lr_factor(2, 10, 0.2, "cosine") == 1.0
    assert lr_factor(6, 10, 0.2, "cosine") == pytest.approx(0.5)
    assert lr_factor(0, 10, 0, "cosine") == 1.0
    assert lr_factor(10, 10, 0, "cosine") == 0.0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"width": 0.5}, r"width is 0.25 there and 0.5 here.* or choose another --out"),
        ({"model": "mlp"}, "model is 'resnet20' there and 'mlp' here"),
        ({"optimizer": "adamw"}, "optimizer is 'sgd' there"),
        ({"epochs": 3}, "epochs is 2 there and 3 here"),
    ],
)
def test_resuming_another_run_is_refused_and_changes_nothing(tmp_path: Path, data: ImageData, changes: dict, text: str) -> None:
    train(config(tmp_path), data)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=text):
        train(config(tmp_path, resume=True, **changes), data)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_folders_that_cannot_take_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*args: Any, **settings: Any) -> ImageData:
        raise AssertionError("data were read before the folder was checked")

    monkeypatch.setattr(train_module, "load_data", unread)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "log.jsonl").touch()
    with pytest.raises(FileExistsError, match="already holds a run. Add --resume"):
        train(config(tmp_path / "used"))
    with pytest.raises(FileNotFoundError, match="No run to resume"):
        train(config(tmp_path / "new", resume=True))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Cannot write to .*file"):
        train(config(tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model", "vgg12"], "Unknown model 'vgg12'"),
        (["--model", "lenet"], "too small for 'lenet'"),
        (["--optimizer", "sdg"], "Unknown optimizer 'sdg'. Known: sgd,"),
        (["--optimizer", "sgd", "--power", "1"], "power given for 'sgd', which has no such setting"),
        (["--lr", "-1", "--optimizer", "sgd"], "-1"),
        (["--lr", "nan"], "Invalid lr: nan"),
        (["--lr", "nan", "--optimizer", "sgd"], "Invalid lr: nan"),
        (["--weight-decay", "nan", "--optimizer", "sgd"], "Invalid weight_decay: nan"),
        (["--momentum", "nan", "--optimizer", "adam"], "Invalid momentum: nan"),
        (["--rank-timeout", "nan"], "Invalid rank_timeout: nan"),
        (["--seed", "99999999999999999999"], "Invalid seed: 99999999999999999999. Must be in [0, 9223372036854775808)"),
        (["--width", "1e300"], "Invalid width: 1e+300"),
        (["--batch-size", "1"], "Invalid batch_size: 1"),
        (["--epochs", "0"], "Invalid epochs: 0"),
        (["--evals-per-epoch", "100"], "Invalid evals_per_epoch: 100. Must be at most the 11 steps"),
        (["--device", "abacus"], "Cannot use device 'abacus'"),
        (["--warmup", "-1"], "Invalid warmup: -1.0"),
        (["--limit", "0"], "Invalid limit: 0"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    assert main(["train", *flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("backmatch: error: ")
    assert error.count("\n") == 1
    assert text in error
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("[alloc_cpu.cpp] can't allocate memory: 9 bytes.\nframe #0"), MemoryError(), RuntimeError("x")]
)
def test_want_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def fail(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr(train_module, "train", fail)
    if str(error) == "x":  # a defect
        with pytest.raises(RuntimeError, match="x"):
            main(["train"])
        return
    assert main(["train"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("backmatch: error: Not enough memory: ")
    assert text.count("\n") == 1
    assert "--batch-size" in text


def test_command_names(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [(["--version"], 0, "backmatch 0."), (["--help"], 0, "train one model"), (["trian"], 2, "'trian'"), ([], 2, "COMMAND")]
    for arguments, code, text in cases:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == code
        assert text in "".join(capsys.readouterr())


def test_mistaken_run_leaves_its_folder_free(tmp_path: Path, data: ImageData) -> None:
    with pytest.raises(ValueError, match="Unknown model"):
        train(config(tmp_path, model="vgg12"), data)
    assert train(config(tmp_path, epochs=1), data).steps == 6


@pytest.mark.parametrize("setting", ["schedule", "augment", "precision"])
def test_unknown_choice(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid {setting}: 'x'. Must be one of "):
        train(config(tmp_path, **{setting: "x"}))


@pytest.mark.parametrize("name", DEFAULT_LR)
def test_optimizer_settings(name: str) -> None:
    model = torch.nn.Linear(3, 2)
    group = build_optimizer(name, model).param_groups[0]
    own = (BackMatch if name == "backmatch" else BackMatchSGD)(model).defaults["lr"]
    assert group["lr"] == (own if DEFAULT_LR[name] is None else DEFAULT_LR[name])
    group = build_optimizer(name, model, lr=0.01, momentum=0.5, weight_decay=0.25).param_groups[0]
    momentum = group["betas"][0] if "betas" in group else group["momentum"]
    assert (group["lr"], momentum, group["weight_decay"]) == (0.01, 0.5, 0.25)


@pytest.mark.parametrize("estimator", ["gradient", "probe", "loss"])
def test_backmatch_defaults_are_those_of_its_estimator(estimator: EstimatorName) -> None:
    model = torch.nn.Linear(3, 2)
    own = BackMatchSGD(model, estimator=estimator).param_groups[0]
    group = build_optimizer("backmatch-sgd", model, options=BackMatchOptions(estimator=estimator)).param_groups[0]
    assert {**group, "params": None} == {**own, "params": None}


def test_backmatch_options_reach_the_optimizer() -> None:
    options = BackMatchOptions(estimator="rules", interval=7, beta=0.5, power=1.0, per="tensor", bound=3.0, nesterov=False)
    optimizer: Any = build_optimizer("backmatch-sgd", torch.nn.Linear(3, 2), options=options)
    assert (optimizer.interval, optimizer.beta, optimizer.power, optimizer.bound) == (7, 0.5, 1.0, 3.0)
    assert not optimizer.param_groups[0]["nesterov"]
