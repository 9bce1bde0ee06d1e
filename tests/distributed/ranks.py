"""Jobs on several gloo ranks of this machine, with a deadline: a rank that hangs fails its test instead of waiting."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn

needs_gloo = pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="torch has no gloo")


def on_ranks(count: int, job: Callable[..., Any], folder: Path, *args: Any, deadline: float = 100.0) -> list[Any]:
    """What ``job(*args)`` returns on each of ``count`` ranks; it is importable and returns tensors, numbers, and containers of them."""
    folder.mkdir(exist_ok=True)
    processes = spawn(_work, (count, job, str(folder), args), nprocs=count, join=False)
    assert processes is not None
    end = time.monotonic() + deadline
    try:
        while not processes.join(timeout=1.0):
            assert time.monotonic() < end, f"the ranks took more than {deadline} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _work(rank: int, count: int, job: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # A file to meet at instead of a port, which another process may take.
    store = distributed.FileStore(f"{folder}/store", count)
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, pg_options=options)
    try:
        torch.save(job(*args), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()
    # gloo's threads may still hold tensors of the last collective; one that drops them while the interpreter ends aborts the process
    # (pytorch/pytorch#179291). What the job had to say is on disk, so leave without an end of the interpreter.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
