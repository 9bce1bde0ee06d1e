"""From gradients and paces to new parameters: how long a step may be, and momentum. Knows nothing of networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backmatch.leading import Lead, hold


def entry_norms(tensors: Sequence[Tensor], entries: Sequence[Tensor]) -> list[Tensor]:
    """Norm of every tensor over what each entry of its pace covers, shaped like the pace, without a product of the tensor's size.

    Args:
        tensors: Parameters or gradients.
        entries: A pace or response of each, 0-dim or with the size 1 in every dimension it does not resolve.
    """
    together: dict[object, list[int]] = {}
    for i, (tensor, entry) in enumerate(zip(tensors, entries, strict=True)):
        if entry.ndim == 0:
            together.setdefault((tensor.device, tensor.dtype, entry.dtype), []).append(i)
    norms: dict[int, Tensor] = {}
    for chosen in together.values():
        found = torch._foreach_norm([tensors[i] for i in chosen], 2, entries[chosen[0]].dtype)
        norms |= dict(zip(chosen, found, strict=True))
    return [norms[i] if i in norms else _unit_norms(*pair) for i, pair in enumerate(zip(tensors, entries, strict=True))]


def step_length(params: Sequence[Tensor], norms: Sequence[Tensor], paces: Sequence[Tensor], *, lr: float | Tensor) -> tuple[Tensor, Tensor]:
    """``‖θ‖`` and ``γ ‖r g‖``, the lengths of all tensors together before momentum.

    Args:
        params: Parameters θ, or the norm of each.
        norms: Of their gradients g, by :func:`entry_norms`.
        paces: Paces r.
        lr: Learning rate γ.

    Returns:
        Both 0-dim, on the device of the first parameter, without waiting for it.
    """
    device = params[0].device
    sizes = [torch.linalg.vector_norm(param, dtype=pace.dtype).to(device) for param, pace in zip(params, paces, strict=True)]
    changes = [(norm * pace).norm().to(device) for norm, pace in zip(norms, paces, strict=True)]
    return torch.stack(sizes).norm(), lr * torch.stack(changes).norm()


def bounded_change(size: Tensor, change: Tensor, *, limit: float) -> Tensor:
    """``min(1, limit · ‖θ‖ / (γ ‖r g‖))``: the factor that keeps a step from changing the parameters by more than ``limit``.

    A plain deep network that leaves its plateau multiplies its gradients by hundreds within one measurement interval, and the
    paces follow only at the next.

    Args:
        size: ``‖θ‖``, 0-dim.
        change: ``γ ‖r g‖``, 0-dim.
        limit: Largest ratio of the second to the first.

    Returns:
        The factor, 0-dim; 1 for parameters that are all zero.
    """
    allowed = torch.where(size > 0, limit * size, change)
    return torch.where(change > allowed, allowed / change, torch.ones_like(change))


_RUN = 2**19
"""Entries of the tensors that a CPU takes together: 8 MiB with their gradients, momentum and paced gradients, in float32."""


def paced_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    paces: list[Tensor],
    *,
    decay_shares: list[Tensor] | None = None,
    leads: Sequence[Lead | None] | None = None,
    finite: Tensor,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
    foreach: bool | None,
) -> None:
    """``θ ← (1 − γλ) θ``, ``b ← μ b + r g``, ``θ ← θ − γ b`` (Nesterov: ``θ − γ (r g + μ b)``). In place; gradients untouched.

    With ``decay_shares`` λ is multiplied by those, shaped like the paces. With ``leads`` what θ moves by, but for γ, is held to those
    (:func:`backmatch.leading.hold`). Where ``finite`` (0-dim, bool) is False nothing changes.
    With ``foreach`` all tensors of one device and dtype go through kernels together; without, one tensor at a time needs one product
    at a time in memory. By default (None) they go together on a GPU, which counts kernels, and on a CPU as many at a time as stay in
    its cache from one kernel to the next.
    """
    for kind in kinds_of(params):
        here = finite.to(params[kind[0]].device)
        factors = Factors.of(here, params[kind[0]].dtype, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for chosen in _runs(params, kind, foreach):
            moves = [_paced(grads[i], paces[i]) for i in chosen]
            if factors.broken is not None:
                moves = _masked(moves, factors.broken)
            if maximize:
                torch._foreach_neg_(moves)
            updates = look_ahead(moves, [momentum_buffers[i] for i in chosen], factors, nesterov=nesterov)
            if leads is not None:
                hold(updates, [leads[i] for i in chosen], keep=factors.broken)
            move([params[i] for i in chosen], updates, factors, None if decay_shares is None else [decay_shares[i] for i in chosen])


def _paced(grad: Tensor, pace: Tensor) -> Tensor:
    """``r g``, in g's dtype. Of float16 a pace may leave the range where the product does not."""
    return (grad.to(pace.dtype) * pace).to(grad.dtype) if grad.dtype == torch.float16 else grad * pace.to(grad.dtype)


