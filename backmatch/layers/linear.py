"""Linear layers: z = W a + c at every position of a sample."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from backmatch.layers.moments import constant, every, square_sum

KINDS = (nn.Linear,)


def gain(module: nn.Linear, x: Tensor) -> Tensor:
    r"""Mean-square response of the output to one input element: ``m_z = ‖W‖_F² / d_in``, exact.

    Stands in for the local Hessian WᵀW by the mean of its eigenvalues (docs/derivation.md eq. 3); the two are equal
    if the columns of W are orthogonal and equally long.

    Args:
        module: The layer, W of shape ``[d_out, d_in]``.
        x: Its input, ``[N, ..., d_in]``.

    Returns:
        m_z, 0-dim, outside the graph, in (output unit / input unit)².
    """
    return square_sum(module.weight) / module.in_features


def curvature(module: nn.Linear, x: Tensor) -> dict[str, Tensor]:
    r"""Mean eigenvalue of each parameter's local Hessian: weight ``S · mean(a²)``, bias ``S``, both exact (eq. 3).

    Args:
        module: The layer.
        x: Its input a, ``[N, ..., d_in]``; S is the product of the middle sizes, the positions that share the parameters.

    Returns:
        m_W by parameter name, 0-dim, summed over positions and averaged over samples.
    """
    found = {"weight": square_sum(x) / (x.shape[0] * module.in_features)}
    if module.bias is not None:
        found["bias"] = constant(math.prod(x.shape[1:-1]), x)
    return found


def takes_rows(module: nn.Linear) -> bool:
    """Whether :func:`input_rows` knows this layer: unless it only holds the weight that nn.MultiheadAttention multiplies by itself."""
    return not isinstance(module, NonDynamicallyQuantizableLinear)


def taps(module: nn.Linear) -> int:
    """1: no two of its inputs are one."""
    return 1


def output_shape(module: nn.Linear, x: Tensor) -> tuple[int, ...]:
    """``[..., d_out]``."""
    return (*x.shape[:-1], module.out_features)


def input_rows(module: nn.Linear, x: Tensor, limit: int) -> Tensor:
    """The vectors that W multiplies, at most about ``limit`` of them, evenly spread: ``[n, d_in]``."""
    return every(x.reshape(-1, module.in_features), limit)


def output_rows(module: nn.Linear, grad_output: Tensor, limit: int) -> Tensor:
    """δ at each position, ``[n, d_out]``; the same positions as :func:`input_rows`."""
    return every(grad_output.reshape(-1, module.out_features), limit)
