"""The network as a graph of calls: traced by torch.fx, then run once over a batch, call by call, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import Module
from torch.utils import _pytree as pytree

from backmatch import layers
from backmatch.layers.arithmetic import size


@dataclass(frozen=True)
class Call:
    """One call that is about to happen, with the tensors it will read.

    ``sources`` are the nodes that computed ``operands``, the distinct floating tensors (or tuples of them) among the
    arguments. A tensor that was changed in place belongs to the node that changed it last.
    """

    node: fx.Node
    module: Module | None  # the layer called; None for functions, methods and the output
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: tuple[fx.Node, ...]
    operands: tuple[Any, ...]
    evaluate: Callable[..., Any]  # repeats a function's or method's call with other operands


@contextmanager
def isolated(model: Module) -> Iterator[None]:
    """Inside, forwards of ``model`` write to copies of its buffers, draw from a forked random state and build no graph."""
    owned = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    copies: dict[Tensor, Tensor] = {buffer: buffer.clone() for _, _, buffer in owned}  # one copy for shared buffers
    try:
        for module, name, buffer in owned:
            module._buffers[name] = copies[buffer]
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, name, buffer in owned:
            module._buffers[name] = buffer


def trace(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    """Trace ``model`` for these arguments; layers with a rule are single nodes, other modules of the user are looked into.

    The tensors in the arguments become placeholders, in order; everything else is a constant. Hooks are not called.
    Python attributes that a forward counts up are, as in any forward, counted up.

    Args:
        model: The network, in the mode (training or eval) to trace.
        args: Positional arguments of ``forward``.
        kwargs: Keyword arguments of ``forward``.

    Returns:
        The graph. Constant tensors stand in the nodes' arguments, so it can be run but not printed as code.

    Raises:
        NotImplementedError: If the forward cannot be traced, e.g. because it branches on the values of tensors.
    """
    if layers.is_known(model):
        graph = fx.Graph()
        inputs = [graph.placeholder(f"input_{i}") for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))) if isinstance(leaf, Tensor)]
        graph.output(graph.create_node("call_module", "", tuple(inputs)))
        return graph
    try:
        return _Tracer(args, kwargs).trace(model)
    except Exception as error:  # whatever a forward does with a proxy that it cannot do
        raise NotImplementedError(
            f"{type(model).__name__}.forward cannot be traced by torch.fx ({type(error).__name__}: {error}), as when it branches on values "
            "or sizes of tensors, so the rules do not know its graph. Use estimator='probe', which needs no graph."
        ) from error


def run(model: Module, graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """Run the graph once; before each call, yield it. Use inside :func:`isolated`.

    Yielding before the call shows every tensor as the call reads it, also where layers work in place, and lets tensors
    go as soon as their last reader has run: no more memory than inference takes.

    Args:
        model: The traced network.
        graph: From :func:`trace`.
        args: Positional arguments of ``forward``, as given to :func:`trace`.
        kwargs: Keyword arguments of ``forward``, as given to :func:`trace`.

    Yields:
        The calls in order of execution; the last one is the output.
    """
    modules = dict(model.named_modules())
    inputs = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    values: dict[fx.Node, Any] = {}
    holders: dict[int, fx.Node] = {}  # id of a value -> the node that computed it or changed it last
    readers = {node: len(node.users) for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "placeholder":
            value: Any = next(inputs)
        elif node.op == "get_attr":
            value = _attribute(model, node.target)
        else:
            call = _call(node, modules, values, holders)
            yield call
            value = None if node.op == "output" else _execute(call)
        values[node] = value
        holders[id(value)] = node
        for source in node.all_input_nodes:
            readers[source] -= 1
            if readers[source] == 0:
                del values[source]


def _call(node: fx.Node, modules: dict[str, Module], values: dict[fx.Node, Any], holders: dict[int, fx.Node]) -> Call:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    found = {holders[id(values[source])]: values[source] for source in node.all_input_nodes if size(values[source])}

    def evaluate(*operands: Any) -> Any:
        swapped = {id(old): new for old, new in zip(found.values(), operands, strict=True)}
        swap_args, swap_kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: swapped.get(id(current[n]), current[n]))
        return _apply(node.target, swap_args, swap_kwargs)

    current = {source: values[source] for source in node.all_input_nodes}
    module = modules[str(node.target)] if node.op == "call_module" else None
    return Call(node, module, args, kwargs, tuple(found), tuple(found.values()), evaluate)


def _execute(call: Call) -> Any:
    # Past __call__: a forward made for measuring must not fire the user's hooks.
    return call.module.forward(*call.args, **call.kwargs) if call.module is not None else _apply(call.node.target, call.args, call.kwargs)


def _apply(target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _attribute(model: Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


class _Tracer(fx.Tracer):
    """fx's tracer, with the arguments at hand, without hooks, and without leaving constants behind on the model."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._arguments = (args, kwargs)

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return layers.is_known(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, m.forward, args, kwargs)

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        leaves, structure = pytree.tree_flatten(self._arguments)
        proxies = [
            self.create_proxy("placeholder", f"input_{i}", (), {}) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(proxies, structure)

        def bound(root: Module) -> Any:
            return root_fn(root, *args, **kwargs)

        return bound, [self.root]

    def create_arg(self, a: Any) -> Any:
        # fx would store a constant tensor as an attribute of the user's model.
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            return a
        return super().create_arg(a)
