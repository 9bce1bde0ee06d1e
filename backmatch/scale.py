"""The "rules" estimator: closed forms along the graph, from the output down, give every parameter's response m_W·M."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.utils import _pytree as pytree

from backmatch import graph as graphs
from backmatch import layers
from backmatch.layers.arithmetic import function_gains
from backmatch.layers.moments import constant
from backmatch.outputs import predictions


@dataclass(frozen=True)
class LayerScale:
    """What the rules say of one call of a layer with parameters.

    Attributes:
        name: Path of the layer in the model.
        kind: Its class name.
        gain: m_z of the layer, in (output unit / input unit)²; None if it reads indices or is a bare parameter.
        scale: M, mean-square response of the network's output to one element of this layer's output.
        curvature: m_W by parameter name in the layer, per sample of the network's batch.
    """

    name: str
    kind: str
    gain: Tensor | None
    scale: Tensor
    curvature: dict[str, Tensor]


def responses(model: Module, *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
    r"""Mean-square response of the network's output to one element of each trainable parameter: ``m_W · M`` (docs/derivation.md eq. 4).

    A parameter of a layer called more than once, or shared by layers, has the sum over calls. The rules are exact layer by
    layer; their product along the graph takes neighbouring Jacobians for independent, and the branches of a skip
    connection for uncorrelated. :mod:`backmatch.probe` measures the same number without that assumption. Known to be off:
    every ReLU under a max-pool makes what lies below nearly a factor of 2 too low (the pool picks what the ReLU let pass); a
    parameter shared by P positions that an average pool sums again is up to P times too low (a norm's γ and β under a global
    pool); a bias that a norm on batch statistics takes out again has the response 0, which a single layer cannot show.

    The model is left as it was: buffers, modes, random state, gradients; hooks are not called.

    Args:
        model: The network, in the mode (training or eval) to describe.
        *inputs: Arguments of its forward: a batch, or part of one, ``[N, ...]``, N that of the first tensor.
        **kwargs: Keyword arguments of its forward.

    Returns:
        Parameter name → m_W·M, 0-dim, float32 or wider, outside the graph, in (output unit / parameter unit)²; 0 for a parameter
        that does not reach the output.

    Raises:
        TypeError: If there is no tensor among the inputs.
        ValueError: If the batch is empty or not finite, or no traced layer owns a trainable parameter.
        NotImplementedError: If the forward cannot be traced or a layer or function on the way has no rule.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {parameter: name for name, parameter in trainable.items()}  # a shared parameter goes by its first name
    found: dict[str, Tensor] = {}
    for record in layer_scales(model, *inputs, **kwargs):
        owned = dict(model.get_submodule(record.name).named_parameters())
        for key, curvature in record.curvature.items():
            name = names.get(owned[key]) if key in owned else None
            if name is not None:
                response = curvature * record.scale
                found[name] = found[name] + response if name in found else response
    for name in trainable:
        if name not in found:
            raise ValueError(
                f"Parameter '{name}' belongs to no layer with a rule that the forward calls, so it would get no response. "
                "Use estimator='probe', freeze it (requires_grad=False), or give its layer a rule with backmatch.layers.register."
            )
    return {name: found[name] for name in trainable}


def layer_scales(model: Module, *inputs: Any, **kwargs: Any) -> list[LayerScale]:
    """The parts of :func:`responses`: gain, scale and curvature of every call of a layer with parameters, in order of execution.

    A parameter used directly (a position embedding, a scale factor) is a layer that reads nothing and puts out the parameter itself,
    shared by the N samples: its curvature is 1/N.

    Args:
        model: As for :func:`responses`.
        *inputs: As for :func:`responses`.
        **kwargs: As for :func:`responses`.

    Returns:
        One record per call; a layer called twice has two.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`responses`.
    """
    batch = _check_batch(inputs, kwargs)
    with graphs.isolated(model):
        steps = _measure(model, graphs.trace(model, inputs, kwargs), inputs, kwargs, batch)
        scales = _accumulate(steps, batch)
    return [
        LayerScale(
            name=step.name,
            kind=step.kind,
            gain=step.gains[0] if step.gains else None,
            scale=scales.get(step.node, constant(0.0, batch)),
            curvature=step.curvature,
        )
        for step in steps
        if step.curvature
    ]


