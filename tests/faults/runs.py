"""Training runs in processes of their own, forked off one that has imported torch already; and what goes wrong in them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import count
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from backmatch.cli import checkpoint as checkpoint_module
from backmatch.cli import train as train_module
from backmatch.cli.train import TrainConfig

DEADLINE = 60.0


def config(out: Path, **changes: Any) -> TrainConfig:
    """44 steps in two epochs, a checkpoint every 3 of them."""
    settings: dict[str, Any] = {"model": "mlp", "width": 0.1, "optimizer": "backmatch-sgd", "augment": "crop-flip", "batch_size": 64}
    settings |= {"epochs": 2, "evals_per_epoch": 4, "checkpoint_every": 3, "threads": 1, "out": out}
    return TrainConfig(**settings | changes)


def start(work: Callable[..., None], *args: Any) -> BaseProcess:
    """``work(*args)`` in a process forked from a clean one, which this one's threads and handlers do not reach."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["sklearn.datasets", "torch._dynamo", "tests.faults.runs"])
    process = context.Process(target=work, args=args)
    process.start()
    return process


def end_of(process: BaseProcess) -> int:
    """Its exit code; negative for a signal."""
    process.join(DEADLINE)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"the run took more than {DEADLINE} s")
    return process.exitcode


def files(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def before_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Have ``act()`` called right before the ``number``-th step from now, from 1."""
    step, steps = train_module._step, count(1)

    def counted(*args: Any) -> float:
        if next(steps) == number:
            act()
        return step(*args)

    patch.setattr(train_module, "_step", counted)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = ("in torch.save", "half written", "written", "renamed", "done")


def die_while_saving(patch: pytest.MonkeyPatch, moment: str, number: int) -> None:
    """Have this process killed at a moment of writing the ``number``-th checkpoint from now, from 1."""
    save, serialise, fsync, replace, checkpoints = (
        train_module.save_checkpoint,
        checkpoint_module.torch.save,
        os.fsync,
        os.replace,
        count(1),
    )

    def at(here: str) -> bool:
        return armed and here == moment

    armed = False

    def save_checkpoint(*args: Any) -> None:
        nonlocal armed
        armed = next(checkpoints) == number
        save(*args)
        if armed:
            die()

    def saved(*args: Any) -> None:
        if at("in torch.save"):
            die()
        serialise(*args)

    def synced(descriptor: int) -> None:
        if at("half written"):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)
        if at("written"):
            die()

    def replaced(*paths: Any) -> None:
        replace(*paths)
        if at("renamed"):
            die()

    patch.setattr(train_module, "save_checkpoint", save_checkpoint)
    patch.setattr(checkpoint_module.torch, "save", saved)
    patch.setattr(os, "fsync", synced)
    patch.setattr(os, "replace", replaced)
