"""Where training collapses or stalls: BackMatchSGD over a factor of 64 in the learning rate, and SGD at the same default.

    python benchmarks/lr_range.py --images ../shared/data/cifar10 --digits ../shared/data/mnist --out benchmarks/results/lr-range.json

Four tasks: narrow VGG13 with and without BatchNorm and ResNet-20 on CIFAR-10, a 15-layer MLP on MNIST (the plain networks with
torch's default initialisation). At its default learning rate BackMatchSGD runs with 3 seeds, and so does SGD (momentum 0.9) at the
same rate; at 1/8, 1/√8, √8 and 8 times the default, BackMatchSGD runs with one seed. A run whose training loss ends above that of
guessing has collapsed, one that ends within 2 % of it has stalled. The training loss is the mean over the last quarter of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backmatch.cli.data import load_data
from backmatch.cli.images import ImageData
from backmatch.cli.optimizers import DEFAULT_LR
from backmatch.cli.train import TrainConfig, train

FACTORS = (1 / 8, 1 / math.sqrt(8), 1.0, math.sqrt(8), 8.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    name: str
    data: str
    model: str
    width: float
    limit: int
    epochs: int


TASKS = (
    Task("MLP, 15 layers, MNIST", "digits", "mlp-15", 1.0, 60_000, 1),
    Task("VGG13-BN (0.25), CIFAR-10", "images", "vgg13-bn", 0.25, 12_800, 2),
    Task("VGG13 (0.25), CIFAR-10", "images", "vgg13", 0.25, 32_000, 1),
    Task("ResNet-20, CIFAR-10", "images", "resnet20", 1.0, 7_680, 1),
)


def run(task: Task, data: ImageData, optimizer: str, lr: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=task.model,
            width=task.width,
            optimizer=optimizer,
            lr=lr,
            epochs=task.epochs,
            seed=seed,
            precision="bf16",
            evals_per_epoch=4,
            out=Path(folder) / "run",
        )
        result = train(config, data)
    chance = math.log(len(data.class_names))
    quarter = result.records[-max(1, len(result.records) // 4) :]
    loss = statistics.fmean(record["train_loss"] for record in quarter) if result.records and not result.diverged else math.inf
    outcome = "collapsed" if loss > chance * 1.02 else "stalled" if loss > chance * 0.98 else "trained"
    return {
        "task": task.name,
        "steps": result.steps,
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
        "outcome": outcome,
        "train_loss": loss if math.isfinite(loss) else None,
        "test_accuracy": result.test_accuracy if math.isfinite(result.test_accuracy) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="CIFAR-10 in parquet files")
    parser.add_argument("--digits", required=True, help="MNIST in parquet files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    default = DEFAULT_LR["backmatch-sgd"]
    results = []
    for task in TASKS:
        data = load_data(getattr(arguments, task.data), limit=task.limit)
        plan = [("backmatch-sgd", default * factor, 0) for factor in FACTORS if factor != 1.0]
        plan += [(optimizer, default, seed) for optimizer in ("backmatch-sgd", "sgd") for seed in SEEDS]
        for optimizer, lr, seed in plan:
            row = run(task, data, optimizer, lr, seed)
            results.append(row)
            print(f"{task.name:28} {optimizer:14} lr {lr:<8.4g} seed {seed}  {row['outcome']:9} loss {row['train_loss']}", flush=True)
    record = {
        "command": "python benchmarks/lr_range.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"cpu ({platform.machine()})",
        "threads": arguments.threads,
        "results": results,
    }
    arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