def _masked(tensors: list[Tensor], broken: Tensor) -> list[Tensor]:
    """All 0 where ``broken``; overwritten. Vectors, many and small, go through one kernel together."""
    vectors = [tensor for tensor in tensors if tensor.ndim == 1]
    if len(vectors) < 2:
        return [tensor.masked_fill_(broken, 0.0) for tensor in tensors]
    joined = iter(torch.cat(vectors).masked_fill_(broken, 0.0).split([len(vector) for vector in vectors]))
    return [next(joined) if tensor.ndim == 1 else tensor.masked_fill_(broken, 0.0) for tensor in tensors]


class Factors(NamedTuple):
    """What a step multiplies by on one device and for one dtype: such that nothing changes where the step is not finite.

    A GPU decides that itself, without being waited for: products with 1 are exact. A CPU has the answer at hand, and seldom anything to
    mask. Factors are tensors, as numbers would be rounded to a narrow dtype before they multiply.
    """

    momentum: float
    held: Tensor
    """μ, or 1."""
    decay: Tensor | None
    """1 − γλ, or 1; None without weight decay."""
    rate: Tensor | float
    """−γ; as a tensor where a learning rate is one, and then 0 where the step is not finite."""
    broken: Tensor | None
    """Whether the step is not finite, 0-dim; None where it is known to be."""

    @classmethod
    def of(cls, finite: Tensor, dtype: torch.dtype, *, lr: float | Tensor, momentum: float, weight_decay: float) -> Factors:
        lr = lr.to(finite.device) if isinstance(lr, Tensor) else lr
        one = torch.ones((), device=finite.device, dtype=torch.promote_types(dtype, torch.float32))
        held, decay = one * momentum, None if weight_decay == 0.0 else one * (1.0 - lr * weight_decay)
        if _is_at_hand(finite) and finite:
            return cls(momentum, held, decay, -lr, None)
        held, decay = torch.where(finite, held, one), None if decay is None else torch.where(finite, decay, one)
        return cls(momentum, held, decay, torch.where(finite, -lr, 0.0) if isinstance(lr, Tensor) else -lr, ~finite)


def _is_at_hand(flag: Tensor) -> bool:
    """Whether the host may read a flag without waiting."""
    return not torch.compiler.is_compiling() and type(flag) is Tensor and flag.is_cpu


def look_ahead(grads: list[Tensor], momentum_buffers: list[Tensor], factors: Factors, *, nesterov: bool) -> list[Tensor]:
    """``b ← μ b + g``, in place; gives ``g + μ b`` (Nesterov) or b, in tensors that may be changed.

    Args:
        grads: Of one device and dtype, as are the buffers; all 0 where the step is not finite, as a product with 0 would leave NaN.
            They are overwritten.
        momentum_buffers: b.
        factors: With μ.
        nesterov: Whether to look ahead.
    """
    torch._foreach_mul_(momentum_buffers, factors.held)
    torch._foreach_add_(momentum_buffers, grads)
    if not nesterov:
        return list(torch._foreach_mul(momentum_buffers, 1.0))
    torch._foreach_add_(grads, momentum_buffers, alpha=factors.momentum)
    return grads


def move(params: list[Tensor], updates: list[Tensor], factors: Factors, decay_shares: Sequence[Tensor] | None = None) -> None:
    """``θ ← (1 − γλ) θ − γ u``, in place; λ times ``decay_shares`` where there are some. ``updates`` are overwritten."""
    if factors.decay is not None and decay_shares is None:
        torch._foreach_mul_(params, factors.decay)
    elif factors.decay is not None and decay_shares is not None:
        shrinks = torch._foreach_mul(list(decay_shares), factors.decay - 1.0)
        torch._foreach_add_(shrinks, 1.0)
        torch._foreach_mul_(params, shrinks)
    if isinstance(factors.rate, Tensor):
        torch._foreach_mul_(updates, factors.rate)
        torch._foreach_add_(params, updates)
        return
    if factors.broken is not None:
        torch._foreach_mul_(updates, ~factors.broken)
    torch._foreach_add_(params, updates, alpha=factors.rate)


def kinds_of(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors of each device and dtype, which may go through kernels together."""
    kinds: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(kinds.values())


def _runs(tensors: Sequence[Tensor], kind: list[int], foreach: bool | None) -> list[list[int]]:
    """Those of one kind cut into what goes through kernels together, see :func:`paced_sgd`."""
    if foreach is None and tensors[kind[0]].is_cpu:
        runs: list[list[int]] = []
        room = 0
        for i in kind:
            room -= tensors[i].numel()
            if room < 0 or not runs:
                runs.append([])
                room = _RUN - tensors[i].numel()
            runs[-1].append(i)
        return runs
    return [[i] for i in kind] if foreach is False else [kind]


def _unit_norms(tensor: Tensor, entry: Tensor) -> Tensor:
    """Norm of ``tensor`` over what each entry of ``entry`` covers, shaped like it, without a product of the tensor's size."""
    dims = [dim for dim in range(tensor.ndim) if entry.shape[dim] == 1]
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=entry.dtype) if dims else tensor.to(entry.dtype).abs()
