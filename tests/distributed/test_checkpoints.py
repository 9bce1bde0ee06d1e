"""torch.distributed.checkpoint: saved by so many ranks in one layout, continued by others in another, as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from backmatch import BackMatchSGD
from tests.distributed.ranks import needs_gloo, on_ranks
from tests.distributed.test_same_result import OPTIMIZERS, network, results, sharded, train

pytestmark = [
    needs_gloo,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:.*saw no sample", "ignore:torch.distributed is disabled"),
]

NAMES = ("sgd", "kron")
SAVED, LAST = 7, 14
LAYOUTS = {"one": 1, "ddp-2": 2, "fsdp-2": 2, "fsdp-4": 4}


def build(layout: str, name: str) -> tuple[nn.Module, BackMatchSGD]:
    net = network()
    model: nn.Module = sharded(net) if layout.startswith("fsdp") else DistributedDataParallel(net) if layout.startswith("ddp") else net
    kind, settings = OPTIMIZERS[name]
    return model, kind(model, 0.01, **settings)


def place() -> dict[str, int]:
    """This rank among how many."""
    return {"rank": distributed.get_rank(), "ranks": distributed.get_world_size()} if distributed.is_initialized() else {}


def save(layout: str, folder: str) -> None:
    for name in NAMES:
        model, optimizer = build(layout, name)
        train(model, optimizer, range(SAVED), **place())
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"weights": weights, "optimizer": state}, checkpoint_id=Path(folder, name))


def go_on(layout: str, folder: str) -> dict[str, Any]:
    found = {}
    for name in NAMES:
        model, optimizer = build(layout, name)
        weights, state = get_state_dict(model, optimizer)
        stored = {"weights": weights, "optimizer": state}
        dcp.load(stored, checkpoint_id=Path(folder, name))
        set_state_dict(model, optimizer, model_state_dict=stored["weights"], optim_state_dict=stored["optimizer"])
        train(model, optimizer, range(SAVED, LAST), **place())
        found[name] = results(model, optimizer)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    save("one", str(folders["one"]))
    on_ranks(2, save, folders["fsdp-2"] / "ranks", "fsdp-2", str(folders["fsdp-2"]))
    return folders


@pytest.mark.parametrize(("before", "after"), [("fsdp-2", "fsdp-4"), ("fsdp-2", "one"), ("fsdp-2", "ddp-2"), ("one", "fsdp-2")])
def test_a_run_goes_on_in_another_layout(saved: dict[str, Path], before: str, after: str, tmp_path: Path) -> None:
    folder, ranks = str(saved[before]), LAYOUTS[after]
    found = [go_on(after, folder)] if ranks == 1 else on_ranks(ranks, go_on, tmp_path / "ranks", after, folder)
    for name in NAMES:
        model, optimizer = build("one", name)
        train(model, optimizer, range(LAST))
        for rank in found:
            assert_close(rank[name], results(model, optimizer), rtol=1e-9, atol=1e-11)
            assert not torch.equal(rank[name]["weights"][0], network().tokens.weight)
