"""Gradients told to a listener as they pass through a network, out of the middle of a compiled graph too."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Listener:
    """Hears gradients in the backward pass.

    A tensor's hook ends a graph of ``torch.compile``, which cannot look into what happens there. So within such a graph the tensor
    goes through an operator that is the identity, and whose backward is opaque: the graph stays whole, at the price of
    a copy of the tensor and of its gradient.

    Args:
        hear: Takes the note and the gradient of a tensor.
    """

    def __init__(self, hear: Callable[[Tensor, Tensor], None]) -> None:
        self.hear = hear
        self._key = next(_keys)
        _listeners[self._key] = self

    def follow(self, tensor: Tensor, note: Tensor) -> Tensor:
        """``tensor``, to be used in its place, whose gradient will be heard together with ``note``."""
        if torch.compiler.is_compiling():
            return _followed(tensor, note, self._key)
        if tensor.is_leaf:  # a parameter, whose hooks would outlast the pass and hear every other use of it
            return tensor
        tensor.register_hook(lambda grad: self.hear(note, grad))
        return tensor


_keys = count()
# A graph outlives the optimizer it was compiled for; listeners do not.
_listeners: WeakValueDictionary[int, Listener] = WeakValueDictionary()


# A CUDA graph would replay kernels and call no listener.
_OUTSIDE: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("backmatch::followed", mutates_args=())
def _followed(tensor: Tensor, note: Tensor, key: int) -> Tensor:
    return tensor.clone()


@torch.library.custom_op("backmatch::heard", mutates_args=(), **_OUTSIDE)
def _heard(grad: Tensor, note: Tensor, key: int) -> Tensor:
    if (listener := _listeners.get(key)) is not None:
        listener.hear(note, grad)
    return grad.clone()


@_followed.register_fake
@_heard.register_fake
def _like(tensor: Tensor, note: Tensor, key: int) -> Tensor:
    return torch.empty_like(tensor)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, note, ctx.key = inputs
    ctx.save_for_backward(note)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _heard(grad, *ctx.saved_tensors, ctx.key), None, None


_followed.register_autograd(_backward, setup_context=_remember)
