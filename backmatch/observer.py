"""What a training step shows: the inputs of the model, and sums and counts per layer. Stores and adds; no formulas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import finalize, ref

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.nn import Module
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from backmatch import layers
from backmatch.kron import second_moment
from backmatch.listener import Listener
from backmatch.outputs import output_tensors, predictions
from backmatch.probe import Inputs, first_samples

OUTPUT = ""
"""Name under which the model's own output is recorded: that of the root in ``model.named_modules()``."""


class _Hook:
    """Calls an observer while that lives. Copied or pickled with the model it hangs on, it calls nobody: observers belong to optimizers."""

    def __init__(self, observer: object, method: str, *first: Any) -> None:
        self._observer = ref(observer)
        self._method = method
        self._first = first

    def __call__(self, *args: Any) -> Any:
        observer = self._observer()
        return None if observer is None else getattr(observer, self._method)(*self._first, *args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        # Not the name of a global: pickle takes that only from the global itself.
        return _silence, ()


def _silence() -> Callable[..., None]:
    return silent


def silent(*args: Any) -> None:
    """What is left of a hook in a copy of the model."""


class InputObserver:
    """Keeps the first samples of the latest training forward, while ``active``.

    Its hook goes when it is deleted, with the optimizer that owns it.
    """

    def __init__(self, model: Module, samples: int) -> None:
        self.active = True
        self.inputs: Inputs | None = None
        self._samples = samples
        self._handle = model.register_forward_pre_hook(_Hook(self, "before_forward"), with_kwargs=True)
        finalize(self, self._handle.remove)

    def take(self) -> Inputs | None:
        """The inputs seen since the last call, if any; they are let go."""
        inputs, self.inputs = self.inputs, None
        return inputs

    def forget(self) -> None:
        """Gradients went: nothing of them is kept here."""

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
        self.inputs = None

    def before_forward(self, model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active and model.training and torch.is_grad_enabled():
            inputs = first_samples(Inputs(args, kwargs, _autocast_state(model)), self._samples)
            args, kwargs = tree_map(_out_of_grad, (inputs.args, inputs.kwargs))
            if inputs.samples != 0 and not _is_wrapped((args, kwargs)):
                self.inputs = Inputs(args, kwargs, inputs.autocast)


@dataclass
class _Sums:
    """Sums over the backward passes of one step, and which of them was the latest."""

    latest_pass: int = -1

    def begin(self, layers: Iterable[Module]) -> None:
        """Before a gradient is added: forget what :func:`_is_left_over`."""
        if _is_left_over(self, layers):
            vars(self).update(vars(type(self)()))
        self.latest_pass = torch._C._current_graph_task_id()


def _is_left_over(sums: _Sums, layers: Iterable[Module]) -> bool:
    """Whether ``sums`` are of a step that never came: of another backward pass than the present, whose gradients the layers hold no more.

    So loops do with steps that a GradScaler skips. Passes are told apart as a layer may be called several times in one.
    """
    if sums.latest_pass in (-1, torch._C._current_graph_task_id()):
        return False
    return all(p.grad is None for layer in layers for p in layer.parameters(recurse=False))


def _summed(total: Tensor | float, more: Tensor | float) -> Any:
    """Their sum, on the device of the second."""
    return (total.to(more.device) if isinstance(total, Tensor) and isinstance(more, Tensor) else total) + more


@dataclass
class GradMoment(_Sums):
    """Sum of squares and number of the entries of one tensor's gradient, and how many predictions the tensor holds."""

    total: Tensor | float = 0.0
    count: int = 0
    predictions: Tensor | float = 0

    def add(self, grad: Tensor, predictions: Tensor | float = 0) -> None:
        if _is_wrapped(grad):
            return
        self.predictions = _summed(self.predictions, predictions)
        wide = grad.detach() if grad.dtype == torch.float64 else grad.detach().float()
        square = wide.square().sum()
        self.total = _summed(self.total, square)
        self.count += wide.numel()

    def is_finite(self) -> bool:
        return bool(torch.as_tensor(self.total).isfinite())

    def mean(self) -> Tensor | float:
        return self.total / self.count


class GradObserver:
    """While ``active``: the input of every observed layer, and the second moment of every layer's grad_output.

    ``calls[name]`` holds one (input, moment) pair per call of the layer; ``calls[OUTPUT]`` those of the model's output.
    """

    def __init__(self, model: Module, layers: Mapping[str, Module]) -> None:
        self.active = True
        self.calls: dict[str, list[tuple[Tensor, GradMoment]]] = {}
        self._layers = dict(layers)
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(_Hook(self, "after_forward", name), with_kwargs=True)
            for name, layer in ({OUTPUT: model} | dict(layers)).items()
        ]
        for handle in self._handles:
            finalize(self, handle.remove)

    def take(self) -> dict[str, list[tuple[Tensor, GradMoment]]]:
        """What was seen since the last call; it is let go."""
        calls, self.calls = self.calls, {}
        return calls

    def forget(self) -> None:
        """Gradients went: so do the calls that had one. Others may be about to."""
        self.calls = {name: [call for call in calls if not call[1].count] for name, calls in self.calls.items()}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.calls = {}

    def after_forward(self, name: str, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (self.active and module.training and torch.is_grad_enabled()) or _is_wrapped((args, kwargs, output)):
            return
        outputs = output_tensors(output)
        moment = GradMoment(predictions=predictions(outputs) if outputs else 0)
        # Not a full backward hook: a following in-place activation breaks those (pytorch issue 61519).
        for tensor in outputs:
            if not tensor.is_leaf:  # a parameter's hooks would outlast the pass
                tensor.register_hook(partial(self._add, name, moment))
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0), None)
        if first is not None and first.numel():
            self.calls.setdefault(name, []).append((first.detach(), moment))

    def _add(self, name: str, moment: GradMoment, grad: Tensor) -> None:
        if name in self.calls:
            owners = list(self._layers.values()) if name == OUTPUT else [self._layers[name]]
            self.calls[name] = [call for call in self.calls[name] if not _is_left_over(call[1], owners)]
        moment.latest_pass = torch._C._current_graph_task_id()
        moment.add(grad)


