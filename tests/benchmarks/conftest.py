"""One tiny panel, run once: two tasks, three optimizers, four steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import execution
from benchmarks.plan import PROTOCOLS, cells_of, claim

NO_DATA = Path("there-is-no-such-folder")
PROTOCOL = replace(PROTOCOLS["small"], steps=4, seeds=(0, 1), evaluations=2)
TASKS, OPTIMIZERS = ("digits-cnn", "friedman"), ("sgd", "adamw", "backmatch-sgd")


class InThisProcess:
    """A pool that works at once, as starting a process takes longer than a run here."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def in_this_process(jobs: int) -> Iterator[InThisProcess]:
    yield InThisProcess()


def make(folder: Path, shard: str = "0/1") -> None:
    claim(folder, PROTOCOL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "_workers", in_this_process)
        execution.execute(PROTOCOL, cells_of(PROTOCOL, TASKS, OPTIMIZERS, shard), NO_DATA, folder, jobs=1)


@pytest.fixture(scope="session")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("panel") / "panel"
    make(folder)
    return folder
