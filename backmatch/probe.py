"""Equation 5: the response of every parameter from one backward pass of white noise, for any architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call, and the autocast state it ran under."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None = None


def first_samples(inputs: Inputs, samples: int) -> Inputs:
    """Keep the first ``samples`` samples of every tensor whose leading dimension is the batch.

    The batch size is the leading dimension of the first tensor; tensors of another leading dimension (masks,
    positions) are kept whole. Views are returned, outside the graph.
    """
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    batch = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0), 0)
    kept = [
        (leaf[:samples] if leaf.ndim > 0 and leaf.shape[0] == batch else leaf).detach() if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(kept, spec)
    return Inputs(args, kwargs, inputs.autocast)


def squared_response_gradients(model: Module, inputs: Inputs, *, seed: int) -> dict[str, Tensor]:
    r"""One draw of equation 5 for every element of every trainable parameter.

    With v ~ N(0, I), independent for every sample i and output element, ``u = ∂(Σ_i v_iᵀ z_B^(i)) / ∂θ`` has

        E[u²] = Σ_i ‖∂z_B^(i) / ∂θ‖²    so    E[u²] / N = m_W·M    (docs/derivation.md eq. 5)

    exactly, cross terms, shared weights and skip connections included. Sampled with a generator seeded by ``seed``,
    so that a resumed run draws what the uninterrupted one drew. The model is left as it was: buffers (running
    statistics) are updated on copies, ``.grad`` is not touched, the random state is restored. Forward hooks of the user are called.

    Args:
        model: The network; run in its present mode.
        inputs: One batch, N samples.
        seed: Seed of v and of random layers such as dropout.

    Returns:
        Parameter name → u²/N of the parameter's shape, in float32 or wider, in (output unit / parameter unit)²;
        zero for a parameter that this output does not depend on.

    Raises:
        ValueError: If the output holds no floating tensor with a batch dimension that depends on the parameters.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    devices = {p.device for p in parameters.values() if p.device.type != "cpu"}
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        output = _forward(model, buffers, inputs)
        targets = [z for z in pytree.tree_leaves(output) if isinstance(z, Tensor) and z.requires_grad and z.ndim > 0]
        if not targets:
            raise ValueError(
                "The model's output holds no floating tensor of shape [N, ...] that depends on its parameters, so its response cannot be "
                "probed. Return the network's outputs (logits) from forward, or use estimator='loss'."
            )
        noise = [torch.randn(z.shape, device=z.device, dtype=torch.float32).to(z.dtype) for z in targets]
        grads = torch.autograd.grad(targets, list(parameters.values()), noise, allow_unused=True, materialize_grads=True)
    # Not the output's first dimension: language models merge samples and positions there.
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    count = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0), targets[0].shape[0])
    return {name: _wide(grad).square() / count for name, grad in zip(parameters, grads, strict=True)}


def _forward(model: Module, buffers: Mapping[str, Tensor], inputs: Inputs) -> Any:
    if inputs.autocast is None:
        return torch.func.functional_call(model, dict(buffers), inputs.args, inputs.kwargs)
    device_type, dtype = inputs.autocast
    with torch.autocast(device_type, dtype):
        return torch.func.functional_call(model, dict(buffers), inputs.args, inputs.kwargs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
