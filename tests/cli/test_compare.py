"""Comparisons: the summary says what the logs say, and a stopped comparison ends as if it had not been stopped."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from backmatch.cli import compare as compare_module
from backmatch.cli import plot as plot_module
from backmatch.cli import train as train_module
from backmatch.cli.compare import compare
from backmatch.cli.main import main
from backmatch.cli.protocol import CompareConfig, Run, command_line
from backmatch.cli.summary import RunLog, rank, read_log
from backmatch.cli.train import TrainConfig


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process takes longer than a run here."""
    monkeypatch.setattr(compare_module, "_in_own_process", compare_module._train)


def config(out: Path, **changes: Any) -> CompareConfig:
    """Two epochs of 4 steps per run; the highest rate of SGD diverges."""
    tiny = CompareConfig(
        model="mlp",
        width=0.1,
        epochs=2,
        batch_size=64,
        limit=256,
        evals_per_epoch=2,
        threads=1,
        optimizers=("sgd", "adam"),
        lr_factors=(0.5, 1.0, 1e6),
        centre_lr=("adam=0.01",),
        seeds=(0, 1),
        out=out,
    )
    return replace(tiny, **changes)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(tree: Any) -> Any:
    """Without what differs from one run of the same thing to the next: times and memory."""
    if isinstance(tree, dict):
        return {key: untimed(value) for key, value in tree.items() if "seconds" not in key and key not in ("peak_memory_bytes", "command")}
    return [untimed(value) for value in tree] if isinstance(tree, list) else tree


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareConfig, dict[str, Any]]:
    done = config(tmp_path_factory.mktemp("finished") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "_in_own_process", compare_module._train)
        return done, compare(done)


def test_summary_is_what_the_logs_say(finished: tuple[CompareConfig, dict[str, Any]]) -> None:
    done, summary = finished
    assert summary == json.loads((done.out / "summary.json").read_text())
    assert [entry["optimizer"] for entry in summary["entries"]] == ["sgd", "adam"]
    finals = {}
    for entry in summary["entries"]:
        logs = [records(done.out / folder) for folder in entry["folders"]]
        assert [log[0]["seed"] for log in logs] == entry["seeds"] == [0, 1]
        evaluations = [[record for record in log if record["event"] == "evaluation"] for log in logs]
        assert entry["epochs"] == [0.5, 1.0, 1.5, 2.0] == [record["epoch"] for record in evaluations[0]]
        for name, key in (("accuracy", "test_accuracy"), ("test_loss", "test_loss"), ("train_loss", "train_loss")):
            columns = [[run[i][key] for run in evaluations] for i in range(4)]
            assert entry[f"{name}_mean"] == pytest.approx([sum(column) / 2 for column in columns])
            assert entry[f"{name}_std"] == pytest.approx([abs(column[0] - column[1]) / math.sqrt(2) for column in columns])
            assert entry["final"][name]["values"] == columns[-1]
            assert entry["final"][name]["mean"] == entry[f"{name}_mean"][-1]
        finals[entry["optimizer"]] = entry["final"]["accuracy"]["mean"]

        target = summary["protocol"]["target"]
        reached = [[(r["epoch"], r["step"]) for r in run if r["test_accuracy"] >= target] for run in evaluations]
        assert entry["epochs_to_target"]["values"] == [run[0][0] if run else None for run in reached]
        assert entry["steps_to_target"]["values"] == [run[0][1] if run else None for run in reached]
        expected = None if not all(reached) else statistics.fmean(run[0][0] for run in reached)
        assert entry["epochs_to_target"]["mean"] == expected
        assert entry["seconds_per_step"] == statistics.median(r["seconds_per_step"] for run in evaluations for r in run)
        assert entry["optimizer_state_bytes_per_parameter"] == logs[0][-1]["optimizer_state_bytes_per_parameter"]
        assert entry["peak_memory_bytes"] > 2**20
    assert summary["protocol"]["target"] == finals["sgd"]
    sgd, adam = summary["entries"]
    assert sgd["seconds_per_step_ratio_to_sgd"] == 1.0
    assert adam["seconds_per_step_ratio_to_sgd"] == adam["seconds_per_step"] / sgd["seconds_per_step"]


