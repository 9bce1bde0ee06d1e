"""Equation 5: the response of every parameter from one backward pass of white noise, for any architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from backmatch.outputs import output_tensors, predictions

_Gradients: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], list[Tensor | None]]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call, and the autocast state it ran under."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None = None

    @property
    def samples(self) -> int | None:
        """Size of the batch: the leading dimension of the first tensor; None if there is no tensor."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0), None)


def first_samples(inputs: Inputs, samples: int) -> Inputs:
    """Keep the first ``samples`` samples of every tensor whose leading dimension is the batch.

    Tensors of another leading dimension than the batch's size (masks, positions) are kept whole, and so is a batch of packed sequences.
    Copies are returned, outside the graph: a forward may change its input in place.
    """
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    packed = pytree.tree_leaves((inputs.args, inputs.kwargs), is_leaf=_is_packed)
    batch = None if any(_is_packed(leaf) for leaf in packed) else inputs.samples
    kept = [
        (leaf[:samples] if leaf.ndim > 0 and leaf.shape[0] == batch else leaf).detach().clone() if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(kept, spec)
    return Inputs(args, kwargs, inputs.autocast)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def squared_response_gradients(model: Module, inputs: Inputs, *, seed: int) -> dict[str, Tensor]:
    r"""One draw of equation 5 for every element of every trainable parameter.

    With v ~ N(0, I), independent for every sample i and output element, ``u = ∂(Σ_i v_iᵀ z_B^(i)) / ∂θ`` has

        E[u²] = Σ_i ‖∂z_B^(i) / ∂θ‖²    so    E[u²] / N = m_W·M    (docs/derivation.md eq. 5)

    for N predictions (samples, or tokens of a language model: :func:`backmatch.outputs.predictions`); exactly, cross terms, shared
    weights and skip connections included. Sampled with a generator seeded by ``seed``, so that a resumed run draws what the
    uninterrupted one drew. The model is left as it was: buffers (running statistics) are updated on copies, ``.grad`` is not
    touched, the random state is restored. Forward hooks of the user are called.

    Args:
        model: The network; run in its present mode.
        inputs: One batch.
        seed: Seed of v and of random layers such as dropout.

    Returns:
        Parameter name → u²/N of the parameter's shape, in float32 or wider, in (output unit / parameter unit)²; without those that
        this output does not depend on.

    Raises:
        ValueError: If the output holds no floating tensor with a batch dimension that depends on the parameters.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {f"model.{name}": b.clone() for name, b in model.named_buffers()}
    devices = {p.device for p in trainable.values() if p.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind), torch.enable_grad():
        torch.manual_seed(seed)
        # One call for both passes: a checkpointed layer runs again in the backward, and must find the copies there too.
        arguments = (inputs, list(trainable.values()))
        try:
            grads, count = torch.func.functional_call(_Pass(model, _returned_gradients), buffers, arguments)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            torch.manual_seed(seed)
            grads, count = torch.func.functional_call(_Pass(model, _accumulated_gradients), buffers, arguments)
    return {name: _wide(grad).square() / count for name, grad in zip(trainable, grads, strict=True) if grad is not None}


class _Pass(Module):
    """Forward, then the backward of white noise: each parameter's gradient, None where there is none, and the number of predictions."""

    def __init__(self, model: Module, gradients: _Gradients) -> None:
        super().__init__()
        self.model = model
        self.gradients = gradients

    def forward(self, inputs: Inputs, parameters: list[Tensor]) -> tuple[list[Tensor | None], int]:
        device_type, dtype = inputs.autocast or (parameters[0].device.type, None)
        with torch.autocast(device_type, dtype, enabled=inputs.autocast is not None):
            output = self.model(*inputs.args, **inputs.kwargs)
        targets = [z for z in output_tensors(output) if z.requires_grad]
        if not targets:
            raise ValueError(
                "The model's output holds no floating tensor of shape [N, ...] that depends on its parameters, so its response cannot be "
                "probed. Return the network's outputs (logits) from forward, or use estimator='loss'."
            )
        noise = [torch.randn(z.shape, device=z.device, dtype=torch.float32).to(z.dtype) for z in targets]
        return self.gradients(targets, noise, parameters), predictions(targets)


def _returned_gradients(targets: Sequence[Tensor], noise: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(targets, parameters, noise, allow_unused=True))


def _accumulated_gradients(targets: Sequence[Tensor], noise: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The same by ``backward()``, all that reentrant checkpoints know; ``.grad`` is put back."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        torch.autograd.backward(targets, noise)
        return [p.grad for p in parameters]
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
