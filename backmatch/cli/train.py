"""Train one model on one data set: a log, checkpoints, and a resumed run that equals the uninterrupted one bit for bit."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from backmatch import __version__, distributed
from backmatch.checks import check_in
from backmatch.cli.checkpoint import (
    append_line,
    deferred_interrupt,
    load_checkpoint,
    save_checkpoint,
    sole_writer,
    temporary_of,
    write_atomic,
)
from backmatch.cli.data import TrainingData, load_data
from backmatch.cli.images import Augment, layout
from backmatch.cli.models import build_model
from backmatch.cli.optimizers import BackMatchOptions, build_optimizer, state_bytes
from backmatch.estimators import EstimatorName, Per
from backmatch.ladder import Length, Match

# Settings that may change when a run is resumed: they leave the weights as they are. `data` is compared by its content instead.
_NOT_OF_THE_RUN = ("data", "out", "resume", "threads", "checkpoint_every", "rank_timeout")


@dataclass(frozen=True)
class TrainConfig:
    """Train a model and log its progress.

    A run is stopped with Ctrl-C and continued with --resume: its weights come out bit for bit as if it had not been stopped (same
    machine, versions and thread count).

    Several processes train together under torchrun: torchrun --nproc-per-node 2 --max-restarts 3 -m backmatch.cli.main train ...
    """

    data: str = "digits"
    """'digits', a folder of parquet files or of images, a name on the Hugging Face hub; a text file, or 'python-docs', a text."""
    model: str = "resnet20"
    """mlp, mlp-15, lenet, vgg11/13/16/19 with or without -bn, resnet18/20/32/50, vit; gpt-mini for text."""
    width: float = 1.0
    """Multiplier on the channels (hidden units) of every layer."""
    optimizer: str = "backmatch-sgd"
    """sgd, sgd-nesterov, adam, adamw, rmsprop, backmatch-sgd, backmatch."""
    lr: float | None = None
    """Learning rate at its highest. Default: the optimizer's."""
    momentum: float | None = None
    """Momentum (first beta of Adam). Default: the optimizer's."""
    weight_decay: float | None = None
    """Weight decay; decoupled in adamw and ours. Default: the optimizer's."""
    epochs: int = 10
    """Passes over the training set; the schedule ends there."""
    steps: int | None = None
    """Steps in place of epochs."""
    batch_size: int = 128
    """Images, or windows of 64 characters, per step; over all ranks together."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: down to 0 along a cosine, step by step, or constant."""
    warmup: float = 0.0
    """Linear warm-up: steps if 1 or more, otherwise a fraction of all steps."""
    seed: int = 0
    """Of the initial weights, the data order and the augmentation."""
    augment: Augment = "none"
    """crop-flip: random shifts by up to 4 pixels and horizontal mirroring."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in training and evaluation; weights and loss stay float32."""
    device: str = "cpu"
    """Where to train, for example cuda."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    limit: int | None = None
    """Train on this many images, drawn at random, or on the first windows of a text. Default: all."""
    validation: bool = False
    """Evaluate on a tenth of the training set, held out, in place of the test set: for tuning."""
    evals_per_epoch: int = 1
    """Evaluations per epoch, evenly spaced, the last at its end; and one after the last step."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: one at the end of every epoch."""
    out: Path = Path("runs/train")
    """Folder of log.jsonl and checkpoint.pt."""
    resume: bool = False
    """Continue the run in --out from its checkpoint."""
    rank_timeout: float = 600.0
    """Under torchrun: seconds to wait for another rank before giving up."""
    estimator: EstimatorName | None = None
    """backmatch-sgd: where the paces come from."""
    interval: int | None = None
    """ours: steps between two estimates."""
    beta: float | None = None
    """ours: weight of the old average of estimates."""
    power: float | None = None
    """ours: exponent of the rate; 1 is the paper's."""
    relative: bool | None = None
    """backmatch-sgd: whether rates hold for relative changes of the parameters."""
    per: Per | None = None
    """backmatch-sgd: one pace per parameter tensor or per output unit."""
    bound: float | None = None
    """backmatch-sgd: largest factor between a pace and the median of all."""
    max_change: float | None = None
    """backmatch-sgd: largest relative change of the parameters by one step, before momentum."""
    max_stretch: float | None = None
    """backmatch-sgd: what leading singular values of a matrix's step are held to, relative to the largest of a white matrix of its size."""
    decay_floor: float | None = None
    """backmatch-sgd: size, in units of one over the root of the inputs, that weight decay ends at."""
    nesterov: bool | None = None
    """ours: whether momentum looks ahead."""
    samples: int | None = None
    """backmatch-sgd: samples of a batch that estimates are made on."""

    match: Match | None = None
    """backmatch: scalar, gram or kron."""
    length: Length | None = None
    """backmatch: plain, rms or spectral, the argument ``step`` of the class."""
    damping: float | None = None
    """backmatch: added to A and B, relative to their mean eigenvalue."""

    @property
    def options(self) -> BackMatchOptions:
        """The settings that only our optimizers have."""
        return BackMatchOptions(**{field.name: getattr(self, field.name) for field in fields(BackMatchOptions)})


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. ``records`` are the evaluation lines of its log, from the first step on."""

    out: Path
    steps: int
    diverged: bool
    seconds: float
    records: list[dict[str, Any]]

    @property
    def test_accuracy(self) -> float:
        """At the last evaluation; NaN if there was none."""
        return self.records[-1]["test_accuracy"] if self.records else math.nan

    @property
    def test_loss(self) -> float:
        """At the last evaluation; NaN if there was none, or if it was not finite."""
        loss = self.records[-1]["test_loss"] if self.records else None
        return math.nan if loss is None else loss


@dataclass
class _Progress:
    """What a run carries from step to step beside weights, optimizer and generator."""

    step: int = 0
    loss_sum: float = 0.0  # over the steps since the last evaluation
    loss_count: int = 0
    seconds: float = 0.0  # training only
    seconds_at_evaluation: float = 0.0


def train(config: TrainConfig, data: TrainingData | None = None) -> TrainResult:
    """Train as ``config`` says, writing ``log.jsonl`` and ``checkpoint.pt`` to ``config.out``.

    The log's first line holds settings, versions and device, then comes one line per evaluation, then one with ``"event": "end"``.
    A training loss that is not finite ends the run there: ``diverged`` is set and no further checkpoint is written.

    Under torchrun every rank takes its share of each batch; rank 0 alone writes, and the others' results hold no records. A run that
    torchrun starts again goes on from its checkpoint.

    Args:
        config: The settings.
        data: Used instead of reading ``config.data``, to read once for several runs.

    Raises:
        FileExistsError: If ``config.out`` holds a run and ``config.resume`` is not set.
        BlockingIOError: If another run is writing to ``config.out``.
        FileNotFoundError: If there is nothing to resume, or no such data.
        ValueError: If a setting or the data are invalid, or the checkpoint belongs to another run.
        OSError: If ``config.out`` cannot be written.
        KeyboardInterrupt: After Ctrl-C, once the last finished step is saved.
        ConnectionError: If another rank ended, or hangs.
    """
    _check(config)
    log_path, checkpoint_path = config.out / "log.jsonl", config.out / "checkpoint.pt"
    if config.resume and not log_path.exists():
        raise FileNotFoundError(f"No run to resume in {config.out}. Leave out --resume, or check --out.")
    with distributed.joined(config.device.partition(":")[0], config.rank_timeout):
        if distributed.is_restarted() and log_path.exists():
            config = replace(config, resume=True)
        if distributed.rank() > 0:
            return _run(config, data, log_path, checkpoint_path)
        with sole_writer(config.out):
            _prepare_folder(config, log_path, checkpoint_path)
            return _run(config, data, log_path, checkpoint_path)


def _run(config: TrainConfig, data: TrainingData | None, log_path: Path, checkpoint_path: Path) -> TrainResult:
    """:func:`train` in a folder that is its own."""
    device = device_of(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = (load_data(config.data, validation=config.validation, limit=config.limit) if data is None else data).to(device)
    per_epoch = data.steps_per_epoch(config.batch_size)
    if config.evals_per_epoch > per_epoch:
        raise ValueError(f"Invalid evals_per_epoch: {config.evals_per_epoch}. Must be at most the {per_epoch} steps of an epoch.")
    if min(config.batch_size, data.sizes[0]) < distributed.ranks():
        raise ValueError(
            f"Invalid batch_size: {config.batch_size}. Must be at least the {distributed.ranks()} ranks, of samples that there are."
        )
    data.check_augment(config.augment)
    total = config.epochs * per_epoch if config.steps is None else config.steps
    leads = distributed.rank() == 0

    model, optimizer = _build(config, data, device)
    peak_lr = optimizer.param_groups[0]["lr"]

    settings = run_settings(config, data)
    progress, records = _Progress(), []
    if config.resume and checkpoint_path.exists():
        progress = _restore(checkpoint_path, settings, model, optimizer)
        if leads:
            records = _truncate_log(log_path, progress.step)
            print(f"Resuming {config.out} after step {progress.step} of {total}.", flush=True)
    elif leads:
        write_atomic(log_path, _line({"event": "settings", **_settings_line(config, data, device)}).encode())

    parallel, diverged = distributed.replicated(model), False
    with (
        tqdm(total=total, initial=progress.step, unit="step", disable=None if leads else True, dynamic_ncols=True) as bar,
        deferred_interrupt() as interrupted,
    ):

        def save() -> None:
            if leads:
                save_checkpoint(checkpoint_path, _state(model, optimizer, progress), settings)

        while progress.step < total and not diverged:
            epoch, first = divmod(progress.step, per_epoch)
            started = time.perf_counter()
            for inputs, labels in data.batches(
                epoch=epoch, seed=config.seed, batch_size=config.batch_size, augment=config.augment, start=first
            ):
                lr = peak_lr * lr_factor(progress.step, total, config.warmup, config.schedule)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = _step(parallel, optimizer, inputs, labels, config.precision)
                if not math.isfinite(loss):
                    diverged = True
                    break
                progress.step += 1
                progress.loss_sum += loss
                progress.loss_count += 1
                progress.seconds += time.perf_counter() - started
                bar.update()

                in_epoch = progress.step - epoch * per_epoch
                ends_epoch = in_epoch == per_epoch
                # The k-th of E evaluations comes after step ceil(k * S / E) of the S in an epoch.
                due = in_epoch * config.evals_per_epoch // per_epoch > (in_epoch - 1) * config.evals_per_epoch // per_epoch
                if due or progress.step == total:
                    record = _evaluate(model, data, config.precision, progress, lr, per_epoch)
                    if leads:
                        records.append(record)
                        append_line(log_path, _line(record))  # on the disk before the checkpoint that follows it
                        if ends_epoch or progress.step == total:
                            bar.write(_epoch_line(record, total / per_epoch))
                            sys.stdout.flush()
                if progress.step % config.checkpoint_every == 0 if config.checkpoint_every else ends_epoch:
                    save()
                if distributed.on_any_rank(interrupted(), device):
                    save()
                    print(f"Stopped after step {progress.step} of {total}. Add --resume to continue.", file=sys.stderr)
                    raise KeyboardInterrupt
                if progress.step == total:
                    break
                started = time.perf_counter()

        if diverged and leads:
            bar.write(f"Diverged: the training loss is {loss} at step {progress.step + 1}. Try a lower --lr, or --warmup.")
        if not diverged and total % (config.checkpoint_every or per_epoch):
            save()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        end = {
            "event": "end",
            "step": progress.step,
            "diverged": diverged,
            "seconds": progress.seconds,
            "optimizer_state_bytes_per_parameter": state_bytes(optimizer) / parameters,
        }
        if leads:
            append_line(log_path, _line(end))
    return TrainResult(config.out, progress.step, diverged, progress.seconds, records)


def _check(config: TrainConfig) -> None:
    """Refuse bad settings; not in ``__post_init__``, where tyro would catch the error and frame it as one of its own."""
    hints = get_type_hints(TrainConfig)
    for name in ("schedule", "augment", "precision"):
        if getattr(config, name) not in get_args(hints[name]):
            raise ValueError(f"Invalid {name}: {getattr(config, name)!r}. Must be one of {', '.join(get_args(hints[name]))}.")
    for name, low in (("epochs", 1), ("batch_size", 2), ("warmup", 0), ("threads", 0), ("evals_per_epoch", 1)):
        check_in(name, getattr(config, name), low)
    check_in("seed", config.seed, 0, 2**63)  # what torch's generators take
    check_in("rank_timeout", config.rank_timeout, 0.0, low_open=True)
    for name in ("lr", "momentum", "weight_decay"):  # what is too high is the optimizer's to say
        if getattr(config, name) is not None:
            check_in(name, getattr(config, name), 0.0, high_open=False)
    if config.steps is not None:
        check_in("steps", config.steps, 1)
    if config.checkpoint_every is not None:
        check_in("checkpoint_every", config.checkpoint_every, 1)


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Multiplier on the learning rate at ``step`` (from 0) of ``total``.

    During the w warm-up steps ``(step + 1) / w``, then 1 (constant) or ``(1 + cos(π (step - w) / (total - w))) / 2``.
    """
    warmup_steps = round(warmup * total) if warmup < 1 else round(warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total - warmup_steps)))


