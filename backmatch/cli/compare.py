"""Compare optimizers fairly: each tuned on its own grid with held-out training images, then run over seeds and tested."""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Suppress

from backmatch.checks import check_in
from backmatch.cli.checkpoint import write_atomic
from backmatch.cli.optimizers import DEFAULT_LR, BackMatchOptions, build_optimizer
from backmatch.cli.plot import require_plotting, save_curves
from backmatch.cli.report import text_table, write_report
from backmatch.cli.train import TrainConfig, train

_OPTIONS = tuple(field.name for field in fields(BackMatchOptions))
# Training settings that a folder's runs need not share.
_FREE = ("optimizer", "lr", "weight_decay", "seed", "validation", "resume", "out", "threads", "checkpoint_every", *_OPTIONS)


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """Compare optimizers: tune each on held-out training images, then run the best setting of each over seeds on the test set.

    Runs of a seed share initial weights and data order. The same command again goes on where a stopped one stood; more optimizers,
    seeds, factors or options add their runs to those that --out holds.
    """

    # The protocol sets these for every run.
    optimizer: Suppress[str] = ""
    lr: Suppress[float | None] = None
    weight_decay: Suppress[float | None] = None
    seed: Suppress[int] = 0
    validation: Suppress[bool] = False
    resume: Suppress[bool] = False

    out: Path = Path("runs/compare")
    """Folder of summary.json, report.html, curves.svg, curves.png and all runs."""
    optimizers: tuple[str, ...] = ("sgd", "backmatch-sgd")
    """Names as in train; the first is the baseline."""
    lr_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Every optimizer's grid: these times its own centre."""
    centre_lr: tuple[str, ...] = ()
    """name=value: an optimizer's centre, instead of its default learning rate."""
    weight_decays: tuple[float, ...] = (1.0,)
    """The same for weight decay: factors times the optimizer's default."""
    tune_epochs: int | None = None
    """Epochs of a tuning run. Default: --epochs."""
    tune_seed: int = 1000
    """Seed of the tuning runs, not one of --seeds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs that are reported."""
    sweep: bool = False
    """Run the seeds for every setting, not only the best: test accuracy against learning rate."""
    target: float | None = None
    """Test accuracy for 'epochs to target'. Default: the baseline's final mean."""
    jobs: int = 1
    """Runs at a time, each in a process of its own with its share of the CPU threads. They slow each other down."""


@dataclass(frozen=True)
class Run:
    """One run of the protocol, and where it lies under ``out``."""

    stage: Literal["tuning", "report"]
    optimizer: str
    lr_factor: float
    lr: float
    weight_decay: float
    seed: int
    options: tuple[tuple[str, Any], ...] = ()  # those of BackMatchOptions that are given

    @property
    def setting(self) -> tuple[str, float, float]:
        """What the seeds of an entry share."""
        return self.optimizer, self.lr, self.weight_decay

    @property
    def folder(self) -> Path:
        """Relative to the comparison's folder."""
        options = "".join(f"-{name}{value}" for name, value in self.options)
        return Path("runs", self.stage, f"{self.optimizer}{options}-lr{self.lr:g}-wd{self.weight_decay:g}-seed{self.seed}")


