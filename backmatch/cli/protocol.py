"""What a comparison runs: its settings, the grid of every optimizer, and the runs they make."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Suppress

from backmatch.checks import check_in
from backmatch.cli.optimizers import DEFAULT_LR, BackMatchOptions, build_optimizer, options_of
from backmatch.cli.train import TrainConfig

OPTIONS = tuple(field.name for field in fields(BackMatchOptions))
# Training settings that a folder's runs need not share.
FREE_SETTINGS = ("optimizer", "lr", "weight_decay", "seed", "validation", "resume", "out", "threads", "checkpoint_every", *OPTIONS)


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
    tune_for: Literal["accuracy", "loss", "target"] = "accuracy"
    """What the best setting is best in: validation accuracy or loss at the end, or steps to --target."""
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


def check_protocol(config: CompareConfig) -> None:
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
        check_in("seeds", seed, 0, 2**63)  # what torch's generators take
    if config.tune_seed in config.seeds:
        raise ValueError(f"Invalid tune_seed: {config.tune_seed}. Must not be one of --seeds, which report.")
    for name, value in (("epochs", config.epochs), ("tune_epochs", tuning_epochs(config)), ("jobs", config.jobs)):
        check_in(name, value, 1)
    if config.steps is not None and config.tune_epochs is not None:
        raise ValueError("steps and tune_epochs are both given. With --steps, tuning runs take as many.")
    if config.tune_for == "target" and config.target is None:
        raise ValueError("tune_for is 'target', but there is none to tune for. Give --target, an accuracy.")
    if config.target is not None:
        check_in("target", config.target, 0.0, 1.0, low_open=True, high_open=False)
    given = given_options(config)
    unused = given.keys() - frozenset().union(*map(options_of, config.optimizers))
    if unused:
        raise ValueError(f"{', '.join(sorted(unused))} given, but none of {', '.join(config.optimizers)} has that. Leave it out.")
    lr_centres(config)


def grid_of(config: CompareConfig, optimizer: str) -> list[Run]:
    """Tuning runs of one optimizer; settings that coincide (a factor of weight decay 0) stand once."""
    centre, decay = lr_centres(config)[optimizer], _defaults(config, optimizer)[1]
    options = tuple(options_given(config, optimizer).items())
    runs = [
        Run("tuning", optimizer, factor, centre * factor, decay * decay_factor, config.tune_seed, options)
        for factor in config.lr_factors
        for decay_factor in config.weight_decays
    ]
    return list({run.folder: run for run in runs}.values())


def lr_centres(config: CompareConfig) -> dict[str, float]:
    """Centre of the learning-rate grid by optimizer."""
    found = {name: _defaults(config, name)[0] for name in config.optimizers}
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


def given_options(config: CompareConfig) -> dict[str, Any]:
    return {name: value for name in OPTIONS if (value := getattr(config, name)) is not None}


def options_given(config: CompareConfig, optimizer: str) -> dict[str, Any]:
    """Those of the given options that this optimizer has."""
    return {name: value for name, value in given_options(config).items() if name in options_of(optimizer)}


def _defaults(config: CompareConfig, optimizer: str) -> tuple[float, float]:
    """Learning rate and weight decay that the optimizer has when none are given."""
    options = BackMatchOptions(**options_given(config, optimizer))
    group = build_optimizer(optimizer, torch.nn.Linear(1, 1), options=options).param_groups[0]
    return group["lr"], group["weight_decay"]


def tuning_epochs(config: CompareConfig) -> int:
    return config.epochs if config.tune_epochs is None else config.tune_epochs


def threads_per_run(config: CompareConfig) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or max(1, available // config.jobs)


def shared_names() -> list[str]:
    return [field.name for field in fields(TrainConfig) if field.name not in FREE_SETTINGS]


def command_line(config: CompareConfig) -> str:
    """The command line of ``config``: flags of everything that differs from its default."""
    words = ["backmatch", "compare"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool) and isinstance(field.default, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