def run_settings(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """Everything that decides a run's weights: two runs with equal settings are one run."""
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_OF_THE_RUN}
    return settings | {
        "in_shape": list(data.in_shape),
        "classes": len(data.class_names),
        "samples": list(data.sizes),
        "data_crc32": data.checksum,
    }


def _settings_line(config: TrainConfig, data: TrainingData, device: torch.device) -> dict[str, Any]:
    return {
        # JSON has no infinity, which max_change may be.
        "settings": {key: str(value) if value == math.inf else value for key, value in asdict(config).items()} | {"out": str(config.out)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "backmatch": __version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "ranks": distributed.ranks(),
        "seed": config.seed,
        "train_samples": data.sizes[0],
        "test_samples": data.sizes[1],
        "unit": data.unit,
        "class_names": data.class_names,
        "data_crc32": data.checksum,
    }


def _build(config: TrainConfig, data: TrainingData, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(config.seed)
    model = build_model(config.model, in_shape=data.in_shape, classes=len(data.class_names), width=config.width)
    model = on_device(model, device)
    return model, build_optimizer(
        config.optimizer, model, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, options=config.options
    )


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """In training mode; convolutions in the memory layout that is fast there."""
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        # The ignored error is a gap in torch's overloads.
        model = model.to(memory_format=layout(device))  # type: ignore[call-overload]
    return model.to(device).train()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, precision: str) -> float:
    """One step on this rank's share of a batch; gives the whole batch's loss before it. Nothing is updated where that is not finite."""
    count, ranks = len(labels), distributed.ranks()
    inputs, labels = (tensor.tensor_split(ranks)[distributed.rank()] for tensor in (inputs, labels))
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(inputs)
    loss = cross_entropy(logits.float().flatten(0, -2), labels.flatten())
    if ranks > 1:
        loss = loss * (len(labels) * ranks / count)  # whose mean over ranks is that over the batch
    value = distributed.sum_over_ranks([loss.detach() / ranks])[0].item()
    if math.isfinite(value):
        loss.backward()
        optimizer.step()
    return value


def device_of(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: If this machine, or this build of torch, has none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown to torch; known, but not of this build or machine
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"Cannot use device {name!r}: {reason}. Try --device cpu.") from error


def _prepare_folder(config: TrainConfig, log: Path, checkpoint: Path) -> None:
    """Refuse a folder that holds another run, before minutes go into reading data; and clear away what a killed one left half written."""
    if not config.resume and (log.exists() or checkpoint.exists()):
        raise FileExistsError(f"{config.out} already holds a run. Add --resume to continue it, or choose another --out.")
    for path in (log, checkpoint):
        temporary_of(path).unlink(missing_ok=True)
    if config.resume and not checkpoint.exists():
        if log.exists() and b'"event": "end"' in log.read_bytes():
            raise FileExistsError(f"{config.out} holds a finished run whose checkpoint is gone. Choose another --out, or remove its log.")
        print(f"{config.out} holds no checkpoint yet: starting over.")


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, progress: _Progress) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "progress": asdict(progress),
    }


