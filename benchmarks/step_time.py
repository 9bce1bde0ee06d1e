"""Step time and peak memory of BackMatchSGD against torch.optim.SGD, measured in turn in one run.

    python benchmarks/step_time.py --out benchmarks/results/step-time.json

Every round times a block of training steps with each optimizer, one after the other, so that a change in the machine's speed
meets all of them; the ratio is the median over rounds of that round's ratio. A block is as long as one interval between two
measurements of the responses, so each block holds exactly one. Peak memory is that of a process of its own.
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

from backmatch import BackMatchSGD
from backmatch.cli.models import build_model

INTERVAL = 10
OPTIMIZERS = ("sgd", "probe", "loss", "rules")


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if name == "probe":
        return BackMatchSGD(model, interval=INTERVAL)
    return BackMatchSGD(model, estimator=name, per="tensor", interval=INTERVAL)  # type: ignore[arg-type]


class Task:
    """One model under one optimizer, stepped on the same random batch."""

    def __init__(self, model: str, width: float, optimizer: str, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = build_model(model, in_shape=(3, 32, 32), classes=10, width=width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make(optimizer, self.model)
        self.x = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(0, 10, (batch_size,))

    def steps(self, count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
        return time.perf_counter() - started


def peak_memory(model: str, width: float, optimizer: str, batch_size: int) -> int:
    """Peak resident bytes of a fresh process that makes an interval of steps, with a measurement before and after it."""
    code = (
        f"import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1); "
        f"from step_time import Task; Task({model!r}, {width}, {optimizer!r}, {batch_size}).steps({INTERVAL + 1}); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    kibibytes = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return int(kibibytes) * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    models = (("vgg13-bn", 0.25), ("resnet20", 1.0))
    # First, while this process is small: a child starts with its parent's peak on Linux.
    peaks = {(model, name): peak_memory(model, width, name, arguments.batch_size) for model, width in models for name in OPTIMIZERS}
    for model, width in models:
        tasks = {name: Task(model, width, name, arguments.batch_size) for name in OPTIMIZERS}
        for task in tasks.values():
            task.steps(4 * INTERVAL)  # until measurements, dense at first, come once per interval
        rounds = [{name: task.steps(INTERVAL) / INTERVAL for name, task in tasks.items()} for _ in range(arguments.rounds)]
        memory = {name: peaks[model, name] for name in OPTIMIZERS}
        for name in OPTIMIZERS:
            ratios = [row[name] / row["sgd"] for row in rounds]
            result = {
                "model": model,
                "width": width,
                "optimizer": name,
                "seconds_per_step_median": statistics.median(row[name] for row in rounds),
                "ratio_to_sgd_median": statistics.median(ratios),
                "ratio_to_sgd_quartiles": statistics.quantiles(ratios, n=4),
                "peak_memory_bytes": memory[name],
                "peak_memory_ratio_to_sgd": memory[name] / memory["sgd"],
            }
            results.append(result)
            print(
                f"{model:10} {name:6} {result['seconds_per_step_median'] * 1e3:7.1f} ms  x{result['ratio_to_sgd_median']:.3f}  "
                f"memory x{result['peak_memory_ratio_to_sgd']:.3f}"
            )
    record = {
        "command": "python benchmarks/step_time.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"cpu ({platform.machine()})",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "batch_size": arguments.batch_size,
        "interval": INTERVAL,
        "results": results,
    }
    arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
