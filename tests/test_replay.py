"""Steps as CUDA graphs, by a recorder that does on a CPU what a graph does: kernels on memory that stays where it is, and no more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from backmatch import BackMatch, BackMatchSGD
from backmatch.contract import ModelOptimizer, is_due

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
        # Tensors of its own, on the same memory: theirs may be moved by assignment to ``data``.
        args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs or {}))
        name = func._schema.name
        assert "_local_scalar_dense" not in name, "a graph cannot wait for the device"
        assert "lift_fresh" not in name, "a graph would read what the host made for it later, when it is gone"
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
    pools: list[tuple[object, Any, Any]] = []  # noqa: RUF012
    shared: object

    def __init__(self) -> None:
        self.replays = 0
        self.recorder = Recorder()
        Graph.made.append(self)

    def pool(self) -> object:
        return self.shared

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, found in self.recorder.kernels:
            new = func(*args, **kwargs)
            if found is not None:
                for place, value in zip(tree_leaves(found), tree_leaves(new), strict=True):
                    if isinstance(place, Tensor):
                        place.copy_(value)


@contextmanager
def recording(graph: Graph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
    assert stream.device == torch.device("cpu")
    # A pool of which no graph is left cannot be recorded in, and memory goes from graph to graph of one stream alone.
    assert pool is None or any(kept() is not None for shared, _, kept in Graph.pools if shared is pool)
    assert all(other is stream for shared, other, _ in Graph.pools if shared is pool)
    graph.shared = pool or object()
    Graph.pools.append((graph.shared, stream, ref(graph)))
    with graph.recorder:
        yield


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.made.clear()
    Graph.pools.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(ModelOptimizer, "_is_replayed", lambda self, parts: True)
    monkeypatch.setattr(BackMatch, "_is_measured_by_graph", lambda self, measured, seen: self.cuda_graph and bool(measured))
    monkeypatch.setattr("backmatch.step._is_at_hand", lambda flag: False)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    return nn.Sequential(*layers)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, bad: int = -1, frozen: range = range(0), batch: int = 16
) -> None:
    """With another lr at every step; ``bad`` has a gradient that is not finite, and in ``frozen`` the last layer has none."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(batch, 2, 7, 7, generator=generator), torch.randint(0, 3, (batch,), generator=generator)
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


def test_measurements_are_graphs_that_share_memory_with_steps() -> None:
    one, _ = pair("kron")
    train(*one, range(30))
    steps, measurements = sorted(Graph.made, key=lambda graph: -graph.replays)
    assert steps.replays == 29
    assert measurements.replays == sum(is_due(step, 4) for step in range(1, 30))
    assert steps.pool() is measurements.pool()


def test_a_batch_of_another_size_is_measured_as_such() -> None:
    one, other = pair("kron")
    for net, optimizer in (one, other):
        train(net, optimizer, range(8))
        train(net, optimizer, range(8, 12), batch=12)
        train(net, optimizer, range(12, 24))
    assert_same(one, other)


