"""Runs that are not done yet, side by side in processes of one thread each; whatever kills them, no run is lost or repeated."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from backmatch.cli.checkpoint import write_atomic
from benchmarks.plan import Cell, Protocol, Run, best_factor, read_record, report_runs, tuning_runs
from benchmarks.training import perform


def execute(protocol: Protocol, cells: Sequence[Cell], data: Path, folder: Path, jobs: int) -> None:
    """Make every run of ``cells`` that ``folder`` does not hold; the seeds of a cell follow once its grid is whole.

    Raises:
        ChildProcessError: If a run's process was killed.
        FileExistsError: If a file is there that belongs to a run with other settings.
        Exception: Whatever a run raises; the runs under way are ended first.
    """
    per_cell = len(protocol.lr_factors) + len(protocol.seeds)
    with _workers(jobs) as pool, tqdm(total=len(cells) * per_cell, unit="run", disable=None, dynamic_ncols=True) as bar:
        waiting: list[Run] = []
        for cell in cells:
            missing = _next_runs(folder, protocol, cell)
            later = len(protocol.seeds) if missing and missing[0].stage == "tuning" else 0
            bar.update(per_cell - len(missing) - later)
            waiting += missing
        under_way: dict[Future[dict[str, Any]], Run] = {}
        while waiting or under_way:
            # No more than are worked on: the seeds of a cell come right after its grid, while its data are in memory.
            while waiting and len(under_way) < jobs:
                run = waiting.pop(0)
                under_way[pool.submit(_perform, run, data, folder)] = run
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool as error:
                    raise ChildProcessError(
                        f"The process of {run.path} was killed, for want of memory perhaps. The same command goes on from here; "
                        "fewer --jobs take less."
                    ) from error
                bar.update()
                outcome = record["failure"] or f"loss {record['loss']:.4g}"
                bar.write(f"{run.task} {run.optimizer} {run.stage} lr {run.lr:.4g} seed {run.seed}: {outcome}, {record['seconds']:.1f} s")
                cell = run.task, run.optimizer
                if run.stage == "tuning" and not any((other.task, other.optimizer) == cell for other in [*waiting, *under_way.values()]):
                    waiting = _next_runs(folder, protocol, cell) + waiting


def _next_runs(folder: Path, protocol: Protocol, cell: Cell) -> list[Run]:
    """What of a cell can be run now: what its grid lacks, or once it is whole, what its seeds lack."""
    grid = {run: read_record(folder, run) for run in tuning_runs(protocol, cell)}
    missing = [run for run, record in grid.items() if record is None]
    if missing:
        return missing
    factor = best_factor(record for record in grid.values() if record is not None)
    return [run for run in report_runs(protocol, cell, factor) if read_record(folder, run) is None]


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned: a fork would take over what torch and its threads hold. Workers live on from run to run and read their data once.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a word
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker that outlived a killed panel would go on beside the one that continues it.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _perform(run: Run, data: Path, folder: Path) -> dict[str, Any]:
    """In a worker: make one run and write its file."""
    record = perform(run, data)
    path = folder / run.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, allow_nan=False).encode())
    return {key: record[key] for key in ("failure", "loss", "seconds")}