@dataclass(frozen=True)
class RunLog:
    """A log that :func:`backmatch.cli.train.train` wrote; ``end`` is None while the run is under way or was stopped."""

    header: dict[str, Any]
    evaluations: list[dict[str, Any]]
    end: dict[str, Any] | None

    @property
    def diverged(self) -> bool:
        """Whether training stopped on a loss that is not finite, or ended with a test loss that is not."""
        return self.end is None or self.end["diverged"] or not self.evaluations or self.evaluations[-1]["test_loss"] is None

    def last(self, key: str) -> float | None:
        """Value at the last evaluation of a run that did not diverge."""
        return None if self.diverged else self.evaluations[-1][key]


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the comparison and write ``summary.json``, ``curves.svg``, ``curves.png`` and ``report.html`` to ``config.out``.

    Stage 1 runs every optimizer on its whole grid with ``tune_seed``, on a tenth of the training images held out; the best final
    accuracy wins (a diverged run is worst; of equals the lower loss, then the lower rate). An optimizer with one setting needs no
    tuning. Stage 2 runs the winners with all ``seeds`` on all training images and evaluates on the test set.

    Called from a script, it belongs under ``if __name__ == "__main__":``, as runs are processes of their own.

    Returns:
        What ``summary.json`` holds.

    Raises:
        FileExistsError: If ``config.out`` holds something else, or runs with other training settings.
        ChildProcessError: If a run's process was killed.
        ModuleNotFoundError: If matplotlib or jinja2 is not installed.
        OSError: If ``config.out`` cannot be written.
        ValueError: If data, model and settings do not go together; and whatever else a run raises.
    """
    _check(config)
    require_plotting("compare")
    _claim(config)
    grids = {name: _grid(config, name) for name in config.optimizers}
    tuning = [run for grid in grids.values() if len(grid) > 1 for run in grid]
    tuned = _execute(config, tuning)
    best = {name: min(grid, key=lambda run: _rank(run, tuned)) for name, grid in grids.items()}
    settings = [run for grid in grids.values() for run in grid] if config.sweep else list(best.values())
    reported = _execute(config, [replace(run, stage="report", seed=seed) for run in settings for seed in config.seeds])

    summary = summarise(config, tuned, reported, best)
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    save_curves(summary, config.out / "curves")
    write_report(summary, config.out / "report.html")
    print(text_table(summary))
    print(f"Report: {config.out / 'report.html'}")
    return summary


def read_log(path: Path) -> RunLog | None:
    """The log at ``path``; None if there is none or it holds no full line. A last line that was cut off is dropped."""
    records = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError:  # the run was killed while it wrote this line
            break
    if not records:
        return None
    end = records[-1] if records[-1]["event"] == "end" else None
    return RunLog(records[0], [record for record in records if record["event"] == "evaluation"], end)


def summarise(config: CompareConfig, tuned: dict[Run, RunLog], reported: dict[Run, RunLog], best: dict[str, Run]) -> dict[str, Any]:
    """Everything that is reported, from the logs alone, ready for JSON; what is unknown or not finite is None."""
    groups: dict[tuple[str, float, float], dict[Run, RunLog]] = {}
    for run, log in reported.items():
        groups.setdefault(run.setting, {})[run] = log
    chosen = {name: groups[run.setting] for name, run in best.items()}
    baseline = config.optimizers[0]
    target = config.target
    if target is None:
        target = _mean(log.last("test_accuracy") for log in chosen[baseline].values())
    entries = [_entry(config, runs, target, chosen=runs is chosen[next(iter(runs)).optimizer]) for runs in groups.values()]
    sgd = next((entry for entry in entries if entry["optimizer"] == "sgd" and entry["chosen"]), None)
    for entry in entries:
        entry["seconds_per_step_ratio_to_sgd"] = sgd and _ratio(entry["seconds_per_step"], sgd["seconds_per_step"])
        entry["epochs_to_target_ratio_to_sgd"] = sgd and _ratio(entry["epochs_to_target"]["mean"], sgd["epochs_to_target"]["mean"])
    logs = [*tuned.values(), *reported.values()]
    header = logs[-1].header
    shared = {name: value for name, value in header["settings"].items() if name not in _FREE}
    return {
        "command": _command(config),
        "versions": {key: ", ".join(sorted({log.header["versions"][key] for log in logs})) for key in header["versions"]},
        "device": ", ".join(sorted({log.header["device"] for log in logs})),
        "protocol": shared
        | {
            # JSON has no infinity, which max_change may be.
            "options": {key: str(value) if value == math.inf else value for key, value in _options(config).items()},
            "optimizers": list(config.optimizers),
            "baseline": baseline,
            "lr_factors": list(config.lr_factors),
            "centre_lr": _centres(config),
            "weight_decays": list(config.weight_decays),
            "tune_epochs": _tune_epochs(config),
            "tune_seed": config.tune_seed,
            "seeds": list(config.seeds),
            "sweep": config.sweep,
            "target": target,
            "target_given": config.target is not None,
            "jobs": config.jobs,
            "threads": _threads(config),
            "train_images": header["train_images"],
            "test_images": header["test_images"],
            "class_names": header["class_names"],
        },
        "tuning": [
            {
                **_named(run),
                "seed": run.seed,
                "diverged": log.diverged,
                "chosen": run == best[run.optimizer],
                "accuracy": log.last("test_accuracy"),
                "loss": log.last("test_loss"),
                "train_loss": log.last("train_loss"),
                "folder": run.folder.as_posix(),
            }
            for run, log in tuned.items()
        ],
        "entries": entries,
    }


def _entry(config: CompareConfig, runs: dict[Run, RunLog], target: float | None, *, chosen: bool) -> dict[str, Any]:
    """Statistics over the seeds of one setting. A mean over seeds of which one diverged is None: without it, it would flatter."""
    run, logs = next(iter(runs)), list(runs.values())
    longest = max((log.evaluations for log in logs), key=len)
    curves: dict[str, list[float | None]] = {}
    for name, key in (("accuracy", "test_accuracy"), ("test_loss", "test_loss"), ("train_loss", "train_loss")):
        columns = [[log.evaluations[i][key] if i < len(log.evaluations) else None for log in logs] for i in range(len(longest))]
        curves[f"{name}_mean"] = [_mean(column) for column in columns]
        curves[f"{name}_std"] = [_std(column) for column in columns]
    reached = [_first_at(log, target) for log in logs]
    edge = None
    if chosen and len(config.lr_factors) > 1:
        edge = {min(config.lr_factors): "lowest", max(config.lr_factors): "highest"}.get(run.lr_factor)
    seconds = [record["seconds_per_step"] for log in logs for record in log.evaluations]
    state_sizes = [log.end["optimizer_state_bytes_per_parameter"] for log in logs if log.end is not None]
    memory = [size for run in runs if (size := _read_memory(config.out / run.folder)) is not None]
    return {
        **_named(run),
        "chosen": chosen,
        "lr_at_grid_edge": edge,
        "seeds": [run.seed for run in runs],
        "n": len(runs),
        "diverged": sum(log.diverged for log in logs),
        "epochs": [record["epoch"] for record in longest],
        **curves,
        "final": {
            name: _statistics([log.last(key) for log in logs])
            for name, key in (("accuracy", "test_accuracy"), ("test_loss", "test_loss"), ("train_loss", "train_loss"))
        },
        "epochs_to_target": _statistics([None if record is None else record["epoch"] for record in reached]),
        "steps_to_target": _statistics([None if record is None else record["step"] for record in reached]),
        # The median over evaluations and seeds: the first steps of a run, which set things up, do not count.
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "optimizer_state_bytes_per_parameter": max(state_sizes),
        "peak_memory_bytes": max(memory, default=None),
        "folders": [run.folder.as_posix() for run in runs],
    }


def _check(config: CompareConfig) -> None:
    for name in ("optimizers", "lr_factors", "weight_decays", "seeds"):
        values = getattr(config, name)
        if not values:
            raise ValueError(f"Invalid {name}: empty. Give at least one.")
        if len(set(values)) < len(values):
            raise ValueError(f"Invalid {name}: {' '.join(map(str, values))}. Each may be given once.")
    for name in config.optimizers:
        if name not in DEFAULT_LR:
            raise ValueError(f"Unknown optimizer {name!r}. Known: {', '.join(DEFAULT_LR)}.")
    for factor in config.lr_factors:
        check_in("lr_factors", factor, 0.0, low_open=True)
    for factor in config.weight_decays:
        check_in("weight_decays", factor, 0.0)
    for seed in (*config.seeds, config.tune_seed):
        check_in("seeds", seed, 0)
    if config.tune_seed in config.seeds:
        raise ValueError(f"Invalid tune_seed: {config.tune_seed}. Must not be one of --seeds, which report.")
    for name, value in (("epochs", config.epochs), ("tune_epochs", _tune_epochs(config)), ("jobs", config.jobs)):
        check_in(name, value, 1)
    if config.target is not None:
        check_in("target", config.target, 0.0, 1.0, low_open=True, high_open=False)
    given = _options(config)
    if given and "backmatch-sgd" not in config.optimizers:
        raise ValueError(f"{', '.join(given)} given, but only 'backmatch-sgd' has that. Leave it out or add it to --optimizers.")
    _centres(config)


def _tune_epochs(config: CompareConfig) -> int:
    return config.epochs if config.tune_epochs is None else config.tune_epochs


def _centres(config: CompareConfig) -> dict[str, float]:
    """Centre of the learning-rate grid by optimizer."""
    found = {name: _defaults(name)[0] for name in config.optimizers}
    for text in config.centre_lr:
        name, _, value = text.partition("=")
        try:
            lr = float(value)
        except ValueError:
            raise ValueError(f"Invalid centre_lr: {text!r}. Must be name=value, for example sgd=0.1.") from None
        if name not in found:
            raise ValueError(f"Invalid centre_lr: {text!r}. {name!r} is not compared; --optimizers are {' '.join(config.optimizers)}.")
        check_in("centre_lr", lr, 0.0, low_open=True)
        found[name] = lr
    return found


def _claim(config: CompareConfig) -> None:
    """Take ``config.out`` for this comparison, or make sure that it is this one's: its runs share all training settings."""
    path = config.out / "comparison.json"
    own = {name: value for name, value in asdict(config).items() if name in _shared_names()}
    own = json.loads(json.dumps(own | {"tune_epochs": _tune_epochs(config)}, default=str))
    try:
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            differing = [f"{key} is {held.get(key)!r} there and {own[key]!r} here" for key in own if held.get(key) != own[key]]
            if differing:
                raise FileExistsError(f"{config.out} holds another comparison: {', '.join(differing)}. Choose another --out.")
        elif config.out.exists() and any(config.out.iterdir()):
            raise FileExistsError(f"{config.out} is not empty and holds no comparison. Choose another --out.")
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(own, indent=1).encode())
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"Cannot write to {config.out}: {error.strerror}. Choose another --out.") from error


