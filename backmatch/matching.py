"""Layers matched: which can be, and what A and B make of their gradients (eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from backmatch import distributed, layers
from backmatch.kron import blocked, by_taps, matched, unblocked
from backmatch.newton_schulz import coarse_products, orthogonalised

Length = Literal["plain", "rms", "spectral"]

_SIZE = 0.5
"""Root mean square of a matched step at a learning rate of 1, relative to 1/√n. Of n inputs: entries of 1/√n keep the variance."""

_TOGETHER = {"cpu": 2**22, "cuda": 2**24}
"""Entries of the matrices that are levelled at the same time, which takes some ten times the memory for a while."""

_MULTIPLE = {"cpu": 1, "cuda": 8}
"""Of how many entries a block must be a multiple for its products to be fast."""


@dataclass(frozen=True, eq=False)
class MatchedLayer:
    """A layer that is matched: its weight, then its bias if that is trained with it and so has a row in A.

    Attributes:
        name: Its path in the model.
        params: The weight, and the bias.
        taps: Inputs of each channel, see :func:`backmatch.layers.taps`; only where that is 1 does the bias have a row.
        owner: The rank that takes the inverses, among those over which the weight is sharded, or among all.
    """

    name: str
    params: tuple[Tensor, ...]
    taps: int = 1
    owner: int = 0

    @property
    def weight(self) -> Tensor:
        return self.params[0]

    @cached_property
    def fan_in(self) -> int:
        return self.weight.numel() // self.weight.shape[0]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that is matched, the bias its last column."""
        return self.weight.shape[0], self.fan_in + len(self.params) - 1

    @cached_property
    def widths(self) -> dict[str, int]:
        """Rows of A, ``input``, and of B, ``output``."""
        return {"input": self.shape[1] // self.taps, "output": self.shape[0]}

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
        taps = layers.taps(module)
        joint = bias is not None and bias in optimized and owners[bias] == 1 and taps == 1
        if joint and (distributed.share_of(bias) is None) != (distributed.share_of(weight) is None):
            joint = False
        found.append(MatchedLayer(name, (weight, bias) if joint else (weight,), taps))
    if not found:
        return {}
    costs = [sum(min(size, widest) ** 2 * size for size in layer.widths.values()) for layer in found]
    owning = distributed.shared_out(costs, distributed.team(found[0].weight)[0])
    return {layer.name: replace(layer, owner=owner) for layer, owner in zip(found, owning, strict=True)}


def changes(
    moving: Iterable[MatchedLayer], ahead: Mapping[Tensor, Tensor], states: Mapping[Tensor, Mapping[str, Tensor]], length: Length
) -> dict[Tensor, Tensor]:
    """``φ(B^(−p) U A^(−p))`` of the weights and biases in ``ahead``, layers alike together.

    Of a layer of which only one of the two is there the other counts as zeros.

    Args:
        moving: The layers.
        ahead: U, the momentum looked ahead of, of the weight, the bias, or both, of each.
        states: Of the weights, with the powers of A and B.
        length: φ, see :class:`backmatch.ladder.BackMatch`.
    """
    found: dict[Tensor, Tensor] = {}
    for together in _together(_alike(moving, ahead, states), states):
        with torch.autocast(together[0][0].weight.device.type, enabled=False):
            # On a GPU singular values are levelled in bfloat16, whose rounding costs more than TF32's (docs/experiments.md 30).
            with coarse_products() if length == "spectral" and together[0][0].weight.is_cuda else nullcontext():
                stacks = [_matched(alike, ahead, [states[layer.weight] for layer in alike]) for alike in together]
            if length == "spectral":
                levelled = orthogonalised([stack.flatten(2) for stack in stacks])
                stacks = [new.view_as(stack) for new, stack in zip(levelled, stacks, strict=True)]
        for alike, stack in zip(together, stacks, strict=True):
            if length == "rms":
                # Squares of small numbers would be lost.
                stack = stack / stack.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(stack.dtype).tiny)
            found |= _scaled(alike, stack, ahead, states, length)
    return found