def test_tuning_takes_the_best_on_held_out_training_images(finished: tuple[CompareConfig, dict[str, Any]]) -> None:
    done, summary = finished
    assert [(run["optimizer"], run["lr"]) for run in summary["tuning"]] == [
        *(("sgd", 0.1 * factor) for factor in done.lr_factors),
        *(("adam", 0.01 * factor) for factor in done.lr_factors),
    ]
    for run in summary["tuning"]:
        log = records(done.out / run["folder"])
        assert log[0]["settings"]["validation"] is True
        assert log[0]["seed"] == 1000
        assert run["diverged"] == (log[-1]["diverged"] or log[-2]["test_loss"] is None)
        assert run["accuracy"] == (None if run["diverged"] else log[-2]["test_accuracy"])
    assert summary["tuning"][2]["diverged"]  # shown, not dropped
    for entry in summary["entries"]:
        runs = [run for run in summary["tuning"] if run["optimizer"] == entry["optimizer"] and not run["diverged"]]
        best = min(runs, key=lambda run: (-run["accuracy"], run["loss"], run["lr"]))
        assert (best["lr"], best["weight_decay"]) == (entry["lr"], entry["weight_decay"])
        assert [run["chosen"] for run in runs] == [run is best for run in runs]
        assert entry["lr_at_grid_edge"] == {0.5: "lowest", 1.0: None, 1e6: "highest"}[best["lr_factor"]]
        header = records(done.out / entry["folders"][0])[0]
        assert header["settings"]["validation"] is False
        assert header["train_samples"] == 256


def test_tuning_takes_the_best_in_what_it_is_for() -> None:
    def log(*accuracies: float, loss: float = 1.0, diverged: bool = False) -> RunLog:
        steps = [{"step": 10 * i, "epoch": i, "test_accuracy": a, "test_loss": loss} for i, a in enumerate(accuracies, start=1)]
        return RunLog({}, steps, {"diverged": diverged})

    logs = {
        "fast": log(0.5, 0.7, 0.72),
        "fast too, but lower": log(0.6, 0.75, 0.71),
        "high": log(0.1, 0.2, 0.9),
        "never": log(0.1, 0.2, 0.69, loss=0.5),
        "diverged": log(0.8, 0.8, 0.8, diverged=True),
    }
    run = Run("tuning", "sgd", 1.0, 0.1, 0.0, 1000)
    for tune_for, best_first in (
        ("target", ["fast", "fast too, but lower", "high", "never", "diverged"]),
        ("accuracy", ["high", "fast", "fast too, but lower", "never", "diverged"]),
        ("loss", ["never", "high", "fast", "fast too, but lower", "diverged"]),
    ):
        protocol = CompareConfig(target=0.7, tune_for=tune_for)  # type: ignore[arg-type]
        assert sorted(logs, key=lambda name: rank(protocol, run, logs[name])) == best_first


def test_runs_of_a_seed_start_from_the_same_weights_and_see_the_same_images(tmp_path: Path) -> None:
    # With one step per epoch, the first training loss is that of the initial weights on the first batch.
    compare(config(tmp_path / "out", batch_size=256, evals_per_epoch=1, lr_factors=(1.0,), seeds=(3, 4)))
    losses = {log.parent.name: records(log.parent)[1]["train_loss"] for log in (tmp_path / "out").glob("runs/report/*/log.jsonl")}
    assert losses["sgd-lr0.1-wd0.0005-seed3"] == losses["adam-lr0.01-wd0-seed3"]
    assert losses["sgd-lr0.1-wd0.0005-seed4"] == losses["adam-lr0.01-wd0-seed4"]
    assert len(set(losses.values())) == 2