def _shared_names() -> list[str]:
    return [field.name for field in fields(TrainConfig) if field.name not in _FREE]


def _grid(config: CompareConfig, optimizer: str) -> list[Run]:
    """Tuning runs of one optimizer; settings that coincide (a factor of weight decay 0) stand once."""
    centre, decay = _centres(config)[optimizer], _defaults(optimizer)[1]
    options = tuple(_options(config).items()) if optimizer == "backmatch-sgd" else ()
    runs = [
        Run("tuning", optimizer, factor, centre * factor, decay * decay_factor, config.tune_seed, options)
        for factor in config.lr_factors
        for decay_factor in config.weight_decays
    ]
    return list({run.folder: run for run in runs}.values())


def _options(config: CompareConfig) -> dict[str, Any]:
    return {name: value for name in _OPTIONS if (value := getattr(config, name)) is not None}


def _defaults(optimizer: str) -> tuple[float, float]:
    """Learning rate and weight decay that the optimizer has when none are given."""
    group = build_optimizer(optimizer, torch.nn.Linear(1, 1)).param_groups[0]
    return group["lr"], group["weight_decay"]


def _rank(run: Run, logs: dict[Run, RunLog]) -> tuple[float, float, float]:
    log = logs.get(run)
    accuracy, loss = (log.last("test_accuracy"), log.last("test_loss")) if log else (None, None)
    return (math.inf if accuracy is None else -accuracy, math.inf if loss is None else loss, run.lr)


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
    return {run: log for run, log in logs.items() if log is not None}


