"""Compare optimizers fairly: each tuned on its own grid with held-out training images, then run over seeds and tested."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from backmatch.cli.checkpoint import LOCK, sole_writer, temporary_of, write_atomic
from backmatch.cli.plot import require_plotting, save_curves
from backmatch.cli.protocol import (
    OPTIONS,
    CompareConfig,
    Run,
    check_protocol,
    grid_of,
    shared_names,
    threads_per_run,
    tuning_epochs,
)
from backmatch.cli.report import text_table, write_report
from backmatch.cli.summary import RunLog, rank, read_log, summarise
from backmatch.cli.train import TrainConfig, train


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the comparison and write ``summary.json``, ``curves.svg``, ``curves.png`` and ``report.html`` to ``config.out``.

    Stage 1 runs every optimizer on its whole grid with ``tune_seed``, on a tenth of the training images held out; the best final
    accuracy wins, or by ``tune_for`` the lowest loss, or the fewest steps to ``target`` (a diverged run is worst; of equals the
    higher accuracy, the lower loss, the lower rate). An optimizer with one setting needs no tuning. Stage 2 runs the winners with all
    ``seeds`` on all training images and evaluates on the test set.

    Called from a script, it belongs under ``if __name__ == "__main__":``, as runs are processes of their own.

    Returns:
        What ``summary.json`` holds.

    Raises:
        FileExistsError: If ``config.out`` holds something else, or runs with other training settings.
        BlockingIOError: If another comparison is writing to ``config.out``.
        ChildProcessError: If a run's process was killed.
        ModuleNotFoundError: If matplotlib or jinja2 is not installed.
        OSError: If ``config.out`` cannot be written.
        ValueError: If data, model and settings do not go together; and whatever else a run raises.
    """
    check_protocol(config)
    require_plotting("compare")
    with sole_writer(config.out):
        _claim(config)
        return _compare(config)


def _compare(config: CompareConfig) -> dict[str, Any]:
    """:func:`compare` in a folder that is its own."""
    grids = {name: grid_of(config, name) for name in config.optimizers}
    tuning = [run for grid in grids.values() if len(grid) > 1 for run in grid]
    tuned = _execute(config, tuning)
    best = {name: min(grid, key=lambda run: rank(config, run, tuned.get(run))) for name, grid in grids.items()}
    settings = [run for grid in grids.values() for run in grid] if config.sweep else list(best.values())
    reported = _execute(config, [replace(run, stage="report", seed=seed) for run in settings for seed in config.seeds])

    summary = summarise(config, tuned, reported, best)
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    save_curves(summary, config.out / "curves")
    write_report(summary, config.out / "report.html")
    print(text_table(summary))
    print(f"Report: {config.out / 'report.html'}")
    return summary


def _claim(config: CompareConfig) -> None:
    """Take ``config.out`` for this comparison, or make sure that it is this one's: its runs share all training settings."""
    path = config.out / "comparison.json"
    begun = any((config.out / "runs").glob("*/*/log.jsonl"))
    own = {name: value for name, value in asdict(config).items() if name in shared_names()}
    own = json.loads(json.dumps(own | {"tune_epochs": tuning_epochs(config)}, default=str))
    if path.exists() and begun:
        try:
            held = json.loads(path.read_bytes())
            if not isinstance(held, dict):
                raise ValueError(f"it holds a {type(held).__name__}")
        except ValueError as error:
            raise ValueError(f"{path} is damaged. Restore it, or choose another --out.") from error
        differing = [f"{key} is {held.get(key)!r} there and {own[key]!r} here" for key in own if held.get(key) != own[key]]
        if differing:
            raise FileExistsError(f"{config.out} holds another comparison: {', '.join(differing)}. Choose another --out.")
    # Without a run it is that of a command that was refused, and may be corrected.
    elif not path.exists() and {file.name for file in config.out.iterdir()} - {LOCK, temporary_of(path).name}:
        raise FileExistsError(f"{config.out} is not empty and holds no comparison. Choose another --out.")
    write_atomic(path, json.dumps(own, indent=1).encode())
    for left in (config.out / "runs").glob(f"*/*/{temporary_of(Path('*')).name}"):  # by a killed run that had ended otherwise
        left.unlink(missing_ok=True)


