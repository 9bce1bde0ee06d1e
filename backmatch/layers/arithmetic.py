"""Function and method calls between layers: what a sum, a gate, a reshape or a functional layer passes down to its operands."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from backmatch.layers import dropout, pooling
from backmatch.layers.activation import mean_square_derivatives
from backmatch.layers.moments import constant

Function = Callable[..., Any] | str


def _functions(names: str) -> frozenset[Function]:
    """Every callable of these names in torch, torch.nn.functional and operator, and the method names, in-place forms included."""
    found: set[Function] = set()
    for name in names.split():
        found.update((name, f"{name}_"))
        spaces = ((torch, name), (torch, f"{name}_"), (F, name), (F, f"{name}_"), (operator, name), (operator, f"i{name}"))
        found.update(getattr(space, variant) for space, variant in spaces if hasattr(space, variant))
    return frozenset(found)


_ELEMENTWISE = _functions(
    "abs add addcdiv addcmul atan celu clamp clip cos div divide elu erf exp expm1 gelu hardshrink hardsigmoid hardswish hardtanh "
    "leaky_relu lerp log log1p logsigmoid masked_fill maximum minimum mish mul multiply neg negative pow reciprocal relu relu6 rsqrt rsub "
    "selu sigmoid silu sin softplus softshrink softsign sqrt square sub subtract tanh tanhshrink threshold true_divide truediv where"
)
_COPIES = _functions(
    "broadcast_to chunk clone contiguous double expand expand_as flatten flip float getitem half bfloat16 movedim narrow permute repeat "
    "reshape reshape_as select split squeeze swapaxes swapdims t tile to transpose type_as unbind unflatten unsqueeze view view_as"
)
_JOINS = _functions("cat concat concatenate stack hstack vstack")
_MEANS = _functions("mean")
_SUMS = _functions("sum")
_DETACHED = _functions("detach")

_MAX_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_SETTINGS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_ADAPTIVE_SETTINGS = ("output_size", "return_indices")
_POOLS: dict[Function, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.max_pool1d: (nn.MaxPool1d, _MAX_SETTINGS),
    F.max_pool2d: (nn.MaxPool2d, _MAX_SETTINGS),
    F.max_pool3d: (nn.MaxPool3d, _MAX_SETTINGS),
    F.avg_pool1d: (nn.AvgPool1d, _AVERAGE_SETTINGS),
    F.avg_pool2d: (nn.AvgPool2d, _AVERAGE_SETTINGS),
    F.avg_pool3d: (nn.AvgPool3d, _AVERAGE_SETTINGS),
    F.adaptive_max_pool1d: (nn.AdaptiveMaxPool1d, _ADAPTIVE_SETTINGS),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, _ADAPTIVE_SETTINGS),
    F.adaptive_max_pool3d: (nn.AdaptiveMaxPool3d, _ADAPTIVE_SETTINGS),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, _ADAPTIVE_SETTINGS),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, _ADAPTIVE_SETTINGS),
    F.adaptive_avg_pool3d: (nn.AdaptiveAvgPool3d, _ADAPTIVE_SETTINGS),
}
_DROPOUTS: dict[Function, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def function_gains(
    function: Function, args: Sequence[Any], kwargs: dict[str, Any], operands: Sequence[Any], evaluate: Callable[..., Any]
) -> list[Tensor] | None:
    r"""Mean-square response of a call's result to one element of each operand: ``Σ (∂z/∂a)² / numel(a)``, exact.

    Elementwise functions, broadcasting and gates included, by autodiff: ``a·b`` gives ``mean(b²)`` to a, ``x + x`` gives 4 to x.
    Calls whose result copies elements of the operand: copies / elements. Means over k elements: ``1/k²``. Dropout: the
    expectation over masks. Pooling: :func:`backmatch.layers.pooling.gain`.

    Args:
        function: A function, or the name of a tensor method.
        args: The call's positional arguments.
        kwargs: Its keyword arguments.
        operands: Those of the arguments that are wanted: distinct floating tensors or tuples of such.
        evaluate: Repeats the call with other values for the operands.

    Returns:
        One 0-dim tensor per operand, or None if no rule is known for the function.
    """
    like = next(leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, Tensor))
    if function in _ELEMENTWISE:
        shape = torch.broadcast_shapes(*(leaf.shape for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))
        return mean_square_derivatives(evaluate, operands, shape)
    if function in _JOINS:
        joined = pytree.tree_leaves((args, kwargs))
        return [constant(sum(leaf is operand for leaf in joined), operand) for operand in operands]
    if function in _DETACHED:
        return [constant(0.0, like)]
    if function is getattr:
        return [constant(1.0 if args[1] in ("T", "mT") else 0.0, like)]  # the others are sizes and types
    if function in _COPIES or function in _MEANS or function in _SUMS:
        copies = size(evaluate(*operands)) / size(operands[0])
        return [constant(1.0 if function in _SUMS else copies**2 if function in _MEANS else copies, like)]
    if function in _POOLS:
        kind, names = _POOLS[function]
        pool = kind(**dict(zip(names, args[1:], strict=False)), **_settings(kwargs))
        return [pooling.gain(pool, operands[0])]
    if function in _DROPOUTS:
        settings = dict(zip(("p", "training"), args[1:], strict=False)) | _settings(kwargs)
        return [dropout.gain(_DROPOUTS[function](settings.get("p", 0.5)).train(settings["training"]), operands[0])]
    return None


def size(value: Any) -> int:
    """Number of floating elements in a tensor or in a collection of tensors."""
    return sum(math.prod(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "input"}
