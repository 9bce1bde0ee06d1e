"""Step time and peak memory of our optimizers against torch.optim.SGD, measured in turn in one run, with AdamW beside them.

    python benchmarks/step_time.py --threads 1 --out benchmarks/results/step-time.json

Every round times a block of training steps with each optimizer, one after the other, so that a change in the machine's speed
meets all of them; the ratio is the median over rounds of that round's ratio. A block is as long as one interval between two
measurements, so each block holds exactly one. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from backmatch import BackMatch, BackMatchSGD
from backmatch.cli.models import build_model
from backmatch.cli.optimizers import state_bytes

INTERVAL = 20
"""Steps of a round: the longest interval between two measurements."""
OPTIMIZERS = ("sgd", "adamw", "gradient", "probe", "kron")
MODELS = {"gpt-mini": (1.0, 32), "vit": (1.0, 16), "vgg13-bn": (0.25, 128)}
"""Model → width and batch size."""


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), 1e-3)
    if name == "kron":
        return BackMatch(model)
    return BackMatchSGD(model, estimator=name)  # type: ignore[arg-type]


class Task:
    """One model under one optimizer, stepped on the same random batch."""

    def __init__(self, model: str, optimizer: str) -> None:
        torch.manual_seed(0)
        width, batch_size = MODELS[model]
        in_shape, classes = ((64,), 65) if model == "gpt-mini" else ((3, 32, 32), 10)
        self.model = build_model(model, in_shape=in_shape, classes=classes, width=width)
        self.optimizer = make(optimizer, self.model)
        text = len(in_shape) == 1
        self.x = torch.randint(0, classes, (batch_size, *in_shape)) if text else torch.randn(batch_size, *in_shape)
        self.y = torch.randint(0, classes, (batch_size, *in_shape) if text else (batch_size,))

    def steps(self, count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x).flatten(0, -2), self.y.flatten()).backward()
            self.optimizer.step()
        return time.perf_counter() - started


def peak_memory(model: str, optimizer: str) -> int:
    """Peak resident bytes of a fresh process that makes an interval of steps, with a measurement before and after it."""
    code = (
        f"import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1); "
        f"from step_time import Task; Task({model!r}, {optimizer!r}).steps({INTERVAL + 1}); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    kibibytes = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return int(kibibytes) * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, object]] = []
    record = {
        "command": "python benchmarks/step_time.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"cpu ({platform.machine()})",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "interval": INTERVAL,
        "results": results,
    }
    # First, while this process is small: a child starts with its parent's peak on Linux.
    peaks = {(model, name): peak_memory(model, name) for model in arguments.models for name in OPTIMIZERS}
    for model in arguments.models:
        width, batch_size = MODELS[model]
        tasks = {name: Task(model, name) for name in OPTIMIZERS}
        for task in tasks.values():
            task.steps(4 * INTERVAL)  # until measurements, dense at first, come once per interval
        rounds = [{name: task.steps(INTERVAL) / INTERVAL for name, task in tasks.items()} for _ in range(arguments.rounds)]
        memory = {name: peaks[model, name] for name in OPTIMIZERS}
        count = sum(p.numel() for p in tasks["sgd"].model.parameters())
        for name in OPTIMIZERS:
            ratios = [row[name] / row["sgd"] for row in rounds]
            result = {
                "model": model,
                "width": width,
                "batch_size": batch_size,
                "optimizer": name,
                "seconds_per_step_median": statistics.median(row[name] for row in rounds),
                "ratio_to_sgd_median": statistics.median(ratios),
                "ratio_to_sgd_quartiles": statistics.quantiles(ratios, n=4),
                "state_bytes_per_parameter": state_bytes(tasks[name].optimizer) / count,
                "peak_memory_bytes": memory[name],
                "peak_memory_ratio_to_sgd": memory[name] / memory["sgd"],
            }
            results.append(result)
            print(
                f"{model:10} {name:8} {result['seconds_per_step_median'] * 1e3:7.1f} ms  x{result['ratio_to_sgd_median']:.3f}  "
                f"memory x{result['peak_memory_ratio_to_sgd']:.3f}  state {result['state_bytes_per_parameter']:.2f} B/parameter",
                flush=True,
            )
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
