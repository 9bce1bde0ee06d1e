"""Steps as CUDA graphs, by a recorder that does on a CPU what a graph does: kernels on memory that stays where it is, and no more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backmatch import BackMatch, BackMatchSGD
from backmatch.contract import ModelOptimizer

Make = Callable[..., BackMatchSGD]

MAKERS: dict[str, Make] = {
    "gradient": BackMatchSGD,
    "probe": lambda net, **kw: BackMatchSGD(net, estimator="probe", interval=4, **kw),
    "scalar": lambda net, **kw: BackMatch(net, match="scalar", step="rms", interval=4, **kw),
    "kron": lambda net, **kw: BackMatch(net, interval=4, **kw),
    "plain": lambda net, **kw: BackMatch(net, 1e-3, step="plain", interval=4, **kw),
}
every = pytest.mark.parametrize("name", list(MAKERS))


class Recorder(TorchDispatchMode):
    """Notes kernels with the very tensors that they read and write; those that write what was there before are not run."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert "_local_scalar_dense" not in func._schema.name, "a graph cannot wait for the device"
        writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        if any(writes):
            written = [value for value, write in zip(args, writes, strict=False) if write]
            written += [value for key, value in kwargs.items() if any(a.name == key and a.alias_info for a in func._schema.arguments)]
            self.kernels.append((func, args, kwargs, None))
            return written[0] if func._schema.returns else None
        found = func(*args, **kwargs)
        if not any(a.alias_info is not None for a in func._schema.returns):  # no view
            self.kernels.append((func, args, kwargs, found))
        return found


class Graph:
    """Of the kernels noted while it was the current one."""

    made: list[Graph] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replays = 0
        self.recorder = Recorder()
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, found in self.recorder.kernels:
            new = func(*args, **kwargs)
            if found is not None:
                for place, value in zip(tree_leaves(found), tree_leaves(new), strict=True):
                    if isinstance(place, Tensor):
                        place.copy_(value)


@contextmanager
def recording(graph: Graph, capture_error_mode: str) -> Iterator[None]:
    with graph.recorder:
        yield


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.made.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(ModelOptimizer, "_is_replayed", staticmethod(lambda parts: True))
    monkeypatch.setattr("backmatch.step._is_at_hand", lambda flag: False)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    return nn.Sequential(*layers)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, bad: int = -1, frozen: range = range(0)) -> None:
    """With another lr at every step; ``bad`` has a gradient that is not finite, and in ``frozen`` the last layer has none."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 2, 7, 7, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        if step == bad:
            net[0].weight.grad[0, 0, 0, 0] = torch.nan
        if step in frozen:
            net[-1].weight.grad = net[-1].bias.grad = None
        lr = optimizer.param_groups[0]["lr"]
        rate = 0.01 / (step + 2)
        optimizer.param_groups[0]["lr"] = torch.tensor(rate) if isinstance(lr, Tensor) else rate
        optimizer.step()


def assert_same(one: tuple[nn.Module, BackMatchSGD], other: tuple[nn.Module, BackMatchSGD]) -> None:
    (net, optimizer), (net2, optimizer2) = one, other
    assert_close(list(net.parameters()), list(net2.parameters()), rtol=0, atol=0)
    for p, p2 in zip(net.parameters(), net2.parameters(), strict=True):
        assert_close(dict(optimizer.state[p]), dict(optimizer2.state[p2]), rtol=0, atol=0)
    assert optimizer.skipped_steps == optimizer2.skipped_steps


def pair(name: str) -> tuple[tuple[nn.Module, BackMatchSGD], tuple[nn.Module, BackMatchSGD]]:
    """One whose steps are graphs, and one that is otherwise alike: its lr a tensor."""
    net, net2 = network(), network()
    plain = MAKERS[name](net2)
    plain.param_groups[0]["lr"] = torch.tensor(0.01)
    return (net, MAKERS[name](net, cuda_graph=True)), (net2, plain)


@every
def test_steps_are_the_same_bit_for_bit(name: str) -> None:
    one, other = pair(name)
    for net, optimizer in (one, other):
        train(net, optimizer, range(30))
    assert_same(one, other)
    assert Graph.made
    assert sum(graph.replays for graph in Graph.made) >= 20, "recorded anew at every measurement"


@every
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    one, other = pair(name)
    for net, optimizer in (one, other):
        train(net, optimizer, range(20), bad=18)
    assert one[1].skipped_steps == 1
    assert_same(one, other)


@every
def test_what_moves_or_comes_and_goes_is_recorded_anew(name: str) -> None:
    one, other = pair(name)
    for net, optimizer in (one, other):
        train(net, optimizer, range(17), frozen=range(10, 13))
        net[3].weight.data = net[3].weight.data.clone()
        optimizer.param_groups[0]["weight_decay"] = 0.5
        train(net, optimizer, range(17, 23))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(net, optimizer, range(23, 30))
    assert_same(one, other)
    assert len(Graph.made) >= 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_has_graphs_of_its_own(copied: Callable[[Any], Any]) -> None:
    one, other = pair("kron")
    for net, optimizer in (one, other):
        train(net, optimizer, range(12))
    twin = copied(one)
    assert twin[1].cuda_graph
    train(*one, range(12, 16))
    for net, optimizer in (twin, other):
        train(net, optimizer, range(12, 20))
    assert_same(twin, other)


def test_gradients_are_left_as_they_are() -> None:
    net = network()
    optimizer = BackMatch(net, cuda_graph=True)
    train(net, optimizer, range(12))
    before = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert_close([p.grad for p in net.parameters()], before, rtol=0, atol=0)


def test_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    runs = []
    for graph in (True, False):
        net = network()
        runs.append((net, BackMatch(net, cuda_graph=graph)))
        train(*runs[-1], range(6))
    assert_same(*runs)
