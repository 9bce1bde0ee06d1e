"""Sums over ranks, and tensors of which every rank holds a share. The only file that imports torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import prod

import torch
from torch import Tensor, nn
from torch import distributed as dist

if dist.is_available():
    from torch.distributed.tensor import DTensor, Shard


def ranks() -> int:
    """Processes that train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if ranks() > 1 else 0


@contextmanager
def joined(device_type: str, timeout: float) -> Iterator[None]:
    """Train with the other processes that torchrun started, if any: a process group for the time being.

    Args:
        device_type: ``cuda`` for NCCL, one device per process; anything else for gloo.
        timeout: Seconds that a rank waits for the others before it gives up.

    Raises:
        ConnectionError: If another rank ended, or hangs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or ranks() > 1:
        yield
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        yield
        dist.destroy_process_group()  # not after an error: that may wait for the rank that is lost
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's own have no type
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"Rank {os.environ.get('RANK')} lost the others: {reason} One of them ended, or has not answered for {timeout:g} s; "
            "see what it said last. Start the run again, as torchrun --max-restarts does: it goes on from its last checkpoint."
        ) from error


def is_restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def replicated(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over ranks if there are several."""
    return nn.parallel.DistributedDataParallel(model) if ranks() > 1 else model


def on_any_rank(flag: bool, device: torch.device) -> bool:
    return flag if ranks() == 1 else bool(sum_over_ranks([torch.tensor(float(flag), device=device)])[0])


def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Give every tensor the values that it has on rank 0, in place."""
    for tensor in tensors if ranks() > 1 else ():
        dist.broadcast(tensor, 0)


def sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Every tensor's sum over the ranks of ``group`` (all of them by default), by one all-reduce of all of them in a row.

    Args:
        tensors: On one device, of the same shapes in the same order on every rank; the widest of their dtypes goes over the wire.
    """
    if not tensors or ranks() == 1:
        return list(tensors)
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class Share:
    """Which part of a tensor this rank holds: ``size`` entries along ``dim`` from ``start`` on, as ``torch.chunk`` cuts."""

    dim: int
    start: int
    size: int
    group: dist.ProcessGroup

    def of(self, entry: Tensor, whole: Tensor) -> Tensor:
        """What of ``entry`` belongs to this share, if it has an entry for each of ``whole``'s along ``dim``; otherwise all of it."""
        return entry.narrow(self.dim, self.start, self.size) if _resolves(entry, whole, self.dim) else entry


