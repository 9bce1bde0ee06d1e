"""Rules: what one layer contributes, by kind of layer.

``gain`` is m_z, the mean-square response of a layer's output to one element of its input; ``curvature`` is m_W, that to one
element of a parameter (docs/derivation.md eq. 3). Both are exact for the Jacobians at the given input; see each file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backmatch.layers import activation, conv, dropout, embedding, linear, norm, pooling, shape
from backmatch.layers.moments import widened

GainRule = Callable[[Any, Tensor], Tensor]
CurvatureRule = Callable[[Any, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class _Rule:
    gain: GainRule
    curvature: CurvatureRule


_RULES: dict[type[nn.Module], _Rule] = {}


def gain(module: nn.Module, x: Tensor, *, name: str = "") -> Tensor:
    r"""Mean-square response of a layer's output to one element of its input: ``m_z = mean over samples of tr(J_zᵀJ_z) / dim(x)``.

    For BatchNorm on batch statistics, whose Jacobian couples the samples, ``tr(JᵀJ) / numel(x)`` with J that of the batch.

    Args:
        module: A layer of a known kind; neither it nor ``x`` is changed.
        x: The layer's input, ``[N, ...]``.
        name: Path of the layer in its model, for messages.

    Returns:
        m_z, 0-dim, outside the graph, in (output unit / input unit)², float32 or, for float64 input, float64.

    Raises:
        NotImplementedError: If no rule is known for the layer.
        ValueError: If ``x`` is no batch: empty, or without a batch dimension.
    """
    rule = _rule(module, name)
    _check_batch(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return rule.gain(module, x)


def curvature(module: nn.Module, x: Tensor, *, name: str = "") -> dict[str, Tensor]:
    r"""Mean-square response of a layer's output to one element of a parameter: ``m_W = (1/N) Σ_i tr(J_WᵀJ_W) / dim(W)``.

    Args:
        module: A layer of a known kind; neither it nor ``x`` is changed.
        x: The layer's input, ``[N, ...]``; N counts samples.
        name: Path of the layer in its model, for messages.

    Returns:
        m_W by the parameter's name in the layer, 0-dim, outside the graph; empty for a layer without parameters.

    Raises:
        NotImplementedError: If no rule is known for the layer.
        ValueError: If ``x`` is no batch: empty, or without a batch dimension.
    """
    rule = _rule(module, name)
    _check_batch(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return rule.curvature(module, x)


def takes_rows(module: nn.Module) -> bool:
    """Whether :func:`input_rows` and :func:`output_rows` know this layer, a matrix that multiplies rows: Linear, most Conv1d and Conv2d."""
    file = _rows_of(module)
    return file is not None and file.takes_rows(module)


def input_rows(module: nn.Module, x: Tensor, limit: int) -> Tensor:
    """What the layer's matrix multiplies in one forward call, ``[n, d_in]``, outside the graph, in float32 or wider.

    Args:
        module: A layer that :func:`takes_rows`; its weight flattened to ``[d_out, d_in]`` is the matrix.
        x: Its input.
        limit: Positions of large feature maps are sampled evenly, so that n is at most about this.
    """
    return widened(_rows_of(module).input_rows(module, x.detach(), limit))


def output_rows(module: nn.Module, grad_output: Tensor, limit: int) -> Tensor:
    """The gradient of the loss in the rows' products, ``[n, d_out]``, for the same n rows as :func:`input_rows`."""
    return widened(_rows_of(module).output_rows(module, grad_output.detach(), limit))


def output_shape(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of what a layer that :func:`takes_rows` makes of ``x``."""
    shape: tuple[int, ...] = _rows_of(module).output_shape(module, x)
    return shape


def taps(module: nn.Module) -> int:
    """How many of the inputs of a layer that :func:`takes_rows` are one channel, read at different places of a window that slides.

    Those are the last and fastest index of :func:`input_rows`, and have about the same moments each.
    """
    return int(_rows_of(module).taps(module))


def _rows_of(module: nn.Module) -> Any:
    """The file that knows the layer's rows, if it runs its kind's own ``forward``."""
    for file, kinds in ((linear, (nn.Linear,)), (conv, (nn.Conv1d, nn.Conv2d))):
        if isinstance(module, kinds) and any(type(module).forward is kind.forward for kind in kinds):
            return file
    return None


def register(module_type: type[nn.Module], *, gain: GainRule, curvature: CurvatureRule | None = None) -> None:
    """Give a kind of layer its rule, or replace the rule it has. The layer is then no longer looked into.

    Args:
        module_type: The layer's class. Subclasses share the rule unless they have their own ``forward``.
        gain: ``(module, x) -> m_z``, see :func:`gain`.
        curvature: ``(module, x) -> {parameter name: m_W}``, see :func:`curvature`; left out for a layer without parameters.

    Raises:
        TypeError: If ``module_type`` is not a class of modules.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"Invalid module_type: {module_type!r}. Must be a subclass of torch.nn.Module.")
    _RULES[module_type] = _Rule(gain, curvature or _no_parameters)


def is_known(module: nn.Module) -> bool:
    """Whether a rule holds for this layer: its kind is registered and it runs that kind's own ``forward``."""
    return _find(module) is not None


def known_layers() -> list[str]:
    """Class names of the layers with a rule, sorted."""
    return sorted(kind.__name__ for kind in _RULES)


def _find(module: nn.Module) -> _Rule | None:
    for kind in type(module).__mro__:
        if kind in _RULES:
            return _RULES[kind] if type(module).forward is kind.forward else None
    return None


def _rule(module: nn.Module, name: str) -> _Rule:
    rule = _find(module)
    if rule is None:
        layer = f"Layer '{name}' ({type(module).__name__})" if name else f"Layer {type(module).__name__}"
        raise NotImplementedError(
            f"{layer} has no rule. Use estimator='probe', or give it one with backmatch.layers.register. "
            f"Known: {', '.join(known_layers())}."
        )
    return rule


def _check_batch(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"Invalid layer input: {type(x).__name__}. Must be a tensor [N, ...].")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"Invalid layer input shape: {list(x.shape)}. Must be a batch [N, ...] of at least one sample.")


def _no_parameters(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {}


for _file in (activation, conv, embedding, linear, norm):
    for _kind in _file.KINDS:
        register(_kind, gain=_file.gain, curvature=_file.curvature)
for _file in (dropout, pooling, shape):
    for _kind in _file.KINDS:
        register(_kind, gain=_file.gain)
