"""BackMatchSGD's default step from its stated equations, one tensor after the other: what the optimizer is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backmatch.leading import first_axes


class Reference:
    """``s ← mean of g², averaged``, ``r = w^(2 − 2·power) s^(−power)`` within the bounds, then the step of paced SGD, its matrices held.

    Args:
        params: Where to start; copied. All of them have a gradient at every step.
        unit_dims: The dimension of each one's output units; None for a vector.
        per: One response per output ``unit``, or per ``tensor``.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        unit_dims: Sequence[int | None],
        *,
        per: str = "unit",
        beta: float = 0.9,
        power: float = 0.5,
        relative: bool = True,
        bound: float = 100.0,
    ) -> None:
        self.params = [p.detach().clone() for p in params]
        self.momenta = [torch.zeros_like(p) for p in self.params]
        self.axes: dict[int, Tensor] = {}
        self.responses: list[Tensor] = []
        self.paces: list[Tensor] = []
        self.count = 0
        self._unit_dims, self._per = unit_dims, per
        self._beta, self._power, self._relative, self._bound = beta, power, relative, bound

    def step(self, grads: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> None:
        """One step; ``groups`` as those of a state dict, whose ``params`` number the tensors."""
        self.count += 1
        weight = max(1.0 / self.count, 1.0 - self._beta)
        fresh = [self._mean(i, grad.square()) for i, grad in enumerate(grads)]
        old = self.responses or fresh
        self.responses = [(1.0 - weight) * s + weight * new for s, new in zip(old, fresh, strict=True)]
        self._sizes = self.sizes() if self._relative else [torch.ones_like(s) for s in fresh]
        self.paces = self._bounded(self._sizes)
        for group in groups:
            self._update(group, grads)

    def sizes(self) -> list[Tensor]:
        """w: root mean squares with the floor ``1/(2 √fan_in)``; vectors take the median of the matrices."""
        own: dict[int, Tensor] = {}
        for i, (p, dim) in enumerate(zip(self.params, self._unit_dims, strict=True)):
            if dim is not None:
                own[i] = self._mean(i, p.square()).sqrt().clamp_min(0.5 / math.sqrt(self._fan_in(i, dim)))
        matrices = sorted(float(size.square().mean().sqrt()) for size in own.values())
        typical = matrices[(len(matrices) - 1) // 2] if matrices else 1.0
        return [own.get(i, torch.tensor(typical, dtype=p.dtype)) for i, p in enumerate(self.params)]

    def _fan_in(self, i: int, unit_dim: int) -> int:
        return self.params[i].numel() // self.params[i].shape[unit_dim]

    def _bounded(self, sizes: list[Tensor]) -> list[Tensor]:
        raw = []
        for size, s in zip(sizes, self.responses, strict=True):
            relative = size**2 * s
            s = relative.clamp_min(0.01 * relative.mean()) / size**2
            raw.append(size ** (2 - 2 * self._power) * s**-self._power)
        centres = sorted(math.exp(float(pace.log().mean())) for pace, s in zip(raw, self.responses, strict=True) if s.any())
        centre = centres[(len(centres) - 1) // 2] if centres else 1.0
        return [pace.clamp(centre / self._bound, centre * self._bound) for pace in raw]

    def _update(self, group: dict[str, Any], grads: Sequence[Tensor]) -> None:
        lr, mu = float(group["lr"]), group["momentum"]
        moves = {i: self.paces[i] * grads[i] for i in group["params"]}
        size, change = (math.sqrt(sum(float(v.square().sum()) for v in vs)) for vs in ([self.params[i] for i in moves], moves.values()))
        factor = min(1.0, group["max_change"] * size / (lr * change)) if lr and math.isfinite(group["max_change"]) else 1.0
        factor *= -1.0 if group["maximize"] else 1.0
        for i, move in moves.items():
            self.momenta[i] = mu * self.momenta[i] + factor * move
            update = factor * move + mu * self.momenta[i] if group["nesterov"] else self.momenta[i]
            if math.isfinite(group["max_stretch"]) and self._unit_dims[i] is not None:
                update = self._held(i, update, group["max_stretch"] / lr if lr else math.inf)
            self.params[i] = self.params[i] * (1 - lr * group["weight_decay"] * self._decayed(i, group["decay_floor"])) - lr * update

    def _held(self, i: int, update: Tensor, stretch: float) -> Tensor:
        """Six leading singular values at most ``stretch·w (√m + √n)``; the rest longer by what they take, and at most four times that."""
        matrix = update.flatten(1)
        rows, columns = matrix.shape
        limit = stretch * self._sizes[i].square().mean().sqrt() * (math.sqrt(rows) + math.sqrt(columns))
        tall = matrix if rows >= columns else matrix.T
        axes = self.axes.get(i, first_axes(update)).to(tall.dtype)
        moved = axes @ tall.T @ tall
        lengths = moved.norm(dim=1, keepdim=True)
        basis = torch.linalg.qr(torch.where(lengths > 0, moved, axes).T).Q.T
        self.axes[i] = basis.bfloat16()
        lengths = (tall @ basis.T).norm(dim=0)
        longer = 1.0
        if tall.norm() > 0 and len(basis) < tall.shape[1]:
            even = 1.0 - len(basis) / tall.shape[1]
            rest = float(1.0 - lengths.square().sum() / tall.square().sum())
            longer = min(10.0, max(1.0, math.sqrt(even / max(rest, even / 100.0))))
        if lengths.min() > 0:
            longer = min(longer, 4.0 * float(limit) / float(lengths.min()))
        kept = torch.where(lengths > limit, limit / lengths, 1.0)
        leading = tall @ basis.T
        tall = longer * (tall - leading @ basis) + leading @ (kept.unsqueeze(1) * basis)
        return (tall if rows >= columns else tall.T).reshape(update.shape)

    def _decayed(self, i: int, floor: float) -> Tensor | float:
        """How much of the decay: all without a floor; with one ``1 - f²/w²`` of matrices larger than ``f = floor/√fan_in``, else none."""
        p, dim = self.params[i], self._unit_dims[i]
        if floor == 0.0:
            return 1.0
        if dim is None:
            return 0.0
        return (1.0 - floor**2 / self._fan_in(i, dim) / self._mean(i, p.square())).clamp_min(0.0)

    def _mean(self, i: int, values: Tensor) -> Tensor:
        """Over what one entry of the pace covers."""
        dim = self._unit_dims[i] if self._per == "unit" else None
        return values.mean() if dim is None else values.mean(dim=[d for d in range(values.ndim) if d != dim], keepdim=True)