@dataclass(frozen=True)
class _Step:
    """One node of the graph, its gains towards the nodes it reads (None: no rule), and what its own parameters contribute."""

    node: fx.Node
    name: str
    kind: str
    sources: tuple[fx.Node, ...]
    gains: Sequence[Tensor] | None
    curvature: dict[str, Tensor]


def _measure(model: Module, graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Tensor) -> list[_Step]:
    """Run the graph and keep a step for every node with parameters in it or below it (towards the input)."""
    steps = _bare_parameters(model, graph, batch)
    live = {step.node for step in steps}
    for call in graphs.run(model, graph, args, kwargs):
        reads_live = not live.isdisjoint(call.sources)
        if call.module is not None:
            step = _measure_layer(call, call.module, batch, reads_live)
        elif call.node.op == "output":
            if not call.operands:
                raise ValueError(
                    f"The output of {type(model).__name__} holds no floating tensor, so it has no response to its parameters. "
                    "Return the network's outputs (logits) from forward, or use estimator='loss'."
                )
            share = constant(batch.shape[0] / predictions(call.operands), batch)
            step = _Step(call.node, "", "output", call.sources, [share] * len(call.sources), {})
        elif reads_live:
            gains = function_gains(call.node.target, call.args, call.kwargs, call.operands, call.evaluate)
            step = _Step(call.node, call.node.name, str(call.node.target), call.sources, gains, {})
        else:
            continue
        if reads_live or step.curvature:
            live.add(call.node)
            steps.append(step)
    return steps


def _bare_parameters(model: Module, graph: fx.Graph, batch: Tensor) -> list[_Step]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    share = constant(1 / batch.shape[0], batch)
    found = []
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in parameters:
            path, _, name = node.target.rpartition(".")
            found.append(_Step(node, path, "Parameter", (), (), {name: share}))
    return found


def _measure_layer(call: graphs.Call, module: Module, batch: Tensor, reads_live: bool) -> _Step:
    name = str(call.node.target)
    arguments = (*call.args, *call.kwargs.values())
    if len(arguments) != 1 or not isinstance(arguments[0], Tensor):
        raise NotImplementedError(
            f"Layer '{name}' ({type(module).__name__}) is called with {len(arguments)} arguments; the rules take one tensor. "
            "Use estimator='probe'."
        )
    x = arguments[0]
    # A layer may see samples and positions merged into one dimension; the network's batch says what a sample is.
    samples = x.shape[0] / batch.shape[0]
    curvature = {key: value * samples for key, value in layers.curvature(module, x, name=name).items()}
    gains = [layers.gain(module, x, name=name)] if call.sources and (reads_live or curvature) else []
    return _Step(call.node, name, type(module).__name__, call.sources, gains, curvature)


def _accumulate(steps: Sequence[_Step], batch: Tensor) -> dict[fx.Node, Tensor]:
    """``M(a) = Σ over the nodes z that read a of m_z · M(z)``, from ``M(output) = 1`` down."""
    scales: dict[fx.Node, Tensor] = {}
    for step in reversed(steps):
        scale = constant(1.0, batch) if step.node.op == "output" else scales.get(step.node)
        if scale is None:
            continue
        if step.gains is None:
            raise NotImplementedError(
                f"Function '{step.kind}' (node '{step.name}') has no rule, so the scale of what it reads is not known. "
                "Use estimator='probe', or put it in a module and give that a rule with backmatch.layers.register."
            )
        for source, gain in zip(step.sources, step.gains, strict=True):
            passed = gain.to(scale.device) * scale
            scales[source] = scales[source] + passed if source in scales else passed
    return scales


def _check_batch(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensors = [leaf for leaf in pytree.tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        given = ", ".join(type(value).__name__ for value in (*inputs, *kwargs.values())) or "nothing"
        raise TypeError(f"Invalid inputs: {given}. Must hold a tensor [N, ...], the batch to describe the model on.")
    batch = tensors[0]
    if batch.ndim == 0 or batch.numel() == 0:
        raise ValueError(f"Invalid input shape: {list(batch.shape)}. Must be a batch [N, ...] of at least one sample.")
    if batch.is_floating_point() and not torch.isfinite(batch).all():
        raise ValueError("Invalid input: it holds NaN or infinite values. Must be finite.")
    return batch