def _restore(path: Path, settings: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> _Progress:
    state = load_checkpoint(path, settings)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        if state["cuda_generators"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_generators"])
        return _Progress(**state["progress"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # as torch says what does not fit
        raise ValueError(
            f"The state in checkpoint {path} does not fit this model and optimizer ({' '.join(str(error).split())}). "
            "Continue with the version of backmatch that wrote it, or choose another --out."
        ) from error


def _truncate_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop from the log what a resumed run will write again, and give the evaluations that stay."""
    kept: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            again = record["event"] != "settings" and not (record["event"] == "evaluation" and record["step"] <= step)
        except (KeyError, TypeError, ValueError) as error:
            if number == len(lines) and not line.endswith(b"\n"):  # the run was killed while it wrote this line
                break
            raise ValueError(f"Log {path} is damaged in line {number}. Restore it, or choose another --out.") from error
        if not again:
            kept.append(record)
    write_atomic(path, "".join(_line(record) for record in kept).encode())
    return [record for record in kept if record["event"] == "evaluation"]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, default=str, allow_nan=False) + "\n"


def _evaluate(model: nn.Module, data: TrainingData, precision: str, progress: _Progress, lr: float, per_epoch: int) -> dict[str, Any]:
    """The log line of an evaluation now; the mean training loss starts anew."""
    model.eval()
    distributed.take_from_first(list(model.buffers()))  # batch norms of other ranks saw other samples
    loss_sum, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for index, (inputs, labels) in enumerate(data.evaluation_batches()):
            if index % distributed.ranks() != distributed.rank():
                continue
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(inputs)
            loss_sum += cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum").item()
            correct += int((logits.argmax(-1) == labels).sum())
            count += labels.numel()
    model.train()
    if distributed.ranks() > 1:
        sums = torch.tensor([loss_sum, correct, count], dtype=torch.float64, device=next(model.parameters()).device)
        loss_sum, correct, count = distributed.sum_over_ranks([sums])[0].tolist()
    record = {
        "event": "evaluation",
        "step": progress.step,
        "epoch": progress.step / per_epoch,
        "train_loss": progress.loss_sum / progress.loss_count,
        "test_loss": loss_sum / count if math.isfinite(loss_sum) else None,
        "test_accuracy": correct / count,
        "lr": lr,
        "seconds": progress.seconds,
        "seconds_per_step": (progress.seconds - progress.seconds_at_evaluation) / progress.loss_count,
    }
    progress.loss_sum, progress.loss_count, progress.seconds_at_evaluation = 0.0, 0, progress.seconds
    return record


def _epoch_line(record: dict[str, Any], epochs: float) -> str:
    loss = "not finite" if record["test_loss"] is None else f"{record['test_loss']:.4f}"
    return (
        f"epoch {record['epoch']:.4g}/{epochs:.4g}  train loss {record['train_loss']:.4f}  test loss {loss}  "
        f"test accuracy {record['test_accuracy']:.4f}  {1000 * record['seconds_per_step']:.1f} ms/step"
    )
