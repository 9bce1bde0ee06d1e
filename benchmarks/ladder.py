"""The ladder against its peers: each tuned on a grid of the same width, then run over seeds that tuning did not see.

    python benchmarks/ladder.py --data ../shared/data --task gpt --out benchmarks/results/ladder-gpt.json

Every optimizer is tuned over three learning rates, 1/2, 1 and 2 times the centre that :data:`PEERS` states, with one seed and the loss on
held-out training data, at the full number of steps; the best then runs with three other seeds. Runs of a seed share initial weights and
data order; all have a cosine schedule after a warm-up over a twentieth of the steps, and the weight decay that their authors set.
Muon takes the matrices of hidden layers, AdamW the rest at the same rate. Evaluation is on the test set, its time is not counted. The file
is written after every run, and runs that it holds are not repeated.

torch.optim.Muon orthogonalises in bfloat16, which CPUs without that type emulate very slowly; --muon-fp32 lets the same function run in
float32, so that its time is comparable. Needs ``pip install pytorch_optimizer`` for SOAP.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import _muon

from backmatch import BackMatch, BackMatchSGD
from backmatch.cli.data import load_data
from backmatch.cli.models import build_model
from backmatch.cli.optimizers import state_bytes
from backmatch.cli.train import lr_factor

SEEDS, TUNE_SEED = (0, 1, 2), 1000
FACTORS = (0.5, 1.0, 2.0)
WARMUP = 0.05


@dataclass(frozen=True)
class Task:
    """``loss(data, model, inputs, labels)`` summed over predictions, and how many those are."""

    data: str
    model: Callable[[Any], nn.Module]
    loss: Callable[[Any, nn.Module, Tensor, Tensor], tuple[Tensor, int]]
    steps: int
    batch_size: int
    augment: str = "none"


def classification(data: Any, model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), reduction="sum"), labels.numel()


def reconstruction(data: Any, model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of every pixel, from 0 to 1, with its reconstruction, summed over the pixels of an image."""
    mean, std = data.moments
    images = (inputs * std + mean).flatten(1).div(255.0).clamp(0.0, 1.0)
    return F.binary_cross_entropy_with_logits(model(images), images, reduction="sum"), len(images)


def autoencoder(data: Any) -> nn.Module:
    """784-1000-500-250-30 and back (Hinton and Salakhutdinov 2006), ReLU, torch's default initialisation."""
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(d_in, d_out)] if index in (3, len(sizes) - 2) else [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers)


def named(name: str, width: float = 1.0) -> Callable[[Any], nn.Module]:
    return lambda data: build_model(name, in_shape=data.in_shape, classes=len(data.class_names), width=width)


TASKS = {
    "gpt": Task("tinyshakespeare.txt", named("gpt-mini"), classification, 500, 32),
    "autoencoder": Task("mnist", autoencoder, reconstruction, 703, 128),
    "vgg13-bn": Task("cifar10", named("vgg13-bn", 0.25), classification, 780, 128, augment="crop-flip"),
}


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of hidden layers, its AdamW for everything else, at one learning rate."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        hidden = [layer.weight for layer in layers[:-1]]
        chosen = set(hidden)
        rest = [p for p in model.parameters() if p not in chosen]
        self.parts = [torch.optim.Muon(hidden, lr, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr, weight_decay=0.1)]
        super().__init__(model.parameters(), {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()


def soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr, max_precondition_dim=1024)


PEERS: dict[str, tuple[dict[str, float], Callable[[nn.Module, float], torch.optim.Optimizer]]] = {
    "sgd": (
        {"gpt": 0.05, "autoencoder": 0.002, "vgg13-bn": 0.05},
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4),
    ),
    "adamw": (
        {"gpt": 0.003, "autoencoder": 0.001, "vgg13-bn": 0.002},
        lambda model, lr: torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05),
    ),
    "muon": ({"gpt": 0.01, "autoencoder": 0.003}, MuonAndAdamW),
    "soap": ({"gpt": 0.006, "autoencoder": 0.002, "vgg13-bn": 0.003}, soap),
    "backmatch-sgd": (dict.fromkeys(TASKS, 0.005), lambda model, lr: BackMatchSGD(model, lr)),
    "backmatch": (dict.fromkeys(TASKS, 0.05), lambda model, lr: BackMatch(model, lr)),
}
"""Centre of the grid by task, and how the optimizer is built."""


