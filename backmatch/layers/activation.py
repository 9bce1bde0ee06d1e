"""Elementwise activations: one rule for all of them, plus PReLU's parameter and RReLU's random slope."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from backmatch.layers.moments import constant, square_sum, widened

KINDS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.RReLU,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)


def gain(module: nn.Module, x: Tensor) -> Tensor:
    r"""Mean-square response of the output to one input element: ``m_z = mean(φ'(x)²)``, exact (docs/derivation.md eq. 3).

    RReLU in training mode draws its slope from U(l, u): the value is the mean over draws, slope² → ``(l² + lu + u²) / 3``.

    Args:
        module: The activation, in place or not; ``x`` is left as it is.
        x: Its input, ``[N, ...]``.

    Returns:
        m_z, 0-dim, outside the graph.
    """
    x = widened(x)
    if isinstance(module, nn.ReLU):
        # No autodiff, and no boolean mask in between (six times slower on a CPU): ReLU is in nearly every network.
        return torch.gt(x, 0, out=torch.empty_like(x)).mean()
    if isinstance(module, nn.PReLU):
        shape = [-1] + [1] * max(x.ndim - 2, 0)
        slope = widened(module.weight).reshape(shape) if module.num_parameters > 1 else widened(module.weight)
        return torch.where(x > 0, constant(1.0, x), slope.square().to(x.dtype)).mean()
    if isinstance(module, nn.RReLU) and module.training:
        low, high = module.lower, module.upper
        return torch.where(x > 0, constant(1.0, x), constant((low * low + low * high + high * high) / 3, x)).mean()
    return mean_square_derivatives(module.forward, [x], x.shape)[0]


def curvature(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    r"""PReLU's slope: ``Σ_{x<0} x² / (N · slopes)``, exact (eq. 3). Nothing for the others.

    Args:
        module: The activation.
        x: Its input, ``[N, ...]``.

    Returns:
        m_W by parameter name, 0-dim, summed over positions and averaged over samples.
    """
    if isinstance(module, nn.PReLU):
        return {"weight": square_sum(x.clamp(max=0)) / (x.shape[0] * module.num_parameters)}
    return {}


def mean_square_derivatives(function: Callable[..., Tensor], operands: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
    """``Σ (∂z/∂a)² / numel(a)`` for every operand a of an elementwise function, by autodiff; exact under broadcasting.

    Args:
        function: Takes the operands; z's elements depend on the operands' elements of the same place only.
        operands: Floating tensors whose shapes broadcast to ``shape``; none is written to.
        shape: Shape of z.

    Returns:
        One 0-dim tensor per operand.
    """
    with torch.enable_grad():
        # An operand spread to full size has one derivative per output element; copies, for functions that work in place.
        leaves = [widened(operand).expand(shape).requires_grad_() for operand in operands]
        z = function(*(leaf.clone() for leaf in leaves))
        slopes = torch.autograd.grad(z, leaves, torch.ones_like(z), allow_unused=True)
    return [
        constant(0.0, operand) if slope is None else square_sum(slope) / operand.numel()
        for operand, slope in zip(operands, slopes, strict=True)
    ]