def test_stopped_comparison_goes_on(
    finished: tuple[CompareConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, summary = finished
    stopped, saves = replace(done, out=tmp_path / "out"), []

    def save_until_stopped(*args: Any) -> None:
        save(*args)
        saves.append(args[0])
        if len(saves) in (5, 12):
            raise KeyboardInterrupt

    save = train_module.save_checkpoint
    monkeypatch.setattr(train_module, "save_checkpoint", save_until_stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(stopped)
    assert untimed(compare(stopped)) == untimed(summary)
    assert len(saves) == 18  # nothing was run twice: 2 epochs of the 9 runs that do not diverge in the first


def test_more_optimizers_and_seeds_add_runs(
    finished: tuple[CompareConfig, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = config(tmp_path / "out", lr_factors=(1.0,), seeds=(0,))
    compare(smaller)
    written = {log: log.stat().st_mtime_ns for log in smaller.out.glob("runs/*/*/log.jsonl")}
    assert len(written) == 2
    summary = compare(replace(smaller, optimizers=("sgd", "adam", "backmatch-sgd"), seeds=(0, 1)))
    assert "2 of 6 runs of stage 'report' are finished already." in capsys.readouterr().out
    assert {log: log.stat().st_mtime_ns for log in written} == written
    assert [entry["n"] for entry in summary["entries"]] == [2, 2, 2]
    assert summary["tuning"] == []  # one setting each


def test_sweep_reports_every_setting(tmp_path: Path) -> None:
    swept = config(tmp_path / "out", optimizers=("sgd",), weight_decays=(0.0, 1.0), sweep=True, centre_lr=())
    summary = compare(swept)
    assert len(summary["entries"]) == len(summary["tuning"]) == 6
    assert sum(entry["chosen"] for entry in summary["entries"]) == 1
    lost = [entry for entry in summary["entries"] if entry["lr_factor"] == 1e6]
    assert all(entry["diverged"] == 2 and entry["final"]["accuracy"] == {"mean": None, "std": None, "values": [None] * 2} for entry in lost)


def test_command_repeats_the_comparison(finished: tuple[CompareConfig, dict[str, Any]]) -> None:
    done, summary = finished
    program, command, *flags = shlex.split(summary["command"])
    assert (program, command) == ("backmatch", "compare")
    assert tyro.cli(CompareConfig, args=flags) == done


def test_options_go_to_the_optimizer_that_has_them(tmp_path: Path) -> None:
    both = config(tmp_path / "out", optimizers=("sgd", "backmatch-sgd"), centre_lr=(), lr_factors=(1.0,), seeds=(0,), epochs=1)
    for power in (0.25, 0.5):
        compare(replace(both, power=power))
    powers = {log.parent.name: records(log.parent)[0]["settings"]["power"] for log in (tmp_path / "out").glob("runs/*/*/log.jsonl")}
    assert sorted(powers.values(), key=str) == [0.25, 0.5, None]  # the run of SGD serves both
    assert all(f"power{power}" in name for name, power in powers.items() if power)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimizers": ("sgd", "sgdd")}, "Unknown optimizer 'sgdd'. Known: sgd, "),
        ({"optimizers": ()}, "Invalid optimizers: empty"),
        ({"optimizers": ("sgd", "sgd")}, "Invalid optimizers: sgd sgd. Each may be given once"),
        ({"lr_factors": ()}, "Invalid lr_factors: empty"),
        ({"lr_factors": (0.0, 1.0)}, "Invalid lr_factors: 0.0"),
        ({"lr_factors": (math.nan,)}, "Invalid lr_factors: nan"),
        ({"weight_decays": (-1.0,)}, "Invalid weight_decays: -1.0"),
        ({"seeds": ()}, "Invalid seeds: empty"),
        ({"seeds": (0, 1000)}, "Invalid tune_seed: 1000"),
        ({"tune_epochs": 0}, "Invalid tune_epochs: 0"),
        ({"target": 1.5}, "Invalid target: 1.5"),
        ({"tune_for": "target"}, "there is none to tune for. Give --target"),
        ({"jobs": 0}, "Invalid jobs: 0"),
        ({"centre_lr": ("sgd",)}, "Invalid centre_lr: 'sgd'. Must be name=value"),
        ({"centre_lr": ("adamw=1",)}, "'adamw' is not compared"),
        ({"centre_lr": ("sgd=-1",)}, "Invalid centre_lr: -1.0"),
        ({"power": 0.5}, "power given, but none of sgd, adam has that"),
        ({"model": "vgg12"}, "Unknown model 'vgg12'"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"^(?s:.*)") as caught:
        compare(config(tmp_path / "out", **({"centre_lr": ()} | changes)))
    assert text in str(caught.value)


def test_folders_that_cannot_take_a_comparison(tmp_path: Path) -> None:
    tiny = config(tmp_path / "out", lr_factors=(1.0,), seeds=(0,), epochs=1)
    compare(tiny)
    with pytest.raises(FileExistsError, match="holds another comparison: epochs is 1 there and 2 here"):
        compare(replace(tiny, epochs=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty and holds no comparison"):
        compare(replace(tiny, out=tmp_path / "other"))
    with pytest.raises(OSError, match="Cannot write to"):
        compare(replace(tiny, out=tmp_path / "other" / "file" / "out"))


def test_a_refused_command_leaves_its_folder_to_the_right_one(tmp_path: Path) -> None:
    tiny = config(tmp_path / "out", lr_factors=(1.0,), seeds=(0,), epochs=1)
    with pytest.raises(ValueError, match="Unknown model 'nope'"):
        compare(replace(tiny, model="nope"))
    with pytest.raises(ValueError, match="Invalid batch_size: 1"):
        compare(replace(tiny, batch_size=1))
    compare(tiny)


def test_runs_on_data_that_changed_are_not_compared(tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("abcde " * 1000)
    shared = config(tmp_path / "out", data=str(text), model="gpt-mini", batch_size=8, limit=None, steps=2, evals_per_epoch=1)
    tiny = replace(shared, optimizers=("sgd",), centre_lr=(), lr_factors=(1.0,), seeds=(0,))
    compare(tiny)
    before = (tmp_path / "out" / "summary.json").read_bytes()
    text.write_text("ab" * 3000)
    with pytest.raises(ValueError, match=r"some\.txt' has changed since some runs of .*out were made"):
        compare(replace(tiny, optimizers=("sgd", "adam")))
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["relative", "nesterov", "sweep"])
def test_commands_name_flags_that_are_on_off_or_left_to_the_optimizer(name: str, value: bool, tmp_path: Path) -> None:
    given = config(tmp_path, **{name: value})
    assert tyro.cli(CompareConfig, args=shlex.split(command_line(given))[2:]) == given


def test_missing_libraries_are_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_module, "find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(ModuleNotFoundError, match=r"'compare' draws with jinja2. Install backmatch\[plot\]"):
        compare(config(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_log_that_was_cut_off(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") is None
    (tmp_path / "log.jsonl").write_text('{"event": "settings"}\n{"event": "evaluation", "step": 1}\n{"event": "eva')
    log = read_log(tmp_path / "log.jsonl")
    assert log is not None
    assert [record["step"] for record in log.evaluations] == [1]
    assert log.end is None
    (tmp_path / "log.jsonl").write_text('{"event": "settings"}\n7\n')
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged: '7' is no record"):
        read_log(tmp_path / "log.jsonl")


def test_failing_run_surfaces_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()  # processes, as users have them
    flags = ["--data", "digits", "--model", "lenet", "--lr-factors", "1", "--jobs", "2", "--out", str(tmp_path / "out")]
    assert main(["compare", *flags]) == 2
    output = capsys.readouterr()
    assert "Images of 8x8 are too small for 'lenet'" in output.err
    assert "failed; runs under way end first." in output.err


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states from /proc")
def test_killed_comparison_takes_its_runs_along_and_goes_on(tmp_path: Path) -> None:
    killed = CompareConfig(
        model="mlp", width=0.1, epochs=80, limit=256, threads=1, optimizers=("sgd",), lr_factors=(1.0,), seeds=(0,), out=tmp_path / "out"
    )
    uninterrupted = compare(replace(killed, out=tmp_path / "whole"))
    command = [sys.executable, "-m", "backmatch.cli.main", *shlex.split(command_line(killed))[1:]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    run = killed.out / "runs" / "report" / "sgd-lr0.1-wd0.0005-seed0"
    deadline = time.monotonic() + 60
    while not (run / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    children += [int(pid) for task in Path(f"/proc/{process.pid}/task").iterdir() for pid in (task / "children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children
    assert not any(_alive(pid) for pid in children)
    log = read_log(run / "log.jsonl")
    assert log is not None
    assert log.end is None
    assert untimed(compare(killed)) == untimed(uninterrupted)


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_flags_that_the_protocol_sets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--lr", "--seed", "--validation", "--optimizer"):
        with pytest.raises(SystemExit):
            tyro.cli(CompareConfig, args=[flag, "1"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tyro.cli(CompareConfig, args=["--help"])
    assert "--batch-size" in capsys.readouterr().out
    assert issubclass(CompareConfig, TrainConfig)
