"""Two runs told to write into one folder: the second ends at once with a clear error, and the first is as it would have been."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("fcntl")

from backmatch.cli import compare as compare_module
from backmatch.cli.checkpoint import sole_writer, temporary_of
from backmatch.cli.compare import compare
from backmatch.cli.protocol import CompareConfig
from backmatch.cli.train import TrainConfig, train
from tests.cli.test_train import assert_same_run
from tests.faults.runs import DEADLINE, before_step, config, die, end_of, files, start

pytestmark = pytest.mark.timeout(120)

STARTS = 20


def run_and_wait(settings: TrainConfig, reached: Any, go_on: Any) -> None:
    """Train; before the 10th step, stand still until told to go on."""

    def stand() -> None:
        reached.set()
        assert go_on.wait(DEADLINE)

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 10, stand)
        train(settings)


def test_the_second_run_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    first = config(tmp_path / "shared")
    reached, go_on = get_context("forkserver").Event(), get_context("forkserver").Event()
    process = start(run_and_wait, first, reached, go_on)
    assert reached.wait(DEADLINE)
    before = files(first.out)
    for resume in (False, True):
        with pytest.raises(BlockingIOError, match=r"Another run is writing to .*shared. Wait until it ends or stop it, or"):
            train(TrainConfig(**vars(first) | {"resume": resume}))
    assert files(first.out) == before
    go_on.set()
    assert end_of(process) == 0
    assert end_of(start(train, config(tmp_path / "alone"))) == 0
    assert_same_run(tmp_path / "alone", first.out)
    assert list(files(first.out)) == ["checkpoint.pt", "log.jsonl"]


def die_in_the_folder(folder: Path) -> None:
    with sole_writer(folder):
        die()


def test_a_killed_run_locks_nobody_out(tmp_path: Path) -> None:
    assert end_of(start(die_in_the_folder, tmp_path)) == -signal.SIGKILL
    assert list(files(tmp_path)) == [".lock"]
    with sole_writer(tmp_path):
        pass
    assert files(tmp_path) == {}


def race(folder: Path, barrier: Any, inside: Any, most: Any) -> None:
    """Take and leave the folder again and again, counting who is in it."""
    barrier.wait(DEADLINE)
    entered, ends = 0, time.monotonic() + DEADLINE
    while entered < STARTS and time.monotonic() < ends:
        try:
            with sole_writer(folder):
                entered += 1
                with inside.get_lock():
                    inside.value += 1
                    most.value = max(most.value, inside.value)
                time.sleep(0.001)
                with inside.get_lock():
                    inside.value -= 1
        except BlockingIOError:
            time.sleep(0.0005)
    assert entered == STARTS


def test_never_two_at_once_though_the_lock_comes_and_goes(tmp_path: Path) -> None:
    context = get_context("forkserver")
    barrier, inside, most = context.Barrier(3), context.Value("i", 0), context.Value("i", 0)
    processes = [start(race, tmp_path, barrier, inside, most) for _ in range(3)]
    assert [end_of(process) for process in processes] == [0, 0, 0]
    assert most.value == 1
    assert files(tmp_path) == {}


def test_errors_leave_nothing_behind(tmp_path: Path) -> None:
    for changes in ({"model": "vgg12"}, {"evals_per_epoch": 100}, {"device": "abacus"}):
        with pytest.raises(ValueError, match=r"Unknown model|Invalid evals_per_epoch|Cannot use device"):
            train(config(tmp_path, **changes))
        assert files(tmp_path) == {}


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, epochs=1))
    for name in ("log.jsonl", "checkpoint.pt"):
        temporary_of(out / name).write_bytes(b"half")
    train(config(out, epochs=1, resume=True))
    assert list(files(out)) == ["checkpoint.pt", "log.jsonl"]


# ---- comparisons


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompareConfig:
    monkeypatch.setattr(compare_module, "_in_own_process", compare_module._train)
    settings: dict[str, Any] = {"model": "mlp", "width": 0.1, "epochs": 1, "limit": 128, "threads": 1, "optimizers": ("sgd",)}
    return CompareConfig(**settings, lr_factors=(1.0,), seeds=(0,), out=tmp_path / "comparison")


def test_the_second_comparison_is_refused(tiny: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    perform: Callable[..., None] = compare_module._in_own_process
    refusals = []

    def meanwhile(settings: TrainConfig) -> None:
        before = files(tiny.out)
        with pytest.raises(BlockingIOError, match=r"Another run is writing to .*comparison. Wait until it ends") as caught:
            compare(tiny)
        refusals.append(caught)
        assert files(tiny.out) == before
        perform(settings)

    monkeypatch.setattr(compare_module, "_in_own_process", meanwhile)
    compare(tiny)
    assert len(refusals) == 1
    assert not [name for name in files(tiny.out) if os.path.basename(name).startswith(".")]


def test_a_comparison_killed_at_any_moment_can_be_started_again(tiny: CompareConfig) -> None:
    """Also before it said what it compares, or after a run's end."""
    tiny.out.mkdir()
    (tiny.out / ".lock").touch()
    temporary_of(tiny.out / "comparison.json").write_bytes(b"{")
    compare(tiny)
    (run,) = (tiny.out / "runs" / "report").iterdir()
    temporary_of(run / "memory.json").write_bytes(b"{")
    compare(tiny)
    assert not [name for name in files(tiny.out) if os.path.basename(name).startswith(".")]
    (tiny.out / "comparison.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"comparison.json is damaged. Restore it, or choose another --out."):
        compare(tiny)
