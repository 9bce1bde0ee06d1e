"""From gradients and paces to new parameters: how long a step may be, and momentum. Knows nothing of networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entry_norms(tensors: Sequence[Tensor], entries: Sequence[Tensor]) -> list[Tensor]:
    """Norm of every tensor over what each entry of its pace covers, shaped like the pace, without a product of the tensor's size.

    Args:
        tensors: Parameters or gradients.
        entries: A pace or response of each, 0-dim or with the size 1 in every dimension it does not resolve.
    """
    return [_norm_like(tensor, entry) for tensor, entry in zip(tensors, entries, strict=True)]


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


def orthogonalised(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular vectors are kept, singular values come close to 1.

    Newton-Schulz iterations of the quintic polynomial that Muon uses (K. Jordan 2024): its slope at 0 is as steep as possible, and the
    values that five steps leave lie between 0.68 and 1.21 where they began above 0.003 times the norm.

    Args:
        matrix: ``[m, n]``.
        steps: Iterations.

    Returns:
        ``[m, n]``, of the same dtype; 0 for 0.
    """
    x = matrix / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    gram = x @ x.mT
    if 2 * x.shape[0] > x.shape[1]:
        for step in range(steps):
            gram = gram if step == 0 else x @ x.mT
            x = _polynomial(gram) @ x
    else:
        # X stays a polynomial of the first Gram matrix times the first X, and small products are cheaper than wide ones.
        factor = torch.eye(x.shape[0]).to(x)
        for _ in range(steps):
            polynomial = _polynomial(gram)
            factor, gram = polynomial @ factor, polynomial @ gram @ polynomial
        x = factor @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def _polynomial(gram: Tensor) -> Tensor:
    found = 2.0315 * gram @ gram - 4.775 * gram
    found.diagonal().add_(3.4445)
    return found


def paced_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    paces: list[Tensor],
    *,
    finite: Tensor,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
    foreach: bool,
) -> None:
    """``θ ← (1 − γλ) θ``, ``b ← μ b + r g``, ``θ ← θ − γ b`` (Nesterov: ``θ − γ (r g + μ b)``). In place; gradients untouched.

    Where ``finite`` (0-dim, bool) is False nothing changes. ``foreach`` takes fewer and larger kernels, one set for the tensors of each
    device and dtype; otherwise one tensor at a time needs one product at a time in memory.
    """
    for chosen in kinds_of(params, foreach=foreach):
        here = finite.to(params[chosen[0]].device)
        paced = [(grads[i] * paces[i].to(grads[i].dtype)).masked_fill_(~here, 0.0) for i in chosen]
        if maximize:
            torch._foreach_neg_(paced)
        updates = look_ahead(paced, [momentum_buffers[i] for i in chosen], finite=here, momentum=momentum, nesterov=nesterov)
        move([params[i] for i in chosen], updates, finite=here, lr=lr, weight_decay=weight_decay)


def look_ahead(grads: list[Tensor], momentum_buffers: list[Tensor], *, finite: Tensor, momentum: float, nesterov: bool) -> list[Tensor]:
    """``b ← μ b + g`` where ``finite``, in place; gives ``g + μ b`` (Nesterov) or b, in tensors that may be changed.

    What is not finite is decided on the device, without waiting for it: products with 1 are exact. The gradients have to be finite all
    the same, those of a step that is not replaced by 0, as a product with 0 would leave NaN; they are overwritten.

    Args:
        grads: Of one device and dtype, as are the buffers.
        momentum_buffers: b.
        finite: 0-dim, bool, on their device.
        momentum: μ.
        nesterov: Whether to look ahead.
    """
    torch._foreach_mul_(momentum_buffers, _or_one(momentum, momentum_buffers[0], finite))
    torch._foreach_add_(momentum_buffers, grads)
    if not nesterov:
        return list(torch._foreach_mul(momentum_buffers, 1.0))
    torch._foreach_add_(grads, momentum_buffers, alpha=momentum)
    return grads


def move(params: list[Tensor], updates: list[Tensor], *, finite: Tensor, lr: float | Tensor, weight_decay: float) -> None:
    """``θ ← (1 − γλ) θ − γ u`` where ``finite``, in place. ``updates`` are overwritten."""
    if weight_decay != 0.0:
        torch._foreach_mul_(params, _or_one(1.0 - lr * weight_decay, params[0], finite))
    torch._foreach_mul_(updates, finite)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(updates, -lr.to(params[0].device))
        torch._foreach_add_(params, updates)
    else:
        torch._foreach_add_(params, updates, alpha=-lr)


def kinds_of(tensors: Sequence[Tensor], *, foreach: bool) -> list[list[int]]:
    """Indices of the tensors that go through kernels together: those of one device and dtype, or each on its own."""
    kinds: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype) if foreach else i, []).append(i)
    return list(kinds.values())


def _or_one(factor: float | Tensor, like: Tensor, finite: Tensor) -> Tensor:
    """``factor``, wide enough for ``like``; 1 where the step is not finite."""
    one = torch.ones((), device=finite.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return torch.where(finite, one * factor, one)


def _norm_like(tensor: Tensor, entry: Tensor) -> Tensor:
    """Norm of ``tensor`` over what each entry of ``entry`` covers, shaped like it, without a product of the tensor's size."""
    dims = [dim for dim in range(tensor.ndim) if entry.ndim == 0 or entry.shape[dim] == 1]
    if not dims:
        return tensor.to(entry.dtype).abs()
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=entry.ndim > 0, dtype=entry.dtype)
