"""One run of the panel: a model trained for a fixed number of steps, and everything that is recorded of it."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import backmatch
from backmatch import BackMatch, BackMatchSGD
from backmatch.cli.train import device_of, lr_factor, on_device
from benchmarks.peers import PEERS
from benchmarks.plan import Run
from benchmarks.tasks import TASKS, Task

PACE_MOMENTS = (0.02, 0.2, 1.0)
"""When paces are recorded, as shares of the steps."""
NORM_BATCHES = 20


def perform(run: Run, data_folder: Path) -> dict[str, Any]:
    """Train as ``run`` says; returns its record, ready for JSON.

    A loss that is not finite, or a decomposition that fails on such numbers, ends the run there: it has diverged, and has no final
    values. What it recorded up to then is kept.
    """
    task, peer, protocol = TASKS[run.task], PEERS[run.optimizer], run.protocol
    device = device_of(protocol.device)
    data = placed(task.load(data_folder, run.stage == "tuning"), device)
    torch.manual_seed(run.seed)
    model = on_device(task.model(data), device)
    optimizer = peer.build(model, run.lr, run.steps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    due = {math.ceil(run.steps * (k + 1) / protocol.evaluations) for k in range(protocol.evaluations)}
    pace_steps = {max(1, round(share * run.steps)) for share in PACE_MOMENTS}
    losses: list[float] = []
    seconds: list[float] = []
    evaluations: list[dict[str, Any]] = []
    paces: list[dict[str, Any]] = []
    failure = None
    for step, (inputs, labels) in enumerate(_batches(task, data, run), start=1):
        started = time.perf_counter()
        if peer.scheduled:
            factor = lr_factor(step - 1, run.steps, protocol.warmup, "cosine")
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        optimizer.zero_grad()
        loss = task.training_loss(data, model, inputs, labels)
        value = loss.item()
        if not math.isfinite(value):
            failure = f"the training loss is {value} at step {step}"
            break
        loss.backward()
        try:
            optimizer.step()
        except torch.linalg.LinAlgError as error:
            failure = f"the optimizer failed at step {step}: {str(error).splitlines()[0]}"
            break
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(value)
        if step in pace_steps and (now := _paces(optimizer)):
            paces.append({"step": step, "paces": now})
        if step in due:
            with _averaged(model, optimizer, lambda: (batch[0] for batch in islice(_batches(task, data, run), NORM_BATCHES))):
                evaluation = _evaluate(task, data, model, protocol.evaluation_batches)
            evaluations.append({"step": step, "seconds": sum(seconds), **evaluation})
            if evaluation["loss"] is None:
                failure = f"the evaluated loss is not finite at step {step}"
                break
    parameters = sum(p.numel() for p in model.parameters())
    final = evaluations[-1] if failure is None else {"loss": None, "accuracy": None}
    return run.settings() | {
        "failure": failure,
        "loss": final["loss"],
        "accuracy": final["accuracy"],
        "steps_done": len(losses),
        "seconds": sum(seconds),
        # The median: neither the first steps, which set things up, nor what else the machine does counts.
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "parameters": parameters,
        "state_bytes_per_parameter": held_bytes(optimizer.state, {id(p) for p in model.parameters()}) / parameters,
        "evaluated": evaluations,
        "training_losses": [float(f"{value:.5g}") for value in losses],
        "paces": paces,
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        "data_crc32": data.checksum,
        "versions": _versions(),
        "device": f"{_processor()}, one thread" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


@lru_cache(maxsize=2)
def placed(data: Any, device: torch.device) -> Any:
    """The same data on ``device``, kept there from run to run."""
    return data.to(device)


def held_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors in a value, through containers and plain objects, as some optimizers keep lists or objects of their own.

    Args:
        value: Anything.
        seen: Ids of what does not count, such as parameters; those of what is counted are added.
    """
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(held_bytes(item, seen) for item in value)
    if not isinstance(value, dict):
        value = {} if isinstance(value, (type, Enum)) else getattr(value, "__dict__", {})
    return sum(held_bytes(item, seen) for item in value.values())


def _batches(task: Task, data: Any, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """As many as the run has steps; runs of a seed see the same."""

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            yield from data.batches(epoch=epoch, seed=run.seed, batch_size=task.batch_size, augment=task.augment)
            epoch += 1

    return islice(endless(), run.steps)


@contextmanager
def _averaged(model: nn.Module, optimizer: Optimizer, inputs: Any) -> Iterator[None]:
    """Evaluation mode; a schedule-free optimizer brings its averaged weights, for which batch normalisation has to be measured anew."""
    own: Any = optimizer if hasattr(optimizer, "eval") else None
    if own is not None:
        own.eval()
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            with torch.no_grad():
                for batch in inputs():
                    model(batch)
    model.eval()
    try:
        yield
    finally:
        model.train()
        if own is not None:
            own.train()


@torch.no_grad()
def _evaluate(task: Task, data: Any, model: nn.Module, batches: int | None) -> dict[str, float | None]:
    scores = [task.score(data, model, *batch) for batch in islice(data.evaluation_batches(), batches)]
    count = sum(score.count for score in scores)
    loss = sum(score.loss.item() for score in scores) / count
    hits = [int(score.correct) for score in scores if score.correct is not None]
    return {
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": sum(hits) / count if hits else None,
    }


def _paces(optimizer: Optimizer) -> dict[str, float]:
    """Mean pace of every tensor that follows one; those that BackMatch matches have none."""
    if not isinstance(optimizer, BackMatchSGD):
        return {}
    matched = {name for name, rule in optimizer.rules().items() if "pace" not in rule} if isinstance(optimizer, BackMatch) else set()
    return {name: float(f"{pace.mean().item():.5g}") for name, pace in optimizer.paces().items() if name not in matched}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "backmatch": backmatch.__version__}
    with suppress(PackageNotFoundError):
        found["pytorch_optimizer"] = version("pytorch_optimizer")
    return found


def _processor() -> str:
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