class Repeated(nn.Module):
    """Calls its first layer as often as it says, and always gives an output of the same size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.times = nn.Linear(98, 98), nn.Linear(98, 3), 1

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return self.head(x)


def test_a_layer_called_more_often_is_measured_as_such() -> None:
    runs = []
    for graph in (True, False):
        net = Repeated()
        optimizer = BackMatch(net, interval=4, cuda_graph=graph)
        if not graph:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
        for step in range(24):
            net.times = 2 if 8 <= step < 12 else 1
            train(net, optimizer, range(step, step + 1))
        runs.append((net, optimizer))
    assert_same(*runs)


@every
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    one, other = pair(name)
    for net, optimizer in (one, other):
        train(net, optimizer, range(20), bad=18)
    assert one[1].skipped_steps == 1
    assert_same(one, other)


def _move(net: nn.Module, optimizer: BackMatchSGD) -> None:
    net[3].weight.data = net[3].weight.data.clone()


def _decay(net: nn.Module, optimizer: BackMatchSGD) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


def _reload(net: nn.Module, optimizer: BackMatchSGD) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _average(net: nn.Module, optimizer: BackMatchSGD) -> None:
    optimizer.beta = 0.0


def _clear(net: nn.Module, optimizer: BackMatchSGD) -> None:
    optimizer.state[net[6].bias]["momentum_buffer"] = torch.zeros(3)


def _freeze(net: nn.Module, optimizer: BackMatchSGD) -> None:
    net[1].weight.requires_grad_(False)


@pytest.mark.parametrize("change", [_move, _decay, _reload, _average, _clear, _freeze])
@pytest.mark.parametrize("name", ["gradient", "kron"])
def test_a_change_is_followed_as_without_a_graph(name: str, change: Callable[[nn.Module, BackMatchSGD], None]) -> None:
    one, other = pair(name)
    for net, optimizer in (one, other):
        train(net, optimizer, range(12))
        change(net, optimizer)
        train(net, optimizer, range(12, 24))
    assert_same(one, other)
    assert sum(graph.replays for graph in Graph.made) >= 18


def test_another_length_is_taken_up() -> None:
    one, other = pair("kron")
    for net, optimizer in (one, other):
        train(net, optimizer, range(12))
        optimizer.length = "rms"
        train(net, optimizer, range(12, 16))
    assert_same(one, other)


def test_a_parameter_that_changes_its_group_has_the_rate_of_that() -> None:
    runs = []
    for graph in (True, False):
        net = network()
        groups = [{"params": list(net[0].parameters())}, {"params": list(net[6].parameters())}]
        optimizer = BackMatchSGD(groups, cuda_graph=graph)
        for group, rate in zip(optimizer.param_groups, (0.01, 0.0), strict=True):
            group["lr"] = torch.tensor(rate)
        for step in range(10):
            if step == 6:
                optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
            for p in net.parameters():
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            optimizer.step()
        runs.append((net, optimizer))
    assert_same(*runs)


@every
def test_what_has_a_gradient_may_change(name: str) -> None:
    """Now and then, and then so often that graphs are not worth their while."""
    one, other = pair(name)
    for net, optimizer in (one, other):
        train(net, optimizer, range(14), frozen=range(8, 11))
        for step in range(14, 54, 4):
            train(net, optimizer, range(step, step + 4), frozen=range(step, step + 2))
    assert_same(one, other)
    assert len(Graph.made) < 8


def test_a_step_without_a_graph_lets_the_graph_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants that it reads may go with what has a gradient in that step."""
    one, other = pair("gradient")
    train(*one, range(6))
    graph = ref(Graph.made.pop())
    with monkeypatch.context() as patch:
        patch.setattr(ModelOptimizer, "_is_replayed", lambda self, parts: False)
        one[1].param_groups[0]["lr"] = torch.tensor(0.01)
        train(*one, range(6, 7), frozen=range(6, 7))
    assert graph() is None
    train(*other, range(6))
    train(*other, range(6, 7), frozen=range(6, 7))
    for net, optimizer in (one, other):
        train(net, optimizer, range(7, 12))
    assert_same(one, other)


def test_a_graph_that_cannot_be_recorded_spoils_no_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    optimizer = BackMatch(net, cuda_graph=True)
    train(net, optimizer, range(1))

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", fails)
        before = [p.detach().clone() for p in net.parameters()]
        with pytest.raises(torch.OutOfMemoryError):
            train(net, optimizer, range(1, 2))
        assert_close([p.detach() for p in net.parameters()], before, rtol=0, atol=0)
    train(net, optimizer, range(2, 8))
    assert Graph.made[-1].replays >= 4


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


def test_graphs_are_of_one_gpu_and_not_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    optimizer = BackMatchSGD(nn.Linear(2, 2), cuda_graph=True)
    with FakeTensorMode():
        cpu, first, second = (torch.zeros((), device=device) for device in ("cpu", "cuda:0", "cuda:1"))

        def is_replayed(*params: Tensor) -> bool:
            return optimizer._is_replayed([SimpleNamespace(params=[p]) for p in params])  # type: ignore[list-item]

        assert is_replayed(second, second)
        assert not is_replayed(cpu)
        assert not is_replayed(first, second)
        assert not is_replayed(first, cpu)
        optimizer._skipped = first
        assert is_replayed(first)
        assert not is_replayed(second)
        capturing = True
        assert not is_replayed(first)


def test_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    runs = []
    for graph in (True, False):
        net = network()
        runs.append((net, BackMatch(net, cuda_graph=graph)))
        train(*runs[-1], range(6))
    assert_same(*runs)