def share_of(tensor: Tensor) -> Share | None:
    """This rank's share of a DTensor that is sharded, as FSDP2's parameters are; None for a tensor that it holds as a whole.

    Raises:
        NotImplementedError: If the DTensor is cut in more than one way, as by tensor parallelism within FSDP2.
    """
    if not dist.is_available() or not isinstance(tensor, DTensor):
        return None
    cuts = [(axis, placement) for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not cuts:
        return None
    axis, placement = cuts[0]
    if len(cuts) > 1 or type(placement) is not Shard:
        raise NotImplementedError(
            f"A parameter {list(tensor.shape)} is laid out as {list(tensor.placements)}. Parameters may be sharded along one dimension, "
            "as fully_shard does on a mesh of one dimension, or of two with the first for replicas."
        )
    mesh = tensor.device_mesh
    start, size = _chunk(tensor.shape[placement.dim], mesh.size(axis), mesh.get_local_rank(axis))
    return Share(placement.dim, start, size, mesh.get_group(axis))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if dist.is_available() and isinstance(tensor, DTensor) else tensor


def team(tensor: Tensor) -> tuple[int, int]:
    """How many ranks share the work on a tensor, and which of them this one is: those over which it is sharded, or else all."""
    share = share_of(tensor)
    return (ranks(), rank()) if share is None else (dist.get_world_size(share.group), dist.get_rank(share.group))


def whole_norms(norms: Sequence[Tensor], entries: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Norms over whole tensors, from those over what this rank holds of them: one all-reduce, none where nothing is sharded.

    A norm that is not finite on one rank is not finite on any.

    Args:
        norms: Of the local parts, see :func:`backmatch.step.entry_norms`.
        entries: Shaped as the results.
        params: The parameters whose norms, or whose gradients' norms, they are.
    """
    shares = [share_of(p) for p in params]
    squares = [norm if share is None else norm.square() for norm, share in zip(norms, shares, strict=True)]
    for i, share in enumerate(shares):
        if share is not None and _resolves(entries[i], params[i], share.dim):
            held, squares[i] = squares[i], torch.zeros_like(entries[i], dtype=squares[i].dtype)
            share.of(squares[i], params[i]).copy_(held)
    return [total if share is None else total.sqrt() for total, share in zip(sum_over_shares(squares, shares), shares, strict=True)]


def sum_over_shares(tensors: Sequence[Tensor], shares: Sequence[Share | None]) -> list[Tensor]:
    """Every tensor's sum over the ranks that share with this one: one all-reduce of all that have a share, the others as they are."""
    cut = [i for i, share in enumerate(shares) if share is not None]
    found = list(tensors)
    if cut:
        sums = sum_over_ranks([found[i] for i in cut], _one_group(shares))
        for i, total in zip(cut, sums, strict=True):
            found[i] = total
    return found


def to_owners(shares: Sequence[Tensor], params: Sequence[Tensor], owners: Sequence[int]) -> dict[int, Tensor]:
    """Whole tensors, each on the rank that owns it: one all-to-all.

    Args:
        shares: What this rank holds of each, of one dtype.
        params: Sharded parameters of the same shapes.
        owners: Owning rank of each, in the group over which they are sharded.

    Returns:
        Index → whole tensor, of those that this rank owns.
    """
    group = _one_group([share_of(p) for p in params])
    count, me = dist.get_world_size(group), dist.get_rank(group)
    mine = [i for i, owner in enumerate(owners) if owner == me]
    sent = [torch.cat([_empty(shares[0]), *(shares[i].reshape(-1) for i in range(len(params)) if owners[i] == r)]) for r in range(count)]
    shapes = [[_shape_on(params[i], r) for i in mine] for r in range(count)]
    got = _exchanged(sent, [sum(map(prod, row)) for row in shapes], group)
    pieces = [list(flat.split(list(map(prod, row)))) for flat, row in zip(got, shapes, strict=True)]
    return {i: torch.cat([pieces[r][k].reshape(shapes[r][k]) for r in range(count)], dim=_share(params[i]).dim) for k, i in enumerate(mine)}


def from_owners(whole: Mapping[int, Tensor], params: Sequence[Tensor], owners: Sequence[int], like: Tensor) -> list[Tensor]:
    """The way back of :func:`to_owners`: this rank's share of every tensor, of which each owner has the whole.

    Args:
        whole: Index → tensor, of those that this rank owns, all of the dtype and device of ``like``.
    """
    group = _one_group([share_of(p) for p in params])
    count, me = dist.get_world_size(group), dist.get_rank(group)
    cuts = {i: _chunks(tensor, _share(params[i]).dim, count) for i, tensor in whole.items()}
    sent = [torch.cat([_empty(like), *(cuts[i][r].reshape(-1) for i in sorted(cuts))]) for r in range(count)]
    rows = [[i for i, owner in enumerate(owners) if owner == r] for r in range(count)]
    got = _exchanged(sent, [sum(prod(_shape_on(params[i], me)) for i in row) for row in rows], group)
    found: dict[int, Tensor] = {}
    for flat, row in zip(got, rows, strict=True):
        shapes = [_shape_on(params[i], me) for i in row]
        found |= {i: part.reshape(shape) for i, part, shape in zip(row, flat.split(list(map(prod, shapes))), shapes, strict=True)}
    return [found[i] for i in range(len(params))]


def shared_out(costs: Sequence[float], count: int) -> list[int]:
    """An owner among ``count`` for every piece of work, the costliest first to whoever has least; the same on every rank."""
    loads = [0.0] * count
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(count), key=lambda r: loads[r])
        loads[owners[i]] += costs[i]
    return owners


def _exchanged(sent: list[Tensor], sizes: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """All-to-all: ``sent[r]`` goes to rank r; ``sizes[r]`` elements come from it."""
    received = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [part.numel() for part in sent], group=group)
    return list(received.split(sizes))


def _one_group(shares: Sequence[Share | None]) -> dist.ProcessGroup:
    groups = list({id(share.group): share.group for share in shares if share is not None}.values())
    if len(groups) != 1:
        raise NotImplementedError(f"Parameters are sharded over {len(groups)} groups of ranks. Shard all of them over one mesh.")
    return groups[0]


def _share(tensor: Tensor) -> Share:
    share = share_of(tensor)
    assert share is not None
    return share


def _shape_on(tensor: Tensor, r: int) -> tuple[int, ...]:
    """The shape of rank r's share."""
    share = _share(tensor)
    size = _chunk(tensor.shape[share.dim], dist.get_world_size(share.group), r)[1]
    return (*tensor.shape[: share.dim], size, *tensor.shape[share.dim + 1 :])


def _chunk(length: int, count: int, r: int) -> tuple[int, int]:
    """Start and size of the r-th of ``count`` chunks; the last ones are shorter, or empty."""
    step = -(-length // count)
    start = min(r * step, length)
    return start, min(step, length - start)


def _chunks(tensor: Tensor, dim: int, count: int) -> list[Tensor]:
    return [tensor.narrow(dim, *_chunk(tensor.shape[dim], count, r)) for r in range(count)]


def _resolves(entry: Tensor, whole: Tensor, dim: int) -> bool:
    return entry.ndim == whole.ndim and entry.shape[dim] == whole.shape[dim]


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)