@dataclass
class Moments(_Sums):
    """Sums over rows of a layer's ``ã ãᵀ`` and ``δ δᵀ``, over how many rows, and how many rows there were before any were left out."""

    inputs: Tensor | float = 0.0
    outputs: Tensor | float = 0.0
    count: int = 0
    positions: int = 0


class MomentObserver:
    """While ``active``: :class:`Moments` of every observed layer, over all its calls, and the second moment of the output's gradient.

    ``input_blocks`` and ``output_blocks`` say how finely the moments are kept, see :func:`backmatch.kron.second_moment`.

    Args:
        model: The network.
        watched: Layers by name, each one that :func:`backmatch.layers.takes_rows`.
        with_bias: Names of those to whose inputs a 1 is appended, for the bias.
        input_blocks: Width → how many diagonal blocks; 0 for the mean of the diagonal alone.
        output_blocks: The same for the outputs.
        limit: Rows of one call that are used, at most about.
    """

    def __init__(
        self,
        model: Module,
        watched: Mapping[str, Module],
        *,
        with_bias: Collection[str],
        input_blocks: Callable[[int], int],
        output_blocks: Callable[[int], int],
        limit: int,
    ) -> None:
        self.active = True
        self.moments: dict[str, Moments] = {}
        self.top = GradMoment()
        self._model, self._layers = model, list(watched.values())
        self._with_bias, self._input_blocks, self._output_blocks, self._limit = with_bias, input_blocks, output_blocks, limit
        self._listeners = {name: Listener(_Hook(self, "add", name, layer)) for name, layer in watched.items()}
        self._top_listener = Listener(_Hook(self, "add_top"))
        self._handles = [
            layer.register_forward_hook(_Hook(self, "after_forward", name), with_kwargs=True) for name, layer in watched.items()
        ]
        self._handles.append(model.register_forward_hook(_Hook(self, "after_model")))
        for handle in self._handles:
            finalize(self, handle.remove)

    def take(self) -> tuple[dict[str, Moments], GradMoment]:
        """What was seen since the last call; it is let go."""
        seen = self.moments, self.top
        self.moments, self.top = {}, GradMoment()
        return seen

    def forget(self) -> None:
        """Gradients went: so do the sums over them."""
        self.take()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.take()

    def after_model(self, model: Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._sees((args, output)):
            return None
        outputs: list[Tensor] = []
        for tensor in output_tensors(output):
            # A parameter that forward returns (a learned variance, prototypes) is no prediction.
            if not tensor.is_leaf and not any(tensor is other for other in outputs):
                outputs.append(tensor)
        if not outputs:
            return None
        # On the host, where it is read without waiting; but a CUDA graph must hold no tensor of a CPU.
        place = outputs[0].device if torch.compiler.is_compiling() and outputs[0].is_cuda else "cpu"
        share = torch.full((), predictions(outputs) / len(outputs), dtype=torch.float64, device=place)
        followed = [self._top_listener.follow(tensor, share) for tensor in outputs]
        if followed[0] is outputs[0]:
            return None
        return tree_map(lambda leaf: next((new for new, old in zip(followed, outputs, strict=True) if old is leaf), leaf), output)

    def add_top(self, predictions: Tensor, grad: Tensor) -> None:
        if not self.active:
            return
        self.top.begin(self._layers)
        self.top.add(grad, float(predictions) if predictions.is_cpu else predictions)

    def after_forward(self, name: str, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        x = args[0] if args else kwargs["input"]
        if not (self._sees((x, output), module) and _is_dense(x) and _is_dense(output) and x.numel() and output.requires_grad):
            return None
        if output.shape != layers.output_shape(module, x):  # a hook of the user's put something else in its place
            return None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows = layers.input_rows(module, x, self._limit)
            if name in self._with_bias:
                rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
            taps = layers.taps(module)
            inputs = second_moment(rows, self._input_blocks(rows.shape[1] // taps), taps)
        # Inputs count once their gradient comes: a checkpointed layer runs twice, and only one of the two calls gets one.
        return self._listeners[name].follow(output, inputs)

    def add(self, name: str, module: Module, inputs: Tensor, grad: Tensor) -> None:
        if not self.active or _is_wrapped(grad):
            return
        moments = self.moments.setdefault(name, Moments())
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            rows = layers.output_rows(module, grad, self._limit)
            moments.begin([module])
            moments.inputs = moments.inputs + inputs
            moments.outputs = moments.outputs + second_moment(rows, self._output_blocks(rows.shape[1]))
            moments.count += rows.shape[0]
            moments.positions += grad.numel() // rows.shape[1]

    def _sees(self, tree: Any, layer: Module | None = None) -> bool:
        # Layers trained in evaluation mode, for the sake of a norm or a dropout beside them, are trained all the same.
        training = self._model.training or (layer is not None and layer.training)
        return self.active and training and torch.is_grad_enabled() and not _is_wrapped(tree)


Observer: TypeAlias = InputObserver | GradObserver | MomentObserver


def _autocast_state(model: Module) -> tuple[str, torch.dtype] | None:
    device_type = next(model.parameters()).device.type
    return (device_type, torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else None


def _out_of_grad(leaf: Any) -> Any:
    """The tensor inside the wrappers of torch.func.grad, which end with it."""
    # Dynamo cannot trace these queries, and what it traces is under no transform.
    while not torch.compiler.is_compiling() and isinstance(leaf, Tensor) and functorch.is_gradtrackingtensor(leaf):
        leaf = functorch.get_unwrapped(leaf)
    return leaf


def _is_dense(value: Any) -> bool:
    """Whether this is a tensor with rows to flatten: neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def _is_wrapped(tree: Any) -> bool:
    """Whether tensors belong to a transform of torch.func, such as vmap, under which samples have no batch, or to ``is_grads_batched``."""
    if torch.compiler.is_compiling():
        return False
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return any(functorch.is_functorch_wrapped_tensor(leaf) or functorch.is_legacy_batchedtensor(leaf) for leaf in leaves)
