r"""Normalisation layers: ``z = γ x̂ + β`` with ``x̂ = (x − μ) / s``, ``s² = var + eps`` over one group of D elements.

Statistics taken from the input remove directions from the Jacobian. With ``ρ = mean(x̂²)`` over the group and c = 1
(RMSNorm: μ = 0, c = 0) it is ``J = diag(γ)/s · Q``, ``Q = I − c·11ᵀ/D − x̂x̂ᵀ/D``, and as 1 and x̂ are orthogonal
``(Q²)_ii = 1 − c/D − (2 − ρ) x̂_i²/D``: every gain below is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backmatch.layers.moments import Layer, constant, widened

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
KINDS = (*_BATCH, *_INSTANCE, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def gain(module: Layer, x: Tensor) -> Tensor:
    r"""Mean-square response of the output to one input element: ``mean(γ²/s² · (1 − c/D − (2 − ρ) x̂²/D))``, exact (eq. 3).

    BatchNorm on batch statistics couples the samples: the Jacobian is that of the whole batch, ``tr(JᵀJ) / numel(x)``. On
    running statistics (eval mode) nothing is removed: ``mean(γ²/s²)``.

    Args:
        module: BatchNorm, InstanceNorm, GroupNorm, LayerNorm or RMSNorm.
        x: Its input, ``[N, C, ...]`` or, for LayerNorm and RMSNorm, ``[N, ..., normalized_shape]``.

    Returns:
        m_z, 0-dim, outside the graph, in (output unit / input unit)².
    """
    groups = _groups(module, x)
    gamma_square = _gamma_square(module, x, groups.rows)
    if groups.fixed:
        return (gamma_square * groups.inverse_square).mean()
    x_hat_square = groups.second_moment  # its mean over the row is enough where the row has a single γ
    if math.prod(gamma_square.shape[1:]) > 1:
        x_hat_square = (groups.rows - groups.mean).square() * groups.inverse_square
    kept = 1 - groups.centred / groups.size - (2 - groups.second_moment) * x_hat_square / groups.size
    return (gamma_square * groups.inverse_square * kept).mean()


def curvature(module: Layer, x: Tensor) -> dict[str, Tensor]:
    r"""Mean eigenvalue of each parameter's local Hessian: γ ``S · mean(x̂²)``, β ``S``, both exact (eq. 3).

    Args:
        module: The layer.
        x: Its input, as for :func:`gain`. S: elements of a sample that share one element of the parameter.

    Returns:
        m_W by parameter name, 0-dim, summed over positions and averaged over samples; empty without affine parameters.
    """
    found = {}
    if module.weight is not None:
        shared = math.prod(x.shape[1:]) / module.weight.numel()
        found["weight"] = shared * _groups(module, x).second_moment.mean()
        if getattr(module, "bias", None) is not None:
            found["bias"] = constant(shared, x)
    return found


@dataclass(frozen=True)
class _Groups:
    """Elements arranged so that each of the G rows shares its statistics; those have the shape of ``rows`` with every size but G 1."""

    rows: Tensor  # [G, ...]
    mean: Tensor | float  # μ
    inverse_square: Tensor  # 1/s²
    second_moment: Tensor  # ρ = mean(x̂²)
    centred: bool
    fixed: bool  # statistics do not depend on x

    @property
    def size(self) -> int:
        """D, elements in a row."""
        return self.rows.numel() // self.rows.shape[0]


def _groups(module: Layer, x: Tensor) -> _Groups:
    rows = widened(_rows(module, x))
    inner = tuple(range(1, rows.ndim))
    if isinstance(module, nn.RMSNorm):
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        mean_square = rows.square().mean(inner, keepdim=True)
        return _Groups(rows, 0.0, 1 / (mean_square + eps), mean_square / (mean_square + eps), centred=False, fixed=False)
    mean = rows.mean(inner, keepdim=True)
    # In two passes over views: an order of magnitude faster than torch.var_mean on a CPU, and as safe against cancellation.
    var = (rows - mean).square_().mean(inner, keepdim=True)
    if _uses_running_statistics(module):
        repeats = rows.shape[0] // module.running_mean.numel()  # InstanceNorm has a row per sample and channel
        running_mean, running_var = (_column(widened(s).repeat(repeats), rows) for s in (module.running_mean, module.running_var))
        inverse_square = 1 / (running_var + module.eps)
        second_moment = (var + (mean - running_mean).square()) * inverse_square
        return _Groups(rows, running_mean, inverse_square, second_moment, centred=False, fixed=True)
    inverse_square = 1 / (var + module.eps)
    return _Groups(rows, mean, inverse_square, var * inverse_square, centred=True, fixed=False)


def _uses_running_statistics(module: Layer) -> bool:
    return isinstance(module, (*_BATCH, *_INSTANCE)) and not module.training and module.running_mean is not None


def _rows(module: Layer, x: Tensor) -> Tensor:
    if isinstance(module, _BATCH):
        return x.transpose(0, 1)
    if isinstance(module, _INSTANCE):
        return x.flatten(0, 1)
    if isinstance(module, nn.GroupNorm):
        return x.reshape(x.shape[0] * module.num_groups, -1)
    return x.reshape(-1, math.prod(module.normalized_shape))


def _gamma_square(module: Layer, x: Tensor, rows: Tensor) -> Tensor:
    """γ² laid out to broadcast over the rows."""
    if module.weight is None:
        return _column(constant(1.0, x), rows)
    square = widened(module.weight).square()
    if isinstance(module, _BATCH):
        return _column(square, rows)
    if isinstance(module, _INSTANCE):
        return _column(square.repeat(x.shape[0]), rows)
    if isinstance(module, nn.GroupNorm):
        per_group = square.reshape(module.num_groups, -1)
        return per_group.repeat_interleave(math.prod(x.shape[2:]), dim=1).repeat(x.shape[0], 1)
    return square.flatten()[None]


def _column(values: Tensor, rows: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (rows.ndim - 1))
