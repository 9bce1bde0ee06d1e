"""From the logs of a comparison's runs to the numbers that it reports."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backmatch.cli.protocol import (
    FREE_SETTINGS,
    CompareConfig,
    Run,
    command_line,
    given_options,
    lr_centres,
    threads_per_run,
    tuning_epochs,
)


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


def read_log(path: Path) -> RunLog | None:
    """The log at ``path``; None if there is none or it holds no full line. A last line that was cut off is dropped."""
    records = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:  # the run was killed while it wrote this line
            break
        if not isinstance(record, dict) or "event" not in record:
            raise ValueError(f"{path} is damaged: {text[:40]!r} is no record. Restore it, or remove the run's folder, to make it again.")
        records.append(record)
    if not records:
        return None
    end = records[-1] if records[-1]["event"] == "end" else None
    return RunLog(records[0], [record for record in records if record["event"] == "evaluation"], end)


def rank(config: CompareConfig, run: Run, log: RunLog | None) -> tuple[float, ...]:
    """Sort key of a tuning run, lowest best: by ``tune_for``; of equals the higher accuracy, the lower loss, the lower rate."""
    accuracy, loss = (log.last("test_accuracy"), log.last("test_loss")) if log else (None, None)
    reached = _first_at(log, config.target) if log and not log.diverged and config.tune_for == "target" else None
    in_accuracy = math.inf if accuracy is None else -accuracy
    in_loss = math.inf if loss is None else loss
    first = {"accuracy": in_accuracy, "loss": in_loss, "target": math.inf if reached is None else reached["step"]}
    return first[config.tune_for], in_accuracy, in_loss, run.lr


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
    shared = {name: value for name, value in header["settings"].items() if name not in FREE_SETTINGS}
    return {
        "command": command_line(config),
        "versions": {key: ", ".join(sorted({log.header["versions"][key] for log in logs})) for key in header["versions"]},
        "device": ", ".join(sorted({log.header["device"] for log in logs})),
        "protocol": shared
        | {
            # JSON has no infinity, which max_change may be.
            "options": {key: str(value) if value == math.inf else value for key, value in given_options(config).items()},
            "optimizers": list(config.optimizers),
            "baseline": baseline,
            "lr_factors": list(config.lr_factors),
            "centre_lr": lr_centres(config),
            "weight_decays": list(config.weight_decays),
            "tune_epochs": tuning_epochs(config),
            "tune_for": config.tune_for,
            "tune_seed": config.tune_seed,
            "seeds": list(config.seeds),
            "sweep": config.sweep,
            "target": target,
            "target_given": config.target is not None,
            "jobs": config.jobs,
            "threads": threads_per_run(config),
            "train_samples": header["train_samples"],
            "test_samples": header["test_samples"],
            "unit": header["unit"],
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
                "epochs_to_target": reached["epoch"] if (reached := _first_at(log, config.target)) else None,
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


def _read_memory(folder: Path) -> int | None:
    path = folder / "memory.json"
    return json.loads(path.read_text(encoding="utf-8"))["peak_memory_bytes"] if path.exists() else None


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
