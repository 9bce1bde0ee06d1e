"""Ways to the same number, the response m_W·M of every parameter; those that watch the model stand behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, LayerNorm, Module, RMSNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from backmatch import layers, scale
from backmatch.observer import OUTPUT, GradObserver, InputObserver
from backmatch.probe import Inputs, squared_response_gradients

EstimatorName = Literal["gradient", "probe", "rules", "loss"]
"""Where responses come from. ``gradient`` is no :class:`Estimator`: it needs nothing but the gradients of every step."""
Per = Literal["tensor", "unit"]

_RESOLVE_UNITS = ("gradient", "probe")
_NORMS = (LayerNorm, RMSNorm)


class Estimator(ABC):
    """Watches training forwards through its observer and turns what it saw into responses."""

    observer: InputObserver | GradObserver

    @abstractmethod
    def responses(self, seed: int) -> dict[str, Tensor] | None:
        """Parameter name → response, broadcastable against the parameter; None if no training step was seen, empty if none was finite.

        Nothing is observed on the way; the caller sets ``observer.active`` for the next step.
        """


class Probe(Estimator):
    """Equation 5 on the first ``samples`` samples of the latest batch: one extra forward and backward pass per refresh."""

    def __init__(self, model: Module, *, per: Per, samples: int) -> None:
        self._model = model
        self._per = per
        self.observer: InputObserver = InputObserver(model, samples)

    def responses(self, seed: int) -> dict[str, Tensor] | None:
        inputs = self.observer.take()
        if inputs is None:
            return None
        self.observer.active = False
        with _naming_samples(inputs):
            squares = squared_response_gradients(self._model, inputs, seed=seed)
        dims = unit_dims(self._model) if self._per == "unit" else {}  # anew: layers come and go
        return {name: mean_over(square, dims.get(name)) for name, square in squares.items()}


class Rules(Estimator):
    """Equation 3's closed forms along the graph, on the first ``samples`` samples of the latest batch."""

    def __init__(self, model: Module, *, samples: int) -> None:
        self._model = model
        self.observer: InputObserver = InputObserver(model, samples)

    def responses(self, seed: int) -> dict[str, Tensor] | None:
        inputs = self.observer.take()
        if inputs is None:
            return None
        self.observer.active = False
        # Describing a model on such a batch is an error; training on it is a step that is skipped.
        if not all(leaf.isfinite().all() for leaf in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, Tensor)):
            return {}
        with _naming_samples(inputs):
            return scale.responses(self._model, *inputs.args, **inputs.kwargs)


class Loss(Estimator):
    """The step's own backward: ``m_W · mean(δ_b²) / mean(δ_B²)``, free, biased by the direction of δ_B.

    m_W comes from the layer's rule, per prediction of the network's output (a layer may see samples and positions merged), δ_b from its
    grad_output, δ_B from that of the model's output.
    """

    def __init__(self, model: Module) -> None:
        owners = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
        # Those that are frozen now may be trained later.
        self._layers = {name: module for name, module in owners.items() if layers.is_known(module)}
        for name, module in owners.items():
            if name not in self._layers and any(p.requires_grad and p.numel() for p in module.parameters(recurse=False)):
                owned = ", ".join(f"'{name}.{key}'".replace("'.", "'") for key, _ in module.named_parameters(recurse=False))
                raise NotImplementedError(
                    f"Layer '{name}' ({type(module).__name__}) has no rule, so the response of {owned} is not known to "
                    f"estimator='loss'. Use estimator='probe', or give it one with backmatch.layers.register. "
                    f"Known: {', '.join(layers.known_layers())}."
                )
        self._model = model
        self.observer: GradObserver = GradObserver(model, self._layers)

    def responses(self, seed: int) -> dict[str, Tensor] | None:
        seen = self.observer.take()
        self.observer.active = False
        if seen.keys().isdisjoint(self._layers) or not any(moment.count for _, moment in seen.get(OUTPUT, [])):
            return None
        # A step that a GradScaler skipped leaves its calls, which overflowed, to the next.
        calls = {name: [(x, moment) for x, moment in pairs if moment.count and moment.is_finite()] for name, pairs in seen.items()}
        outputs = [moment for _, moment in calls[OUTPUT]]
        if not outputs:
            return {}
        top = sum(moment.total for moment in outputs) / sum(moment.count for moment in outputs)
        found: dict[str, Tensor] = {}
        names = {p: name for name, p in self._model.named_parameters()}  # anew: parameters may have been replaced
        count = sum(moment.predictions for moment in outputs)  # of all micro-batches
        for name, layer in self._layers.items():
            owned = dict(layer.named_parameters(recurse=False))  # a parametrized weight is none
            for x, moment in calls.get(name, []):
                for key, curvature in layers.curvature(layer, x, name=name).items():
                    if key in owned:
                        parameter = names[owned[key]]
                        found[parameter] = found.get(parameter, 0.0) + curvature * (x.shape[0] / count) * moment.mean() / top
        return found


