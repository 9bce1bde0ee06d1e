"""Show every layer of a model: gain, scale, response, pace and the eigenvalues of its local Hessians."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backmatch.checks import check_in
from backmatch.cli.checkpoint import read_checkpoint, write_atomic
from backmatch.cli.data import load_data
from backmatch.cli.models import build_model
from backmatch.cli.plot import require_plotting, save_layers
from backmatch.inspection import LayerRecord, inspect_layers


@dataclass(frozen=True)
class InspectConfig:
    """Show gain, scale, response, pace and local Hessians of every layer, on one batch of training data."""

    data: str = "digits"
    """As in train."""
    model: str = "resnet20"
    """As in train."""
    width: float = 1.0
    """Multiplier on the channels (hidden units) of every layer."""
    checkpoint: Path | None = None
    """A checkpoint of train: its model, width and weights. Default: fresh weights."""
    seed: int = 0
    """Of fresh weights, and of the batch."""
    batch_size: int = 32
    """Samples that the layers are described on."""
    power: float = 0.5
    """Exponent of the paces, as in train."""
    out: Path = Path("runs/inspect")
    """Folder of layers.csv, layers.svg and layers.png."""


def inspect(config: InspectConfig) -> list[LayerRecord]:
    """Print a row per layer and write ``layers.csv``, ``layers.svg`` and ``layers.png`` to ``config.out``.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no such data.
        ValueError: If a setting is invalid, or the file is no checkpoint of a model for these data.
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If ``config.out`` cannot be written.
    """
    require_plotting("inspect")
    check_in("seed", config.seed, 0, 2**63)
    check_in("batch_size", config.batch_size, 2)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"Cannot write to {config.out}: {error.strerror or error}. Choose another --out.") from error
    data = load_data(config.data)
    torch.manual_seed(config.seed)
    name, width, weights = config.model, config.width, None
    if config.checkpoint is not None:
        name, width, weights = _read_checkpoint(config.checkpoint)
    model = build_model(name, in_shape=data.in_shape, classes=len(data.class_names), width=width).train()
    if weights is not None:
        _load(model, weights, config)
    inputs, _ = next(data.batches(epoch=0, seed=config.seed, batch_size=config.batch_size))
    records = inspect_layers(model, inputs, power=config.power)

    rows = [row(record) for record in records]
    write_atomic(config.out / "layers.csv", _csv(rows).encode())
    save_layers(records, config.out / "layers")
    print(_text(rows))
    print(f"Written: {config.out / 'layers.csv'}, layers.svg, layers.png")
    return records


def row(record: LayerRecord) -> dict[str, Any]:
    """A record as columns; what is unknown is None."""
    columns = {
        "layer": record.name,
        "kind": record.kind,
        "parameter": record.parameter,
        "shape": "x".join(map(str, record.shape)),
        "gain": record.gain,
        "scale": record.scale,
        "response": record.response,
        "pace": record.pace,
        "estimator": record.estimator,
    }
    for side, spectrum in (("input", record.input_hessian), ("weight", record.weight_hessian)):
        for end in ("low", "mean", "high", "method"):
            columns[f"{side}_{end}"] = None if spectrum is None else getattr(spectrum, end)
    return columns


def _read_checkpoint(path: Path) -> tuple[str, float, dict[str, Any]]:
    """Model, width and weights."""
    try:
        content = read_checkpoint(path)
        return content["settings"]["model"], content["settings"]["width"], content["state"]["model"]
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no checkpoint {path}. 'backmatch train' writes checkpoint.pt to its --out.") from None
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of 'backmatch train', or it is damaged.") from error


def _load(model: nn.Module, weights: dict[str, Any], config: InspectConfig) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"The weights of {config.checkpoint} do not fit the shape or classes of {config.data!r}.") from error


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _text(rows: list[dict[str, Any]]) -> str:
    """The columns a terminal has room for, aligned; Hessians as lowest, mean and highest eigenvalue."""
    table = [["layer", "kind", "shape", "gain", "scale", "response", "pace", "input Hessian", "weight Hessian"]]
    for columns in rows:
        numbers = [_number(columns[name]) for name in ("gain", "scale", "response", "pace")]
        ranges = [" ".join(_number(columns[f"{side}_{end}"]) for end in ("low", "mean", "high")) for side in ("input", "weight")]
        table.append([columns["layer"], columns["kind"], columns["shape"], *numbers, *ranges])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
