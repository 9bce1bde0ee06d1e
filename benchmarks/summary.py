"""From run files to everything that is reported, as one value for JSON; what is unknown or failed is None."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.plan import Protocol, best_factor, read_protocol, read_record, report_runs, tuning_runs
from benchmarks.tasks import TASKS
from benchmarks.verdicts import deviation_of, loss_ratios, mean_of, mean_ranks, verdict, welch

Record = Mapping[str, Any]


def summarise(folder: Path) -> dict[str, Any]:
    """Summarise the panel in ``folder``: every optimizer on every task whose runs are all there; the others are named in ``missing``.

    Raises:
        FileNotFoundError: If there is no panel, or no finished optimizer in it.
    """
    protocol = read_protocol(folder)
    tasks, missing, records = [], [], []
    for name in TASKS:
        cells = {}
        for optimizer in PEERS:
            if not (folder / "runs" / name / optimizer).exists():
                continue
            found = _cell(folder, protocol, (name, optimizer))
            if found is None:
                missing.append(f"{optimizer} on {name}")
            else:
                cells[optimizer] = found
                records += found[1]
        if cells:
            tasks.append(_task(name, protocol, cells))
    if not tasks:
        raise FileNotFoundError(f"{folder} holds no finished optimizer yet. Go on with: python -m benchmarks run --out {folder}.")
    # Ranks are those among the same optimizers on every task.
    common = [name for name in PEERS if all(any(entry["optimizer"] == name for entry in task["entries"]) for task in tasks)]
    by_task = {task["name"]: {e["optimizer"]: e["loss"]["values"] for e in task["entries"] if e["optimizer"] in common} for task in tasks}
    means = {task: {name: mean_of(values) for name, values in by_optimizer.items()} for task, by_optimizer in by_task.items()}
    return {
        "protocol": asdict(protocol),
        "optimizers": {name: {"title": peer.title, "kind": peer.kind} for name, peer in PEERS.items()},
        "versions": {key: ", ".join(sorted({r["versions"].get(key, "–") for r in records})) for key in records[0]["versions"]},
        "devices": sorted({record["device"] for record in records}),
        "hours": sum(record["seconds"] for record in records) / 3600,
        "missing": missing,
        "tasks": tasks,
        "totals": _totals(tasks),
        "ratios": {name: [None if r == float("inf") else r for r in values] for name, values in loss_ratios(means).items()},
        "ranks": {name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in mean_ranks(by_task).items()}
        if len(common) > 1
        else {},
    }


def merge(folders: Sequence[Path]) -> dict[str, Any]:
    """The tasks of several reported panels as one summary, without what needs the same optimizers on all of them: ranks and ratios.

    Raises:
        FileNotFoundError: If a folder has no ``summary.json``.
        ValueError: If one is damaged, or two panels have the same task.
    """
    tasks: dict[str, Mapping[str, Any]] = {}
    for folder in folders:
        path = folder / "summary.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing. Write it with: python -m benchmarks report --out {folder}.")
        try:
            found = {task["name"]: task for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no summary of a panel. Write it anew with: python -m benchmarks report --out {folder}.") from error
        if twice := sorted(found.keys() & tasks.keys()):
            raise ValueError(f"{path} has {', '.join(twice)}, as a folder before it has. Leave one of them out.")
        tasks |= found
    known = [name for name in TASKS if name in tasks]
    return {
        "optimizers": {name: {"title": peer.title, "kind": peer.kind} for name, peer in PEERS.items()},
        "tasks": [tasks[name] for name in known],
        "totals": _totals([tasks[name] for name in known]),
        "ranks": {},
    }


def _cell(folder: Path, protocol: Protocol, cell: tuple[str, str]) -> tuple[list[Record], list[Record]] | None:
    """Records of the grid and of the seeds of one optimizer on one task; None if one is missing."""
    grid = [read_record(folder, run) for run in tuning_runs(protocol, cell)]
    known: list[Record] = [record for record in grid if record is not None]
    if len(known) < len(grid):
        return None
    seeds = [read_record(folder, run) for run in report_runs(protocol, cell, best_factor(known))]
    reported: list[Record] = [record for record in seeds if record is not None]
    return (known, reported) if len(reported) == len(seeds) else None


def _task(name: str, protocol: Protocol, cells: Mapping[str, tuple[list[Record], list[Record]]]) -> dict[str, Any]:
    task = TASKS[name]
    for stage in range(2):
        checksums = {optimizer: {r["data_crc32"] for r in stages[stage] if "data_crc32" in r} for optimizer, stages in cells.items()}
        if len(set().union(*checksums.values())) > 1:
            raise ValueError(f"Runs of {name} saw different data, so they do not compare: {checksums}. Keep those of one --data.")
    entries = [_entry(optimizer, protocol, *records) for optimizer, records in cells.items()]
    peers = [entry for entry in entries if PEERS[entry["optimizer"]].kind == "peer" and entry["loss"]["mean"] is not None]
    best = min(peers, key=lambda entry: entry["loss"]["mean"], default=None)
    target = None if best is None else best["loss"]["mean"]
    sgd = next((entry for entry in entries if entry["optimizer"] == "sgd"), None)
    for entry in entries:
        step = _first_at(entry["curve"], target)
        entry["steps_to_target"] = step
        entry["seconds_to_target"] = None if step is None else step * entry["seconds_per_step"]
        entry["time_ratio_to_sgd"] = entry["seconds_per_step"] / sgd["seconds_per_step"] if sgd and entry["seconds_per_step"] else None
    losses = {entry["optimizer"]: entry["loss"]["values"] for entry in entries}
    return {
        "name": name,
        "title": task.title,
        "unit": task.unit,
        "steps": protocol.steps_of(name),
        "batch_size": task.batch_size,
        "augment": task.augment,
        "l2": task.l2,
        "parameters": next(iter(cells.values()))[1][0]["parameters"],
        "target": target,
        "target_of": None if best is None else best["optimizer"],
        "entries": entries,
        "verdicts": {
            ours: {other: _compare(losses[ours], losses[other]) for other in losses if PEERS[other].kind != "ours"}
            for ours in losses
            if PEERS[ours].kind == "ours"
        },
    }


def _entry(optimizer: str, protocol: Protocol, grid: Sequence[Record], seeds: Sequence[Record]) -> dict[str, Any]:
    """One optimizer on one task."""
    chosen, factors = seeds[0]["lr_factor"], protocol.lr_factors
    edge = {min(factors): "lowest", max(factors): "highest"}.get(chosen) if len(factors) > 1 else None
    shapes = {name: shape for name, shape in seeds[0]["shapes"].items() if len(shape) > 1}  # vectors follow their layer
    speeds = [record["seconds_per_step"] for record in seeds if record["seconds_per_step"] is not None]
    return {
        "optimizer": optimizer,
        "title": PEERS[optimizer].title,
        "kind": PEERS[optimizer].kind,
        "lr": seeds[0]["lr"],
        "lr_factor": chosen,
        "lr_at_grid_edge": edge,
        "loss": _statistics([record["loss"] for record in seeds]),
        "accuracy": _statistics([record["accuracy"] for record in seeds]),
        "failures": [{"seed": record["seed"], "failure": record["failure"]} for record in seeds if record["failure"]],
        "curve": _curve(seeds),
        "sensitivity": [
            {"lr_factor": record["lr_factor"], "lr": record["lr"], "loss": record["loss"], "failure": record["failure"]} for record in grid
        ],
        "seconds_per_step": statistics.median(speeds) if speeds else None,
        "state_bytes_per_parameter": max(record["state_bytes_per_parameter"] for record in seeds),
        "shapes": shapes,
        "paces": [
            {"step": moment["step"], "paces": {name: pace for name, pace in moment["paces"].items() if name in shapes}}
            for moment in seeds[0]["paces"]
        ],
    }


def _curve(seeds: Sequence[Record]) -> dict[str, list[Any]]:
    """Mean and deviation over the seeds at every evaluation; None from where one has failed."""
    longest = max((record["evaluated"] for record in seeds), key=len)
    columns = [[r["evaluated"][i]["loss"] if i < len(r["evaluated"]) else None for r in seeds] for i in range(len(longest))]
    return {
        "steps": [evaluation["step"] for evaluation in longest],
        "mean": [mean_of(column) for column in columns],
        "std": [deviation_of(column) for column in columns],
    }


def _first_at(curve: Mapping[str, list[Any]], target: float | None) -> int | None:
    """First evaluated step at which the mean curve is at the target."""
    pairs = zip(curve["steps"], curve["mean"], strict=True)
    return next((step for step, loss in pairs if target is not None and loss is not None and loss <= target), None)


def _compare(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, Any]:
    known = [[value for value in values if value is not None] for values in (ours, theirs)]
    whole = len(known[0]) == len(ours) and len(known[1]) == len(theirs)
    ours_mean, theirs_mean = mean_of(ours), mean_of(theirs)
    return {
        "verdict": verdict(ours, theirs),
        "difference": None if ours_mean is None or theirs_mean is None else ours_mean - theirs_mean,
        "relative": None if ours_mean is None or theirs_mean is None else ours_mean / theirs_mean - 1,
        "interval": welch(*known) if whole and min(map(len, known)) > 1 else None,
    }


def _totals(tasks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Ours → the other → how many tasks are won, tied and lost."""
    totals: dict[str, dict[str, dict[str, int]]] = {}
    for task in tasks:
        for ours, others in task["verdicts"].items():
            for other, comparison in others.items():
                counts = totals.setdefault(ours, {}).setdefault(other, {"win": 0, "tie": 0, "loss": 0})
                counts[comparison["verdict"]] += 1
    return totals


def _statistics(values: list[float | None]) -> dict[str, Any]:
    return {"mean": mean_of(values), "std": deviation_of(values), "values": values}
