"""Dropout: the expectation over masks, so that a rule never draws from the random generator."""

from __future__ import annotations

from torch import Tensor, nn

from backmatch.layers.moments import Layer, constant

_ALPHA = (nn.AlphaDropout, nn.FeatureAlphaDropout)
KINDS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *_ALPHA)

_SELU_LIMIT = 1.7580993408473766  # −SELU(−∞): what alpha dropout puts in place of a dropped element


def gain(module: Layer, x: Tensor) -> Tensor:
    r"""Mean-square response of the output to one input element, in expectation over masks: ``1 / (1 − p)``.

    An element is kept with probability 1 − p and then multiplied by ``1/(1 − p)``; by ``a = ((1 − p)(1 + p α²))^(−1/2)`` in alpha
    dropout, which gives ``1 / (1 + p α²)``. Eval mode: 1. p = 1: 0.

    Args:
        module: The layer.
        x: Its input, ``[N, ...]``.

    Returns:
        m_z, 0-dim.
    """
    if not module.training or module.p == 0:
        return constant(1.0, x)
    if module.p == 1:
        return constant(0.0, x)
    return constant(1 / (1 + module.p * _SELU_LIMIT**2) if isinstance(module, _ALPHA) else 1 / (1 - module.p), x)
