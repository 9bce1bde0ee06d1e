"""End to end: a panel stopped anywhere, or split over machines, ends with the values of one that was not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from benchmarks import execution
from benchmarks.__main__ import main
from benchmarks.peers import PEERS
from benchmarks.plan import PROTOCOLS, Run, best_factor, cells_of, claim, read_protocol
from benchmarks.summary import summarise
from benchmarks.tasks import TASKS
from tests.benchmarks.conftest import OPTIMIZERS, PROTOCOL, in_this_process, make
from tests.benchmarks.conftest import TASKS as TINY_TASKS

RUNS = len(TINY_TASKS) * len(OPTIMIZERS) * (3 + 2)


def untimed(value: Any) -> Any:
    """Without what depends on the clock."""
    if isinstance(value, dict):
        clock = ("seconds", "seconds_per_step", "seconds_to_target", "time_ratio_to_sgd", "hours")
        return {key: untimed(item) for key, item in value.items() if key not in clock}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def records(folder: Path) -> dict[str, Any]:
    return {path.relative_to(folder).as_posix(): untimed(json.loads(path.read_text())) for path in (folder / "runs").rglob("*.json")}


def test_a_panel_has_every_run_and_a_summary_of_all(panel: Path) -> None:
    found = records(panel)
    assert len(found) == RUNS
    assert read_protocol(panel) == PROTOCOL
    assert all(len(record["training_losses"]) == 4 and [e["step"] for e in record["evaluated"]] == [2, 4] for record in found.values())
    summary = summarise(panel)
    assert [task["name"] for task in summary["tasks"]] == list(TINY_TASKS)
    assert not summary["missing"]
    for task in summary["tasks"]:
        assert [entry["optimizer"] for entry in task["entries"]] == list(OPTIMIZERS)
        for entry in task["entries"]:
            own = [record for path, record in found.items() if f"{task['name']}/{entry['optimizer']}/" in path]
            tuned = {record["lr_factor"]: record["loss"] for record in own if record["stage"] == "tuning"}
            assert tuned[entry["lr_factor"]] == min(tuned.values())
            assert entry["loss"]["values"] == [
                record["loss"] for record in sorted(own, key=lambda r: r["seed"]) if record["stage"] == "report"
            ]
        best = min(entry["loss"]["mean"] for entry in task["entries"] if entry["kind"] == "peer")
        assert task["target"] == best
        assert set(task["verdicts"]) == {"backmatch-sgd"}


def test_runs_of_a_seed_begin_with_the_same_loss(panel: Path) -> None:
    first: dict[tuple[str, int], set[float]] = {}
    for record in records(panel).values():
        first.setdefault((record["task"], record["seed"]), set()).add(record["training_losses"][0])
    assert all(len(values) == 1 for values in first.values())


def test_what_was_killed_is_run_again_with_equal_values(panel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "panel"
    shutil.copytree(panel, folder)
    before = records(folder)
    grid = sorted((folder / "runs" / "friedman" / "sgd").glob("tuning*"))
    grid[0].write_bytes(grid[0].read_bytes()[:100])  # cut off, as no write_atomic leaves it but a full disk may
    grid[0].with_name(f".{grid[0].name}.tmp").write_bytes(b"{")
    next((folder / "runs" / "digits-cnn" / "backmatch-sgd").glob("report*seed1*")).unlink()
    performed: list[Run] = []
    perform = execution.perform
    monkeypatch.setattr(execution, "perform", lambda run, data: performed.append(run) or perform(run, data))
    make(folder)
    assert sorted((run.task, run.stage) for run in performed) == [("digits-cnn", "report"), ("friedman", "tuning")]
    assert records(folder) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"loss": 1'])
def test_a_run_file_that_is_none_counts_as_missing(panel: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(panel, tmp_path / "panel")
    next((tmp_path / "panel" / "runs" / "friedman" / "sgd").glob("report*")).write_bytes(content)
    assert summarise(tmp_path / "panel")["missing"] == ["sgd on friedman"]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"budget": "small", "colour": 1}'])
def test_a_damaged_panel_is_named(panel: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(panel, tmp_path / "panel")
    (tmp_path / "panel" / "panel.json").write_bytes(content)
    assert main(["report", "--out", str(tmp_path / "panel")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path / 'panel' / 'panel.json'} is damaged, or of another version" in error


def test_shards_merge_to_the_whole(panel: Path, tmp_path: Path) -> None:
    for index in range(2):
        make(tmp_path / f"shard{index}", f"{index}/2")
        shutil.copytree(tmp_path / f"shard{index}", tmp_path / "merged", dirs_exist_ok=True)
    assert records(tmp_path / "merged") == records(panel)
    assert untimed(summarise(tmp_path / "merged")) == untimed(summarise(panel))


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_shards_are_disjoint_and_complete(count: int) -> None:
    names = [name for name, task in TASKS.items() if "full" in task.steps]
    whole = cells_of(PROTOCOLS["full"], names, list(PEERS))
    parts = [cells_of(PROTOCOLS["full"], names, list(PEERS), f"{index}/{count}") for index in range(count)]
    assert sorted(cell for part in parts for cell in part) == sorted(whole)
    assert len(whole) == len(set(whole)) == len(names) * len(PEERS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_unfinished_optimizers_are_named_and_not_shown(panel: Path, tmp_path: Path) -> None:
    shutil.copytree(panel, tmp_path / "panel")
    next((tmp_path / "panel" / "runs" / "friedman" / "adamw").glob("report*")).unlink()
    summary = summarise(tmp_path / "panel")
    assert summary["missing"] == ["adamw on friedman"]
    assert [entry["optimizer"] for entry in summary["tasks"][1]["entries"]] == ["sgd", "backmatch-sgd"]
    assert "adamw" not in summary["ranks"]


def test_a_failed_run_ends_early_is_kept_and_loses(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, lr_factors=(1e30,))
    run = Run("friedman", "sgd", "report", 1e30, 0, protocol)
    record = execution.perform(run, tmp_path)
    assert record["loss"] is None
    assert record["failure"].startswith(("the training loss is", "the evaluated loss is"))
    assert record["steps_done"] < 4
    json.dumps(record, allow_nan=False)
    assert best_factor([{"loss": None, "lr_factor": 0.5}, {"loss": 9.0, "lr_factor": 1.0}, {"loss": 9.0, "lr_factor": 2.0}]) == 1.0
    assert best_factor([{"loss": None, "lr_factor": 2.0}, {"loss": None, "lr_factor": 1.0}]) == 1.0


def test_grid_seeds_and_lengths_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_workers", in_this_process)
    out = tmp_path / "panel"
    lengths = ["--steps", "3", "--tune-steps", "2"]
    chosen = ["--tasks", "friedman", "--optimizers", "sgd", "--lr-factors", "0.5", "1", "--seeds", "7"]
    assert main(["run", "--data", "none", "--out", str(out), *chosen, *lengths]) == 0
    found = [(run["stage"], run["lr_factor"], run["seed"], run["steps"], run["steps_done"]) for run in records(out).values()]
    tuning = [run for run in found if run[0] == "tuning"]
    assert sorted(tuning) == [("tuning", 0.5, 1000, 2, 2), ("tuning", 1.0, 1000, 2, 2)]
    assert [(run[0], *run[2:]) for run in found if run not in tuning] == [("report", 7, 3, 3)]
    with pytest.raises(FileExistsError, match="tune_steps is 2 there and None here"):
        claim(out, replace(read_protocol(out), tune_steps=None))


@pytest.mark.timeout(180)
def test_a_killed_process_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "panel"
    words = ["run", "--data", "none", "--out", str(out), "--tasks", "friedman", "--optimizers", "sgd", "--steps", "2", "--seeds", "0"]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *words], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not list(out.rglob("tuning*.json")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert any("tuning" in path.name for path in done)
    monkeypatch.setattr(execution, "_workers", in_this_process)
    assert main(words) == 0
    assert len(records(out)) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tasks", "cifar11"], "Unknown task 'cifar11'. Known: digits-cnn,"),
        (["--tasks", "gpt"], "Budget 'small' has no task 'gpt'. It has digits-cnn,"),
        (["--optimizers", "sgdd"], "Unknown optimizer 'sgdd'. Known: sgd,"),
        (["--shard", "4/4"], "Invalid shard: '4/4'. Must be i/n with i from 0 to n - 1"),
        (["--jobs", "0"], "Invalid jobs: 0."),
        (["--steps", "0"], "Invalid steps: 0."),
        (["--tune-steps", "0"], "Invalid tune_steps: 0."),
        (["--lr-factors", "1", "-1"], "Invalid lr_factors: -1.0."),
        (["--seeds", "1000"], "1000 is the seed of the tuning runs"),
        (["--seeds", "1", "1"], "Give at least one, and each once"),
        (["--optimizers", "sgd", "sgd"], "Invalid optimizers: sgd sgd. Each may be given once"),
        (["--tasks", "friedman", "gpt-short"], "No tinyshakespeare.txt in 'none'. Give as --data the folder of"),
        pytest.param(
            ["--device", "cuda"], "Cannot use device 'cuda':", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--data", "none", "--out", str(tmp_path / "panel"), *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "panel").exists()


def test_folders_of_others_are_refused(panel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileExistsError, match="holds another panel: steps is 4 there and None here"):
        claim(panel, replace(PROTOCOL, steps=None))
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="is not empty and holds no panel"):
        claim(tmp_path, PROTOCOL)
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "holds no panel. Make one" in capsys.readouterr().err
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".panel.json.tmp").touch()
    claim(tmp_path / "begun", PROTOCOL)
    shutil.copytree(panel, tmp_path / "panel")
    path = next((tmp_path / "panel" / "runs" / "friedman" / "sgd").glob("tuning*"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 5}))
    with pytest.raises(FileExistsError, match="is of another run: steps is 5 there and 4 here"):
        summarise(tmp_path / "panel")


def test_runs_on_different_data_are_not_compared(panel: Path, tmp_path: Path) -> None:
    shutil.copytree(panel, tmp_path / "panel")
    for path in (tmp_path / "panel" / "runs" / "friedman" / "adamw").glob("report*"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_crc32": 1}))
    with pytest.raises(ValueError, match="Runs of friedman saw different data"):
        summarise(tmp_path / "panel")