def _execute(config: CompareConfig, runs: Sequence[Run]) -> dict[Run, RunLog]:
    """The log of every run, in order; those that are not finished are started or continued, ``config.jobs`` at a time."""
    logs = {run: read_log(config.out / run.folder / "log.jsonl") for run in runs}
    waiting = [run for run, log in logs.items() if log is None or log.end is None]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs of stage '{runs[0].stage}' are finished already.")
    pool, stopping = ThreadPoolExecutor(config.jobs), threading.Event()

    def perform(run: Run) -> None:
        if not stopping.is_set():
            try:
                _in_own_process(_run_config(config, run))
            except BaseException:
                stopping.set()  # at once, lest this thread take up the next run
                raise

    try:
        futures = {pool.submit(perform, run): run for run in waiting}
        for count, future in enumerate(as_completed(futures), start=1):
            run = futures[future]
            try:
                future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    f"The process of run {config.out / run.folder} was killed, for want of memory perhaps. "
                    "The same command goes on from here; fewer --jobs or a smaller --batch-size take less."
                ) from error
            except Exception:
                print(f"Run {config.out / run.folder} failed; runs under way end first.", file=sys.stderr)
                raise
            log = logs[run] = read_log(config.out / run.folder / "log.jsonl")
            print(f"[{count}/{len(waiting)}] {run.stage} {run.folder.name}: {_outcome(log)}", flush=True)
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)
    found = {run: log for run, log in logs.items() if log is not None}
    _check_data(config, found)
    return found


def _check_data(config: CompareConfig, logs: Mapping[Run, RunLog]) -> None:
    """Refuse to compare runs of a stage that saw different data, as files may change between two calls."""
    seen: dict[int, list[str]] = {}
    for run, log in logs.items():
        if (checksum := log.header.get("data_crc32")) is not None:
            seen.setdefault(checksum, []).append(run.folder.name)
    if len(seen) > 1:
        fewest = min(seen.values(), key=len)
        raise ValueError(
            f"{config.data!r} has changed since some runs of {config.out} were made, {', '.join(fewest[:3])} among them, "
            "so that they do not compare. Choose another --out, or restore the data and remove the folders of those."
        )


def _outcome(log: RunLog | None) -> str:
    if log is None or log.end is None:
        return "no result"
    accuracy = log.last("test_accuracy")
    return f"{'diverged' if accuracy is None else f'accuracy {accuracy:.4f}'}, {log.end['seconds']:.0f} s"


def _run_config(config: CompareConfig, run: Run) -> TrainConfig:
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)} | dict.fromkeys(OPTIONS) | dict(run.options)
    tuning = run.stage == "tuning"
    out = config.out / run.folder
    values |= {
        "optimizer": run.optimizer,
        "lr": run.lr,
        "weight_decay": run.weight_decay,
        "seed": run.seed,
        "epochs": tuning_epochs(config) if tuning else config.epochs,
        "validation": tuning,
        "threads": threads_per_run(config),
        "out": out,
        "resume": (out / "log.jsonl").exists(),
    }
    return TrainConfig(**values)


def _in_own_process(config: TrainConfig) -> None:
    # A process per run: its peak memory is its own, and what one run does to torch's settings, the next does not see.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_train, config).result()


def _train(config: TrainConfig) -> None:
    """In the run's process: train, with everything it prints in ``console.txt``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config.out.mkdir(parents=True, exist_ok=True)
    with open(config.out / "console.txt", "a", encoding="utf-8") as console, redirect_stdout(console), redirect_stderr(console):
        train(config)
    if (peak := _peak_memory()) is not None:
        write_atomic(config.out / "memory.json", json.dumps({"peak_memory_bytes": peak}).encode())
    if config.validation:
        (config.out / "checkpoint.pt").unlink(missing_ok=True)  # the weights of a finished tuning run have served


def _end_with_parent() -> None:
    # If the comparison is killed, a run that lived on would write into the folder of the one that continues it.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _peak_memory() -> int | None:
    try:
        from resource import RUSAGE_SELF, getrusage
    except ModuleNotFoundError:  # Windows
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
