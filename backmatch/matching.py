"""One layer matched: which layers can be, and what A and B make of a gradient (eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from backmatch import distributed, layers
from backmatch.kron import matched
from backmatch.step import orthogonalised

Length = Literal["plain", "rms", "spectral"]

_SIZE = 0.5
"""Root mean square of a matched step at a learning rate of 1, relative to 1/√n. Of n inputs: entries of 1/√n keep the variance."""


@dataclass(frozen=True, eq=False)
class MatchedLayer:
    """A layer that is matched: its weight, then its bias if that is trained with it and so has a row in A.

    Attributes:
        name: Its path in the model.
        params: The weight, and the bias.
        owner: The rank that takes the inverses, among those over which the weight is sharded, or among all.
    """

    name: str
    params: tuple[Tensor, ...]
    owner: int = 0

    @property
    def weight(self) -> Tensor:
        return self.params[0]

    @property
    def fan_in(self) -> int:
        return self.weight.numel() // self.weight.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that A and B belong to, the bias its last column."""
        return self.weight.shape[0], self.fan_in + len(self.params) - 1

    @property
    def is_sharded(self) -> bool:
        return distributed.share_of(self.weight) is not None

    @property
    def is_mine(self) -> bool:
        """Whether this rank is the owner."""
        return self.owner == distributed.team(self.weight)[1]


def matched_layers(model: Module, optimized: Collection[Tensor], *, widest: int) -> dict[str, MatchedLayer]:
    """The layers whose weight is optimized, theirs alone, and multiplies rows; the work of inverting shared out over ranks.

    Args:
        model: The network.
        optimized: The parameters that are trained.
        widest: Rows of a block of A and B, at most: a block costs the cube of its rows.
    """
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[p] = owners.get(p, 0) + 1
    found: list[MatchedLayer] = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")  # no parametrization, whose weight is computed
        if weight is None or weight not in optimized or owners[weight] > 1 or not weight.numel() or not layers.takes_rows(module):
            continue
        bias = module._parameters.get("bias")
        joint = bias is not None and bias in optimized and owners[bias] == 1
        if joint and (distributed.share_of(bias) is None) != (distributed.share_of(weight) is None):
            joint = False
        found.append(MatchedLayer(name, (weight, bias) if joint else (weight,)))
    if not found:
        return {}
    costs = [sum(min(size, widest) ** 2 * size for size in layer.shape) for layer in found]
    owning = distributed.shared_out(costs, distributed.team(found[0].weight)[0])
    return {layer.name: MatchedLayer(layer.name, layer.params, owner) for layer, owner in zip(found, owning, strict=True)}


def change(layer: MatchedLayer, ahead: Mapping[Tensor, Tensor], state: Mapping[str, Tensor], length: Length) -> dict[Tensor, Tensor]:
    """``φ(B^(−p) U A^(−p))`` of one layer's weight and bias; what has no gradient brings zeros.

    Args:
        layer: The layer.
        ahead: U, the momentum looked ahead of, of the weight, the bias, or both.
        state: Of its weight, with the powers of A and B.
        length: φ, see :class:`backmatch.ladder.BackMatch`.
    """
    weight, (rows, _) = layer.weight, layer.shape
    some = next(ahead[p] for p in layer.params if p in ahead)
    columns = [(ahead[p] if p in ahead else some.new_zeros(p.shape)).reshape(rows, -1) for p in layer.params]
    with torch.autocast(weight.device.type, enabled=False):
        found = matched(torch.cat(columns, dim=1).to(state["input_power"].dtype), state["input_power"], state["output_power"])
        tiny = torch.finfo(found.dtype).tiny
        if length != "plain":
            found = found / found.abs().max().clamp_min(tiny)  # squares of small numbers would be lost
        if length == "spectral":
            found = orthogonalised(found)
    pieces = list(found.split([column.shape[1] for column in columns], dim=1))
    if length != "plain":
        mean_square = pieces[0 if weight in ahead else 1].square().mean()
        pieces = [piece / mean_square.sqrt().clamp_min(tiny) * (_SIZE / math.sqrt(layer.fan_in)) for piece in pieces]
    return {p: piece.reshape(p.shape) for p, piece in zip(layer.params, pieces, strict=True)}
