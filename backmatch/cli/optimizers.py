"""Optimizers by name, with the settings a fair comparison starts from."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from backmatch.estimators import EstimatorName, Per
from backmatch.ladder import BackMatch, Length, Match
from backmatch.optimizer import BackMatchSGD

_OURS: dict[str, type[BackMatchSGD]] = {"backmatch-sgd": BackMatchSGD, "backmatch": BackMatch}

DEFAULT_LR: dict[str, float | None] = {
    **{"sgd": 0.1, "sgd-nesterov": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3},
    **dict.fromkeys(_OURS),
}
"""None: the class's own."""

_DEFAULT_WEIGHT_DECAY = {"sgd": 5e-4, "sgd-nesterov": 5e-4, "adam": 0.0, "adamw": 0.05, "rmsprop": 0.0}


@dataclass(frozen=True)
class BackMatchOptions:
    """Settings of our optimizers beyond those of SGD; None leaves the class's default."""

    estimator: EstimatorName | None = None
    interval: int | None = None
    beta: float | None = None
    power: float | None = None
    relative: bool | None = None
    per: Per | None = None
    bound: float | None = None
    max_change: float | None = None
    max_stretch: float | None = None
    decay_floor: float | None = None
    nesterov: bool | None = None
    samples: int | None = None
    match: Match | None = None
    length: Length | None = None
    damping: float | None = None


def options_of(name: str) -> frozenset[str]:
    """The fields of :class:`BackMatchOptions` that the optimizer called ``name`` has."""
    if name not in _OURS:
        return frozenset()
    parameters = set(inspect.signature(_OURS[name]).parameters)
    return frozenset((parameters | {"length"} if "step" in parameters else parameters) & set(asdict(BackMatchOptions())))


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    options: BackMatchOptions = BackMatchOptions(),
) -> torch.optim.Optimizer:
    """An optimizer over all parameters of ``model``.

    Args:
        name: A key of :data:`DEFAULT_LR`.
        model: The model to train.
        lr: Learning rate; None for ``DEFAULT_LR[name]``.
        momentum: SGD's (default 0.9) and RMSprop's (default 0); for Adam and AdamW the first beta (default 0.9).
        weight_decay: Default 5e-4 for SGD and 0 for Adam and RMSprop (added to the gradient), 0.05 for AdamW (decoupled), the class's own
            for ours (decoupled).
        options: For ours only, and each for those of ours that have it.

    Raises:
        ValueError: If the name is not known, an option does not belong to the optimizer, or the optimizer refuses a value.
    """
    if name not in DEFAULT_LR:
        raise ValueError(f"Unknown optimizer {name!r}. Known: {', '.join(DEFAULT_LR)}.")
    lr = DEFAULT_LR[name] if lr is None else lr
    extra = {key: value for key, value in asdict(options).items() if value is not None}
    if foreign := sorted(extra.keys() - options_of(name)):
        raise ValueError(f"{', '.join(foreign)} given for {name!r}, which has no such setting. Leave it out or change the optimizer.")
    if name in _OURS:
        if "length" in extra:
            extra["step"] = extra.pop("length")
        settings: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "cuda_graph": True}  # where there is one
        return _OURS[name](model, **{key: value for key, value in settings.items() if value is not None}, **extra)
    common: dict[str, Any] = {"lr": lr, "weight_decay": _DEFAULT_WEIGHT_DECAY[name] if weight_decay is None else weight_decay}
    params = model.parameters()
    if name in ("adam", "adamw"):
        adam = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return adam(params, betas=(0.9 if momentum is None else momentum, 0.999), **common)
    if name == "rmsprop":
        return torch.optim.RMSprop(params, momentum=momentum or 0.0, **common)
    return torch.optim.SGD(params, momentum=0.9 if momentum is None else momentum, nesterov=name == "sgd-nesterov", **common)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors an optimizer keeps between steps."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
