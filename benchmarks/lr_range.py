"""One default learning rate: where BackMatchSGD's default ends against the best of a grid around it, task by task.

    python benchmarks/lr_range.py --data ../shared/data --out benchmarks/results/lr-range.json

Eight tasks, from digits to a language model and a vision transformer, each a short run with a cosine schedule and no warm-up. At every
factor of :data:`FACTORS` times the default BackMatchSGD runs with seed 0, and at the default with two seeds more. Figures are those of
the last evaluation, on held-out training data. The file is written after every run, and runs that it holds already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backmatch import BackMatchSGD
from backmatch.cli.checkpoint import write_atomic
from backmatch.cli.data import load_data
from backmatch.cli.train import TrainConfig, train

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """A short training run; ``data`` is a name, or a file or folder inside --data."""

    name: str
    data: str
    model: str
    steps: int
    batch_size: int = 128
    width: float = 1.0
    augment: str = "none"


TASKS = (
    Task("MLP, digits", "digits", "mlp", 150),
    Task("MLP, MNIST", "mnist", "mlp", 400),
    Task("MLP, 15 layers, MNIST", "mnist", "mlp-15", 800),
    Task("VGG13-BN (0.25), CIFAR-10", "cifar10", "vgg13-bn", 200, width=0.25, augment="crop-flip"),
    Task("VGG13 (0.25), CIFAR-10", "cifar10", "vgg13", 250, width=0.25, augment="crop-flip"),
    Task("ResNet-20, CIFAR-10", "cifar10", "resnet20", 150, batch_size=64, augment="crop-flip"),
    Task("GPT, characters", "tinyshakespeare.txt", "gpt-mini", 250, batch_size=32),
    Task("ViT, CIFAR-10", "cifar10", "vit", 60, batch_size=64, augment="crop-flip"),
)


def run(task: Task, folder: Path, lr: float, seed: int) -> dict[str, Any]:
    data = load_data(task.data if task.data == "digits" else str(folder / task.data), validation=True)
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(
            model=task.model,
            width=task.width,
            lr=lr,
            steps=task.steps,
            batch_size=task.batch_size,
            augment=task.augment,  # type: ignore[arg-type]
            seed=seed,
            out=Path(out) / "run",
        )
        result = train(config, data)
    return {
        "task": task.name,
        "steps": result.steps,
        "lr": lr,
        "seed": seed,
        "diverged": result.diverged,
        "loss": result.test_loss if math.isfinite(result.test_loss) else None,
        "accuracy": result.test_accuracy if math.isfinite(result.test_accuracy) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10/, mnist/ and tinyshakespeare.txt")
    models = [task.model for task in TASKS]
    parser.add_argument("--tasks", nargs="*", default=models, choices=models, help="models of the tasks to run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    default = BackMatchSGD(torch.nn.Linear(1, 1)).param_groups[0]["lr"]
    results = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else []
    done = {(row["task"], row["lr"], row["seed"]) for row in results}
    for task in TASKS:
        if task.model not in arguments.tasks:
            continue
        plan = [(factor * default, 0) for factor in FACTORS] + [(default, seed) for seed in SEEDS[1:]]
        for lr, seed in plan:
            if (task.name, lr, seed) in done:
                continue
            row = run(task, arguments.data, lr, seed)
            results.append(row)
            print(f"{task.name:28} lr {lr:<8.4g} seed {seed}  loss {row['loss']}  accuracy {row['accuracy']}", flush=True)
            record = {
                "command": "python benchmarks/lr_range.py " + " ".join(sys.argv[1:]),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "device": f"cpu ({platform.machine()})",
                "threads": arguments.threads,
                "default_lr": default,
                "results": results,
            }
            write_atomic(arguments.out, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