def _outcome(log: RunLog | None) -> str:
    if log is None or log.end is None:
        return "no result"
    accuracy = log.last("test_accuracy")
    return f"{'diverged' if accuracy is None else f'accuracy {accuracy:.4f}'}, {log.end['seconds']:.0f} s"


def _run_config(config: CompareConfig, run: Run) -> TrainConfig:
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)} | dict.fromkeys(_OPTIONS) | dict(run.options)
    tuning = run.stage == "tuning"
    out = config.out / run.folder
    values |= {
        "optimizer": run.optimizer,
        "lr": run.lr,
        "weight_decay": run.weight_decay,
        "seed": run.seed,
        "epochs": _tune_epochs(config) if tuning else config.epochs,
        "validation": tuning,
        "threads": _threads(config),
        "out": out,
        "resume": (out / "log.jsonl").exists(),
    }
    return TrainConfig(**values)


def _threads(config: CompareConfig) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or max(1, available // config.jobs)


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


def _read_memory(folder: Path) -> int | None:
    path = folder / "memory.json"
    return json.loads(path.read_text(encoding="utf-8"))["peak_memory_bytes"] if path.exists() else None


def _command(config: CompareConfig) -> str:
    """The command line of ``config``: flags of everything that differs from its default."""
    words = ["backmatch", "compare"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _named(run: Run) -> dict[str, Any]:
    return {"optimizer": run.optimizer, "lr": run.lr, "lr_factor": run.lr_factor, "weight_decay": run.weight_decay}


def _first_at(log: RunLog, target: float | None) -> dict[str, Any] | None:
    return next((record for record in log.evaluations if target is not None and record["test_accuracy"] >= target), None)


def _statistics(values: list[float | None]) -> dict[str, Any]:
    return {"mean": _mean(values), "std": _std(values), "values": values}


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known or not known else statistics.fmean(known)  # type: ignore[arg-type]


def _std(values: Iterable[float | None]) -> float | None:
    """Sample standard deviation (n - 1)."""
    known = list(values)
    return None if None in known or len(known) < 2 else statistics.stdev(known)  # type: ignore[type-var]


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None
