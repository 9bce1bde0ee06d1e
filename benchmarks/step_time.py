"""Step time and memory of optimizers on one training step, measured in turn in one run; on a GPU by its own events.

    python -m benchmarks.step_time --data ../shared/data --out benchmarks/results/step-time.json

Every round times a block of steps with each optimizer, one after the other, so that a change in the machine's speed meets all of them;
a ratio is the median over rounds of that round's ratio. A block is as long as BackMatch's interval between two measurements, so each
holds exactly one, in its middle: where a block begins a GPU waits for the host, as it does in no training loop every 20 steps.
Optimizers are built as in the panel, at a tenth of their centre rates, and see one batch of the task again and again.
"""

from __future__ import annotations

import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from backmatch.checks import check_in
from backmatch.cli.checkpoint import write_atomic
from backmatch.cli.models import build_model
from backmatch.cli.train import device_of, on_device
from benchmarks.peers import PEERS
from benchmarks.tasks import TASKS, Task
from benchmarks.training import held_bytes, placed

INTERVAL = 20
"""Steps of a block."""
SETTLED = 4 * INTERVAL + INTERVAL // 2
"""Steps before the first block: measurements, dense at first, come once per interval from then on, and in the middle of a block."""


def _model(name: str, width: float = 1.0) -> Any:
    return lambda data: build_model(name, in_shape=data.in_shape, classes=len(data.class_names), width=width)


WORKLOADS: Mapping[str, Task] = {
    "gpt-mini": TASKS["gpt"],
    "gpt-28m": replace(TASKS["gpt"], model=_model("gpt-mini", 6.0)),
    "vit": replace(TASKS["cifar10-vit"], batch_size=16),
    "vgg13-bn": TASKS["cifar10-vgg13-bn"],
    "resnet20": TASKS["cifar10-resnet20"],
    "resnet18": replace(TASKS["cifar10-resnet20"], model=_model("resnet18"), batch_size=512),
    "autoencoder": TASKS["mnist-autoencoder"],
}
"""Tasks of the panel, and two that are meant for a GPU: ``gpt-28m`` and ``resnet18``."""


@dataclass(frozen=True)
class Config:
    """Time training steps."""

    data: Path
    """Folder of cifar10/, mnist/ and tinyshakespeare.txt."""
    out: Path
    """JSON file of the results; written anew after every workload."""
    workloads: tuple[str, ...] = ("gpt-mini", "vgg13-bn", "autoencoder")
    """Which training steps."""
    optimizers: tuple[str, ...] = ("sgd", "adamw", "muon", "soap", "backmatch-sgd", "backmatch")
    """Names as in the panel."""
    rounds: int = 5
    """Blocks of every optimizer."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: a GPU."""
    threads: int = 1
    """CPU threads."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward and loss under autocast."""
    batch_size: int | None = None
    """In place of the workloads' own."""


class Loop:
    """One workload under one optimizer."""

    def __init__(self, workload: str, optimizer: str, data: Path, *, device: str, precision: str, batch_size: int | None) -> None:
        task = WORKLOADS[workload]
        self.task = replace(task, batch_size=batch_size or task.batch_size)
        self.data = placed(self.task.load(data, True), torch.device(device))
        torch.manual_seed(0)
        self.model = on_device(self.task.model(self.data), torch.device(device))
        peer = PEERS[optimizer]
        self.optimizer = peer.build(self.model, 0.1 * peer.centre_of(self.task.name), 1000)
        self.batch = next(self.data.batches(epoch=0, seed=0, batch_size=self.task.batch_size, augment=self.task.augment))
        self.device, self.precision = device, precision

    def seconds(self, count: int) -> float:
        """Of ``count`` steps; on a GPU those that its own clock says, whatever the host does meanwhile."""
        if self.device == "cpu":
            started = time.perf_counter()
            self._steps(count)
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._steps(count)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000.0

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.task.training_loss(self.data, self.model, *self.batch)
            loss.backward()
            self.optimizer.step()


def peak_memory(workload: str, optimizer: str, data: Path, settings: Mapping[str, Any]) -> int:
    """Bytes of an interval of steps, with a measurement before and after: resident in a process of its own, or held on the GPU."""
    if settings["device"] != "cpu":
        gc.collect()
        placed(WORKLOADS[workload].load(data, True), torch.device(settings["device"]))
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        Loop(workload, optimizer, data, **settings).seconds(INTERVAL + 1)
        return torch.cuda.max_memory_allocated() - held
    code = (
        "import resource, sys; from pathlib import Path; import torch; torch.set_num_threads(1); from benchmarks.step_time import Loop; "
        f"Loop({workload!r}, {optimizer!r}, Path({str(data)!r}), **{dict(settings)!r}).seconds({INTERVAL + 1}); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"
    )
    return int(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(config: Config, workload: str) -> list[dict[str, Any]]:
    """One entry per optimizer."""
    # First, while this process is small: a child starts with its parent's peak on Linux.
    settings: dict[str, Any] = {"device": config.device, "precision": config.precision, "batch_size": config.batch_size}
    peaks = {name: peak_memory(workload, name, config.data, settings) for name in config.optimizers}
    loops = {name: Loop(workload, name, config.data, **settings) for name in config.optimizers}
    for loop in loops.values():
        loop.seconds(SETTLED)
    rounds = [{name: loop.seconds(INTERVAL) / INTERVAL for name, loop in loops.items()} for _ in range(config.rounds)]
    entries = []
    for name, loop in loops.items():
        parameters = sum(p.numel() for p in loop.model.parameters())
        entries.append(
            {
                "workload": workload,
                "optimizer": name,
                "batch_size": loop.task.batch_size,
                "parameters": parameters,
                "seconds_per_step": [row[name] for row in rounds],
                "median_ratio_to": {other: statistics.median(row[name] / row[other] for row in rounds) for other in config.optimizers},
                "state_bytes_per_parameter": held_bytes(loop.optimizer.state, {id(p) for p in loop.model.parameters()}) / parameters,
                "peak_memory_bytes": peaks[name],
            }
        )
    return entries


def main(config: Config) -> None:
    """Measure every workload."""
    check_in("rounds", config.rounds, 1)
    device_of(config.device)
    if config.batch_size is not None:
        check_in("batch_size", config.batch_size, 1)
    for what, names, known in (("workload", config.workloads, WORKLOADS), ("optimizer", config.optimizers, PEERS)):
        for name in names:
            if name not in known:
                raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(known)}.")
    for name in config.workloads:
        WORKLOADS[name].check_data(config.data)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    results: list[dict[str, Any]] = []
    record = {
        "command": "python -m benchmarks.step_time " + shlex.join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if config.device == "cuda" else f"cpu ({platform.machine()})",
        "threads": config.threads,
        "precision": config.precision,
        "rounds": config.rounds,
        "interval": INTERVAL,
        "results": results,
    }
    for workload in config.workloads:
        results += measure(config, workload)
        for entry in results[-len(config.optimizers) :]:
            ratios = "  ".join(f"x{entry['median_ratio_to'][other]:.2f} {other}" for other in config.optimizers[:2])
            print(
                f"{workload:12} {entry['optimizer']:14} {1e3 * statistics.median(entry['seconds_per_step']):7.1f} ms  {ratios}  "
                f"peak {entry['peak_memory_bytes'] / 2**20:.0f} MiB  state {entry['state_bytes_per_parameter']:.2f} B/parameter",
                flush=True,
            )
        write_atomic(config.out, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m benchmarks.step_time", description=__doc__))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"benchmarks.step_time: error: {error}", file=sys.stderr)
        sys.exit(2)