def _scaled(
    alike: Sequence[MatchedLayer],
    stack: Tensor,
    ahead: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, Mapping[str, Tensor]],
    length: Length,
) -> dict[Tensor, Tensor]:
    """What a stack is to each of the parameters, at its length; in the dtype of A's and B's powers."""
    first = alike[0]
    powers = states[first.weight]
    for dim, side in ((1, "output"), (3, "input")):
        stack = unblocked(stack, dim, _blocks(powers, side), first.widths[side])
    parts = stack.tensor_split([first.fan_in // first.taps], dim=3)[: len(first.params)]
    dtype = powers["input_power"].dtype
    scales = [stack.new_ones(len(alike))] * len(parts) if length == "plain" else _scales(first, parts, ahead, dtype)
    found: dict[Tensor, Tensor] = {}
    for i, (part, scale) in enumerate(zip(parts, scales, strict=True)):
        if first.params[i] not in ahead:
            continue
        # A product of its own, so that what is cut out of it is dense.
        scaled = (part * scale.view(-1, 1, 1, 1)).transpose(2, 3)
        found |= {layer.params[i]: change.reshape(layer.params[i].shape) for layer, change in zip(alike, scaled.unbind(), strict=True)}
    return found


def _scales(layer: MatchedLayer, parts: Sequence[Tensor], ahead: Mapping[Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For each of a stack what gives its weight, or its bias where only that has a gradient, its root mean square; and the bias's own.

    That is the weight's, as they are one matrix. But where inputs are small beside the 1 of the bias, the bias alone would follow what
    the weights cannot, by as much as they are small: its root mean square ends at that times √n.
    """
    norms = [torch.linalg.vector_norm(part, dim=(1, 2, 3), dtype=dtype) for part in parts]
    roots = [math.sqrt(part[0].numel()) for part in parts]
    tiny, typical = torch.finfo(dtype).tiny, _SIZE / math.sqrt(layer.fan_in)
    (norm, root), *others = zip(norms, roots, strict=True) if layer.weight in ahead else zip(norms[::-1], roots[::-1], strict=True)
    for other, other_root in others:
        norm = torch.where(norm > 0, norm, other * (root / other_root))  # inputs that are all 0
    scale = typical * root / norm.clamp_min(tiny * root)
    return [scale, *(scale.minimum(_SIZE * roots[1] / bias.clamp_min(tiny * roots[1])) for bias in norms[1:])]


def _alike(
    moving: Iterable[MatchedLayer], ahead: Mapping[Tensor, Tensor], states: Mapping[Tensor, Mapping[str, Tensor]]
) -> list[list[MatchedLayer]]:
    """Layers of one shape, as many taps, and gradients of the same kind; no more at a time than fit in some memory."""
    kinds: dict[object, list[list[MatchedLayer]]] = {}
    for layer in moving:
        kind = (
            layer.shape,
            layer.taps,
            tuple(p in ahead for p in layer.params),
            layer.weight.device,
            states[layer.weight]["input_power"].dtype,
        )
        stacks = kinds.setdefault(kind, [[]])
        if stacks[-1] and (len(stacks[-1]) + 1) * math.prod(layer.shape) > _limit(layer):
            stacks.append([])
        stacks[-1].append(layer)
    return [stack for stacks in kinds.values() for stack in stacks]


def _together(stacks: Iterable[list[MatchedLayer]], states: Mapping[Tensor, Mapping[str, Tensor]]) -> list[list[list[MatchedLayer]]]:
    """Stacks that go through kernels side by side: on a GPU, which counts kernels, those of one dtype and within the limit in sum."""
    kinds: dict[object, list[list[list[MatchedLayer]]]] = {}
    rooms: dict[object, int] = {}
    for alike in stacks:
        first = alike[0]
        kind = (first.weight.device, states[first.weight]["input_power"].dtype) if first.weight.is_cuda else id(first)
        size = len(alike) * math.prod(first.shape)
        if size > rooms.get(kind, 0):
            kinds.setdefault(kind, []).append([])
            rooms[kind] = _limit(first)
        rooms[kind] -= size
        kinds[kind][-1].append(alike)
    return [together for groups in kinds.values() for together in groups]


def _limit(layer: MatchedLayer) -> int:
    return _TOGETHER.get(layer.weight.device.type, _TOGETHER["cpu"])


def _matched(alike: Sequence[MatchedLayer], ahead: Mapping[Tensor, Tensor], states: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """``B^(−p) U A^(−p)`` of each, ``[k, d_out, t, d_in/t]``, its sides in blocks."""
    first, like = alike[0], states[0]["input_power"]
    multiple = _MULTIPLE.get(like.device.type, 1)
    parts = [
        torch.stack([by_taps(ahead[p] if p in ahead else like.new_zeros(p.shape), first.taps) for p in params])
        for params in zip(*(layer.params for layer in alike), strict=True)
    ]
    stack = (torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]).to(like.dtype)
    powers = {}
    for dim, side in ((1, "output"), (3, "input")):
        power, blocks = torch.stack([state[f"{side}_power"] for state in states]), _blocks(states[0], side)
        if blocks:
            stack = blocked(stack, dim, blocks, multiple)
            power = blocked(blocked(power, 2, 1, multiple), 3, 1, multiple)
        powers[side] = power
    return matched(stack, powers["input"], powers["output"])


def _blocks(state: Mapping[str, Tensor], side: str) -> int:
    power = state[f"{side}_power"]
    return power.shape[0] if power.ndim else 0