def run(task: Task, data: Any, name: str, lr: float, seed: int) -> dict[str, Any]:
    """One training run, evaluated at its end."""
    torch.manual_seed(seed)
    model = task.model(data).train()
    optimizer = PEERS[name][1](model, lr)
    losses: list[float] = []
    seconds = 0.0
    for inputs, labels in batches(task, data, seed):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(len(losses), task.steps, WARMUP, "cosine")
        optimizer.zero_grad()
        total, count = task.loss(data, model, inputs, labels)
        loss = total / count
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - started
        losses.append(loss.item())
    state = sum(state_bytes(part) for part in getattr(optimizer, "parts", [optimizer]))
    model.eval()
    with torch.no_grad():
        parts = [task.loss(data, model, *batch) for batch in data.evaluation_batches()]
    value = sum(total.item() for total, _ in parts) / sum(count for _, count in parts)
    return {
        "optimizer": name,
        "lr": lr,
        "seed": seed,
        "steps": len(losses),
        "loss": value if math.isfinite(value) and len(losses) == task.steps else None,
        "seconds": seconds,
        "state_bytes_per_parameter": state / sum(p.numel() for p in model.parameters()),
        "curve": [statistics.fmean(losses[i : i + 25]) for i in range(0, len(losses), 25)],
    }


def batches(task: Task, data: Any, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    done = epoch = 0
    while True:
        for batch in data.batches(epoch=epoch, seed=seed, batch_size=task.batch_size, augment=task.augment):
            if done == task.steps:
                return
            yield batch
            done += 1
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10/, mnist/ and tinyshakespeare.txt")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--optimizers", nargs="+", choices=PEERS, default=["sgd", "adamw", "muon", "soap", "backmatch-sgd", "backmatch"])
    parser.add_argument("--muon-fp32", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.muon_fp32:
        source = inspect.getsource(_muon._zeropower_via_newtonschulz)
        exec(source.replace(".bfloat16()", ".float()"), _muon.__dict__)
    task = TASKS[arguments.task]
    record = {
        "command": "python benchmarks/ladder.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"cpu ({platform.machine()})",
        "threads": arguments.threads,
        "tuning": [],
        "report": [],
    }
    if arguments.out.exists():
        held = json.loads(arguments.out.read_text())
        record |= {stage: held[stage] for stage in ("tuning", "report")}

    def perform(stage: str, data: Any, name: str, lr: float, seed: int) -> dict[str, Any]:
        for row in record[stage]:
            if (row["optimizer"], row["lr"], row["seed"]) == (name, lr, seed):
                return row
        row = run(task, data, name, lr, seed)
        record[stage].append(row)
        arguments.out.write_text(json.dumps(record, indent=1))
        print(f"{stage:7} {name:14} lr {lr:<8.4g} seed {seed}  loss {row['loss']}  {row['seconds']:.0f} s", flush=True)
        return row

    validation, test = (load_data(str(arguments.data / task.data), validation=validation) for validation in (True, False))
    for name in arguments.optimizers:
        centre = PEERS[name][0].get(arguments.task)
        if centre is None:
            continue
        grid = [perform("tuning", validation, name, centre * factor, TUNE_SEED) for factor in FACTORS]
        best = min(grid, key=lambda row: math.inf if row["loss"] is None else row["loss"])
        rows = [perform("report", test, name, best["lr"], seed) for seed in SEEDS]
        losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
        print(f"{name}: lr {best['lr']:g}, {statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f} (n = {len(rows)})", flush=True)


if __name__ == "__main__":
    main()
