"""SIGKILL at random moments, also while a checkpoint is written: nothing before the last one is lost, and the run ends as if unharmed."""

from __future__ import annotations

import random
import signal
import threading
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from backmatch.cli import train as train_module
from backmatch.cli.checkpoint import read_checkpoint
from backmatch.cli.train import TrainConfig, train
from tests.cli.test_train import assert_same_run, read_log
from tests.faults.runs import MOMENTS, config, die, die_while_saving, end_of, files, start

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")]

KILLS = 20
EPOCHS = 12
CHECKPOINT_EVERY = 3


def run(settings: TrainConfig, steps: Any, moment: str | None, when: float) -> None:
    """Train; be killed at ``moment`` of writing the ``when``-th checkpoint, or ``when`` seconds after the first step."""
    step = train_module._step
    with pytest.MonkeyPatch.context() as patch:
        if moment in MOMENTS:
            die_while_saving(patch, moment, int(when))

        def counted(*args: Any) -> float:
            if moment == "any" and steps.value == 0:
                threading.Timer(when, die).start()
            loss = step(*args)
            steps.value += 1
            return loss

        patch.setattr(train_module, "_step", counted)
        train(settings)


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    whole, killed = (config(tmp_path / name, epochs=EPOCHS, checkpoint_every=CHECKPOINT_EVERY) for name in ("whole", "killed"))
    steps = get_context("forkserver").Value("i", 0)
    assert end_of(start(run, whole, steps, None, 0.0)) == 0
    assert steps.value == EPOCHS * 22
    draw = random.Random(0)
    moments = [*MOMENTS, *MOMENTS, *["any"] * (KILLS - 2 * len(MOMENTS))]
    draw.shuffle(moments)
    # Of all steps, ten kills while saving let at most 10 · 3 · 3 pass, and ten in between 3 % each.
    seconds = read_log(tmp_path / "whole")[-1]["seconds"]
    last, lost = 0, 0
    for moment in moments:
        when = draw.uniform(0.0, 0.03 * seconds) if moment == "any" else draw.randint(1, 3)
        steps.value = 0
        resumed = TrainConfig(**vars(killed) | {"resume": (killed.out / "log.jsonl").exists()})
        assert end_of(start(run, resumed, steps, moment, when)) == -signal.SIGKILL
        reached = last + steps.value
        saved = 0
        if (killed.out / "checkpoint.pt").exists():
            saved = read_checkpoint(killed.out / "checkpoint.pt")["state"]["progress"]["step"]
        assert last <= saved
        assert reached - saved <= CHECKPOINT_EVERY
        last, lost = saved, lost + reached - saved
    assert last > 0
    steps.value = 0
    assert end_of(start(run, TrainConfig(**vars(killed) | {"resume": True}), steps, None, 0.0)) == 0
    assert steps.value == EPOCHS * 22 - last > 0
    assert_same_run(whole.out, killed.out)
    assert list(files(killed.out)) == ["checkpoint.pt", "log.jsonl"]
    print(f"{KILLS} kills, {lost} steps trained twice")
