"""Which runs a panel consists of, and where each lies: the grid of every optimizer on every task, then seeds at its best rate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from backmatch.checks import check_in
from backmatch.cli.checkpoint import temporary_of, write_atomic
from backmatch.cli.train import device_of
from benchmarks.peers import PEERS
from benchmarks.tasks import TASKS, Budget

Stage = Literal["tuning", "report"]
Cell = tuple[str, str]
"""One optimizer on one task, by their names."""


@dataclass(frozen=True)
class Protocol:
    """What all runs of a panel share. Two machines that split one have equal protocols.

    Attributes:
        budget: Decides the tasks and their steps.
        steps: In place of the budget's.
        tune_steps: Of the tuning runs; as many as the others by default.
        lr_factors: Every grid: these times the optimizer's own centre.
        tune_seed: Seed of the tuning runs.
        seeds: Seeds of the runs that are reported.
        evaluations: Of every run, evenly spaced, the last after the last step.
        evaluation_batches: How many batches of the held-out or test data those take; all by default.
        warmup: Share of the steps.
        device: ``cpu``, or ``cuda`` for the first GPU: their times do not compare, nor do runs agree to the last digit.
    """

    budget: Budget
    steps: int | None = None
    tune_steps: int | None = None
    lr_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    tune_seed: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    evaluations: int = 15
    evaluation_batches: int | None = None
    warmup: float = 0.05
    device: str = "cpu"

    def steps_of(self, task: str) -> int:
        """How many steps every reported run of a task has."""
        return self.steps or TASKS[task].steps[self.budget]


PROTOCOLS = {
    "small": Protocol("small", lr_factors=(1 / 3, 1.0, 3.0), seeds=(0, 1, 2), evaluations=10, evaluation_batches=2),
    "full": Protocol("full"),
}


@dataclass(frozen=True)
class Run:
    """One training run, and its file."""

    task: str
    optimizer: str
    stage: Stage
    lr_factor: float
    seed: int
    protocol: Protocol = field(repr=False)

    @property
    def lr(self) -> float:
        return self.lr_factor * PEERS[self.optimizer].centre_of(self.task)

    @property
    def steps(self) -> int:
        return (self.protocol.tune_steps if self.stage == "tuning" else None) or self.protocol.steps_of(self.task)

    @property
    def path(self) -> Path:
        """Relative to the panel's folder."""
        return Path("runs", self.task, self.optimizer, f"{self.stage}-lr{self.lr:.4g}-seed{self.seed}.json")

    def settings(self) -> dict[str, Any]:
        """What decides the run's outcome, ready for JSON: two runs with equal settings are one run."""
        own = {name: value for name, value in asdict(self).items() if name != "protocol"}
        return own | {"lr": self.lr, "steps": self.steps, "evaluations": self.protocol.evaluations}


def cells_of(protocol: Protocol, tasks: Sequence[str], optimizers: Sequence[str], shard: str = "0/1") -> list[Cell]:
    """The cells that one machine of several works on.

    Shard ``i/n`` has every n-th cell from the i-th on: shards are disjoint, and together they are complete. A cell is not split, as the
    runs it reports follow from the runs it tunes by.

    Raises:
        ValueError: If a name is not known, the budget lacks a task, or the shard is none.
    """
    for what, names, known in (("task", tasks, TASKS), ("optimizer", optimizers, PEERS)):
        for name in names:
            if name not in known:
                raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(known)}.")
        if len(set(names)) < len(names):
            raise ValueError(f"Invalid {what}s: {' '.join(names)}. Each may be given once.")
    for name in tasks:
        if protocol.budget not in TASKS[name].steps:
            having = ", ".join(task.name for task in TASKS.values() if protocol.budget in task.steps)
            raise ValueError(f"Budget {protocol.budget!r} has no task {name!r}. It has {having}.")
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"Invalid shard: {shard!r}. Must be i/n with i from 0 to n - 1, as 0/4.")
    return [(task, optimizer) for task in tasks for optimizer in optimizers][int(index) :: int(count)]


def tuning_runs(protocol: Protocol, cell: Cell) -> list[Run]:
    """The whole grid of one optimizer on one task."""
    return [Run(*cell, "tuning", factor, protocol.tune_seed, protocol) for factor in protocol.lr_factors]


def best_factor(records: Iterable[Mapping[str, Any]]) -> float:
    """Of tuning records, the factor with the lowest final loss; a diverged run is worst, of equals the lower rate."""
    return min((math.inf if record["loss"] is None else record["loss"], record["lr_factor"]) for record in records)[1]


def report_runs(protocol: Protocol, cell: Cell, factor: float) -> list[Run]:
    """The seeds of one optimizer on one task, at the rate that tuning chose."""
    return [Run(*cell, "report", factor, seed, protocol) for seed in protocol.seeds]


def read_record(folder: Path, run: Run) -> dict[str, Any] | None:
    """What a run left; None if it has not ended. A file that was cut off counts as none.

    Raises:
        FileExistsError: If the file is of a run with other settings.
    """
    path = folder / run.path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # of bytes that are no text, or text that is no JSON
        return None
    if not isinstance(record, dict):
        return None
    wanted = json.loads(json.dumps(run.settings()))
    differing = [f"{key} is {record.get(key)!r} there and {value!r} here" for key, value in wanted.items() if record.get(key) != value]
    if differing:
        raise FileExistsError(f"{path} is of another run: {', '.join(differing)}. Choose another --out, or remove the file.")
    return record


def claim(folder: Path, protocol: Protocol) -> None:
    """Take ``folder`` for a panel, or make sure that it is this one's.

    Raises:
        FileExistsError: If it holds another panel, or something else.
    """
    path = folder / "panel.json"
    if path.exists():
        held = read_protocol(folder)
        differing = [f"{key} is {asdict(held)[key]!r} there and {value!r} here" for key, value in asdict(protocol).items()
                     if asdict(held)[key] != value]  # fmt: skip
        if differing:
            raise FileExistsError(f"{folder} holds another panel: {', '.join(differing)}. Choose another --out.")
        return
    if folder.exists() and {file.name for file in folder.iterdir()} - {temporary_of(path).name}:
        raise FileExistsError(f"{folder} is not empty and holds no panel. Choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asdict(protocol), indent=1).encode())


def read_protocol(folder: Path) -> Protocol:
    """The protocol of the panel in ``folder``.

    Raises:
        FileNotFoundError: If it holds none.
        ValueError: If it is damaged, or of another version.
    """
    path = folder / "panel.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no panel. Make one: python -m benchmarks run --out {folder}.")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in held.items()}
        return Protocol(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}. Restore it, or choose another --out.") from error


def check_protocol(protocol: Protocol) -> None:
    """Refuse what no run can be made of."""
    for name in ("lr_factors", "seeds"):
        values = getattr(protocol, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"Invalid {name}: {' '.join(map(str, values)) or 'empty'}. Give at least one, and each once.")
    for factor in protocol.lr_factors:
        check_in("lr_factors", factor, 0.0, low_open=True)
    for seed in (*protocol.seeds, protocol.tune_seed):
        check_in("seeds", seed, 0)
    if protocol.tune_seed in protocol.seeds:
        raise ValueError(f"Invalid seeds: {protocol.tune_seed} is the seed of the tuning runs. Report others.")
    device_of(protocol.device)
    for name in ("steps", "tune_steps"):
        if (steps := getattr(protocol, name)) is not None:
            check_in(name, steps, 1)
