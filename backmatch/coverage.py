"""Which rule every parameter of a model falls under, before a run is spent on finding out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from backmatch import layers
from backmatch.estimators import EstimatorName, Per, check_estimator, default_per, unit_dims
from backmatch.probe import Inputs, first_samples, squared_response_gradients


@dataclass(frozen=True)
class Rule:
    """What one parameter tensor gets.

    Attributes:
        names: Its names in the model; a tied parameter has several.
        shape: Its shape.
        layer: Class of the module that owns it.
        rule: In words. "unused", "fallback" and "refused" begin those that deserve a look.
        paces: Number of paces; 0 if it is not optimized.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    layer: str
    rule: str
    paces: int


def coverage(
    model: nn.Module, *inputs: Any, estimator: EstimatorName = "gradient", per: Per | None = None, quiet: bool = False
) -> list[Rule]:
    """Print, for every parameter of ``model``, which rule :class:`backmatch.optimizer.BackMatchSGD` has for it.

    Args:
        model: The network.
        *inputs: Arguments of its forward, a batch ``[N, ...]``. With them the table knows which parameters the output depends on: the
            others get no gradient, or with other estimators the fallback rule, which shows at the first step only, by a warning.
        estimator: As the optimizer's.
        per: As the optimizer's.
        quiet: Return the table without printing it.

    Returns:
        A rule per parameter tensor, in the model's order.

    Raises:
        ValueError: If an estimator is not known, or the output of ``model(*inputs)`` depends on no parameter.
    """
    per = per or default_per(estimator)
    check_estimator(estimator, per)
    dims = unit_dims(model) if per == "unit" else {}
    reached = None
    if inputs and any(p.requires_grad for p in model.parameters()):
        reached = set(squared_response_gradients(model, first_samples(Inputs(inputs, {}), 2), seed=0))
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    rules = []
    for p, (first, *others) in names.items():
        layer = model.get_submodule(first.rpartition(".")[0])
        words, paces = _rule(p, layer, first, estimator, dims.get(first), reached)
        rules.append(Rule((first, *others), tuple(p.shape), type(layer).__name__, words, paces))
    if not quiet:
        print(_table(rules))
    return rules


def _rule(
    p: nn.Parameter, layer: nn.Module, name: str, estimator: EstimatorName, unit_dim: int | None, reached: set[str] | None
) -> tuple[str, int]:
    if not p.requires_grad:
        return "frozen: left alone", 0
    if p.numel() == 0:
        return "empty: nothing to train", 0
    if p.is_complex():
        return "refused: complex", 0
    if reached is not None and name not in reached:
        if estimator == "gradient":
            return "unused: the output does not depend on it, so it gets no gradient", 0
        return "fallback: the output does not depend on it", 1
    if estimator in ("rules", "loss") and not layers.is_known(layer):
        return f"refused: {type(layer).__name__} has no rule; use estimator='probe'", 0
    if unit_dim is None:
        size = "; size of the median matrix" if p.ndim <= 1 else ""
        return f"one pace{size}", 1
    what = "row" if isinstance(layer, nn.Embedding) else "output unit"
    return f"a pace per {what}, dimension {unit_dim}", p.shape[unit_dim]


def _table(rules: list[Rule]) -> str:
    header = ("parameter", "shape", "layer", "rule", "paces")
    rows = [(" = ".join(r.names), "x".join(map(str, r.shape)) or "scalar", r.layer, r.rule, str(r.paces)) for r in rules]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
    optimized = sum(r.paces > 0 for r in rules)
    attention = sum(r.rule.startswith(("unused", "fallback", "refused")) for r in rules)
    return "\n".join([*lines, f"{optimized} of {len(rules)} parameters optimized, {attention} unused, on the fallback rule or refused."])