@contextmanager
def _naming_samples(inputs: Inputs) -> Iterator[None]:
    """What a forward does not take here is no fault of the batch, which went through, but of what is kept of it.

    BatchNorm refuses one value per channel; a mask of as many positions as the batch has samples is cut like those.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"Invalid samples: {inputs.samples}. Must be more to measure a layer that normalises over the batch ({error}); "
            "or use estimator='gradient'."
        ) from error
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"Measuring failed, on the first {inputs.samples} of the batch in every tensor that is as long as the batch: {error}. If one "
            "of those has no samples (a mask, say), set samples to the size of the batch, or use estimator='gradient'."
        ) from error


def make_estimator(name: Literal["probe", "rules", "loss"], model: Module, *, per: Per, samples: int) -> Estimator:
    """The estimator called ``name``, with its hooks on ``model``.

    Args:
        name: ``probe`` (eq. 5), ``rules`` (closed forms along the graph) or ``loss`` (the step's own backward).
        model: The network.
        per: One response per ``tensor``, or per output ``unit``, which ``probe`` alone of these resolves.
        samples: Samples of a batch that ``rules`` and ``probe`` use.

    Raises:
        ValueError: If a name is not known, or ``per`` does not go with the estimator.
        NotImplementedError: If ``loss`` meets a layer that has parameters and no rule.
    """
    check_estimator(name, per)
    if name == "probe":
        return Probe(model, per=per, samples=samples)
    return Rules(model, samples=samples) if name == "rules" else Loss(model)


def default_per(name: EstimatorName) -> Per:
    """As fine as the estimator resolves."""
    return "unit" if name in _RESOLVE_UNITS else "tensor"


def check_estimator(name: EstimatorName, per: Per) -> None:
    """Raise ValueError if a name is not known, or ``per`` does not go with the estimator."""
    for label, value, known in (("estimator", name, get_args(EstimatorName)), ("per", per, get_args(Per))):
        if value not in known:
            raise ValueError(f"Invalid {label}: {value!r}. Must be one of {', '.join(known)}.")
    if per == "unit" and name not in _RESOLVE_UNITS:
        raise ValueError(
            f"Invalid per: 'unit' with estimator={name!r}, which knows one response per tensor. "
            f"Use per='tensor', or estimator={' or '.join(map(repr, _RESOLVE_UNITS))}."
        )


def unit_dims(model: Module) -> dict[str, int]:
    """Parameter name → the dimension that counts its output units; vectors (biases, norm weights) and what has no elements are left out.

    Dimension 0, but 1 in transposed convolutions, whose weight is ``[c_in, c_out / groups, ...]``, and in the Conv1D of Hugging Face's
    GPT models, ``[d_in, d_out]``. A normalisation's weight has one entry per input, of whatever shape: a vector.
    """
    transposed = {id(p) for module in model.modules() for p in _transposed_weights(module)}
    factors = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)}
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.numel() and id(p) not in factors}
    return {name: int(id(p) in transposed) for name, p in matrices.items()}


def _transposed_weights(module: Module) -> list[Tensor]:
    """The parameters, shaped ``[inputs, outputs, ...]``, that are the module's weight or that it is computed of.

    Not the computed one: to look at it would compute it, which changes the buffers of a spectral norm.
    """
    layer: Any = module
    if isinstance(module, _ConvTransposeNd):
        outputs = layer.out_channels // layer.groups
    elif _is_hugging_face_conv1d(module):
        outputs = layer.nf
    else:
        return []
    found = [p for name, p in layer.named_parameters(recurse=False) if name.startswith("weight")]
    if is_parametrized(layer, "weight"):
        found += layer.parametrizations["weight"].parameters(recurse=False)
    return [p for p in found if p.ndim > 1 and p.shape[1] == outputs]


def _is_hugging_face_conv1d(module: Module) -> bool:
    # By name: transformers need not be installed, and takes seconds to import.
    return any((base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D") for base in type(module).__mro__)


def fan_ins(model: Module) -> dict[str, int]:
    """Parameter name → inputs that drive one of its output units at a time; vectors and what has no elements are left out.

    The entries of one output unit; but 1 for a table that is only looked up, a linear layer on one-hot inputs: its outputs have the
    size of its entries, however many rows it has.
    """
    dims = unit_dims(model)
    owners: dict[int, list[Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(module)
    # Every group of a transposed convolution has its own inputs and the whole of dimension 1 for outputs.
    groups = {id(p): m.groups for m in model.modules() if isinstance(m, _ConvTransposeNd) for p in _transposed_weights(m)}
    return {
        name: 1
        if all(isinstance(owner, (Embedding, EmbeddingBag)) for owner in owners[id(p)])
        else p.numel() // (p.shape[dims[name]] * groups.get(id(p), 1))
        for name, p in model.named_parameters()
        if name in dims
    }


def mean_over(square: Tensor, unit_dim: int | None) -> Tensor:
    """Mean over all elements, 0-dim, or over those of each output unit, broadcastable against ``square``."""
    if unit_dim is None:
        return square.mean()
    return square.mean(dim=[d for d in range(square.ndim) if d != unit_dim], keepdim=True)
