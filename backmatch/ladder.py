"""The ladder: gradients matched through the local Hessians of every layer, scalar, one-sided or two-sided (eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from backmatch import layers
from backmatch.checks import check_in
from backmatch.contract import Part, check_whole, wide
from backmatch.kron import inverse_power, matched
from backmatch.observer import GradMoment, MomentObserver, Moments, Observer
from backmatch.optimizer import BackMatchSGD
from backmatch.pace import follow
from backmatch.step import orthogonalised

Match = Literal["scalar", "gram", "kron"]
Length = Literal["plain", "rms", "spectral"]

_SIZE = 0.5
"""Root mean square of a matched step at a learning rate of 1, relative to 1/√n. Of n inputs: entries of 1/√n keep the variance."""
_REST = 0.1
"""Learning rate of what is not matched, relative to that of what is: momentum adds up paced steps there, and is part of the length here."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that is matched: its weight, then its bias if that is trained with it and so has a row in A.

    Attributes:
        name: Its path in the model.
        params: The weight, and the bias.
    """

    name: str
    params: tuple[Tensor, ...]

    @property
    def weight(self) -> Tensor:
        return self.params[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that A and B belong to, the bias its last column."""
        return self.weight.shape[0], self.weight[0].numel() + len(self.params) - 1


class BackMatch(BackMatchSGD):
    r"""Gradients matched through a layer's local Hessians, one rung above another (docs/derivation.md section 4).

    For a layer with weight W (bias appended as a column), momentum buffer b and gradient G, at learning rate γ,

        b ← μ b + G,   U = G + μ b          Nesterov momentum, before matching
        X = B^(−p) U A^(−p)                 eq. 6 at p = 1, damped
        W ← (1 − γλ) W − γ φ(X)             at the length that ``step`` says

    with ``A = E[ã ãᵀ]`` of the layer's inputs, a 1 for the bias appended, and ``B = E[δ δᵀ]`` of its output's gradients, both moving
    averages over the steps at which :func:`backmatch.contract.is_due`.

    | ``match`` | A | B |
    |---|---|---|
    | ``scalar`` | its mean eigenvalue | its mean eigenvalue |
    | ``gram`` | in full | its mean eigenvalue |
    | ``kron`` | in full | in full |

    | ``step`` | φ(X) |
    |---|---|
    | ``plain`` | X |
    | ``rms`` | X scaled to a root mean square of w |
    | ``spectral`` | X with all its singular values made equal, scaled likewise |

    ``w = ½/√n`` for n inputs, as entries of ``1/√n`` keep the variance of what passes through. It does not follow the weights: a step
    that always has its full length relative to them would let them grow without end.

    Linear, Conv1d and Conv2d layers (one group) are matched where their weight belongs to one layer. All else (embeddings, whose A is
    diagonal, norms, tied weights, recurrent and bare parameters) follows the rule of :class:`backmatch.optimizer.BackMatchSGD` with
    responses read off gradients, at a tenth of lr: one lr serves both. See :meth:`rules`.

    Args:
        model_or_params: As for :class:`backmatch.optimizer.BackMatchSGD`; the network itself is needed, here or as ``model``.
        lr: Learning rate γ; a tensor of one element too.
        model: The network that owns the parameters, where they are given themselves.
        match: ``scalar``, ``gram`` or ``kron``.
        step: ``plain``, ``rms`` or ``spectral``.
        momentum: μ in [0, 1).
        nesterov: Whether momentum looks ahead; needs momentum above 0.
        weight_decay: λ, decoupled.
        maximize: Whether to climb.
        power: p in [0, 1].
        damping: Added to A and B, relative to their mean eigenvalue.
        interval: K, steps from one measurement of A and B, and of their powers, to the next; early in a run more often.
        beta: Weight of the old averages.
        rows: Positions of a step that A and B are measured on, at most about; large feature maps are sampled.
        widest: A and B of more rows than this are cut into diagonal blocks, so that memory grows linearly with the width.

    Raises:
        TypeError: If no model is given, or a setting is not of its type.
        ValueError: If a setting is out of range, or the model has no trainable parameter.
        NotImplementedError: If several ranks train together.
    """

    def __init__(
        self,
        model_or_params: Module | Iterable[Any],
        lr: float | Tensor = 0.05,
        *,
        model: Module | None = None,
        match: Match = "kron",
        step: Length = "spectral",
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.05,
        maximize: bool = False,
        power: float = 0.5,
        damping: float = 0.1,
        interval: int = 10,
        beta: float = 0.9,
        rows: int = 4096,
        widest: int = 1024,
    ) -> None:
        for label, value, known in (("match", match, get_args(Match)), ("step", step, get_args(Length))):
            if value not in known:
                raise ValueError(f"Invalid {label}: {value!r}. Must be one of {', '.join(known)}.")
        check_in("power", power, 0.0, 1.0, high_open=False)
        check_in("damping", damping, 0.0)
        check_whole("rows", rows)
        check_whole("widest", widest)
        self.match, self.length = match, step
        self.exponent, self.damping, self.rows, self.widest = power, damping, rows, widest
        given = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(model_or_params, model=model, interval=interval, beta=beta, **given)  # type: ignore[arg-type]

    _matched: dict[str, _Layer] = {}  # noqa: RUF012 (replaced, never changed)
    _kept = BackMatchSGD._kept | {"match", "length", "exponent", "damping", "rows", "widest", "_matched", "_in_layers"}

    def rules(self) -> dict[str, str]:
        """Parameter name → the rule it follows."""
        return {
            name: f"{self.match}, {self.length}" if p in self._in_layers else "a pace read off its gradients, at lr / 10"
            for p, name in self._names().items()
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters from now on; layers among them are matched, and known ones stay as they are."""
        super().add_param_group(param_group)
        if self.__dict__.get("_observer") is not None:
            self.detach()
            self._observer = self._observe()
            self._wake_observer(self.param_groups[0]["step"])

    def _layers(self) -> list[_Layer]:
        """The layers that are matched now: those whose weight is optimized, theirs alone, and multiplies rows."""
        assert self._model is not None
        optimized = {p for group in self.param_groups for p in group["params"]}
        owners: dict[Tensor, int] = {}
        for module in self._model.modules():
            for p in module.parameters(recurse=False):
                owners[p] = owners.get(p, 0) + 1
        found = []
        for name, module in self._model.named_modules():
            weight = module._parameters.get("weight")  # no parametrization, whose weight is computed
            if weight is None or weight not in optimized or owners[weight] > 1 or not weight.numel() or not layers.takes_rows(module):
                continue
            bias = module._parameters.get("bias")
            joint = bias is not None and bias in optimized and owners[bias] == 1
            found.append(_Layer(name, (weight, bias) if joint else (weight,)))
        return found

    def _observe(self) -> Observer | None:
        self._estimator = None
        self._changes: dict[Tensor, Tensor] = {}
        if self._model is None:
            raise TypeError("Invalid model: None. BackMatch measures layers: give the network first, or as model=.")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise NotImplementedError(
                f"BackMatch does not yet average A and B over ranks, of which there are {torch.distributed.get_world_size()}. "
                "Use BackMatchSGD, or train in one process."
            )
        self._matched = {layer.name: self._matched.get(layer.name, layer) for layer in self._layers()}
        self._in_layers = {p for layer in self._matched.values() for p in layer.params}
        return MomentObserver(
            self._model,
            {name: self._model.get_submodule(name) for name in self._matched},
            with_bias={name for name, layer in self._matched.items() if len(layer.params) > 1},
            input_blocks=self._blocks if self.match != "scalar" else _mean_only,
            output_blocks=self._blocks if self.match == "kron" else _mean_only,
            limit=self.rows,
        )

    def _blocks(self, width: int) -> int:
        return -(-width // self.widest)

    def _initialise(self, p: Tensor, state: dict[str, Any]) -> None:
        if p not in self._in_layers:
            super()._initialise(p, state)
        elif "pace" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["pace"] = torch.ones((), device=p.device, dtype=wide(p.dtype))

    def _refresh(self, seed: int) -> None:
        if not isinstance(self._observer, MomentObserver):
            return
        seen, top = self._observer.take()
        if not seen:
            self._warn(
                "BackMatch saw no sample go through its layers in training mode since the last step, so A and B stay as they are. "
                "Build it on the model that you call, before the first call (and before torch.compile), and call model.train()."
            )
        for name, moments in seen.items():
            if moments.count and top.count:
                self._measure(self._matched[name], moments, top)

    def _measure(self, layer: _Layer, moments: Moments, top: GradMoment) -> None:
        """Average A and B of one layer, and take their powers."""
        state = self.state[layer.weight]
        # Of the batch's positions that share W (eq. 2), per prediction; δ in units of the loss's own (section 4).
        new = {
            "input": torch.as_tensor(moments.inputs * (moments.positions / (moments.count * top.predictions))),
            "output": torch.as_tensor(moments.outputs / (moments.count * top.mean())),
        }
        ok = torch.stack([moment.isfinite().all() for moment in new.values()]).all()
        if any(f"{side}_moment" not in state or state[f"{side}_moment"].shape != moment.shape for side, moment in new.items()):
            state["measurements"] = torch.zeros((), device=layer.weight.device)
            for side, moment in new.items():
                state[f"{side}_moment"] = torch.zeros_like(moment)
                state[f"{side}_power"] = (
                    torch.eye(moment.shape[-1]).to(moment).expand_as(moment) if moment.ndim else torch.ones_like(moment)
                )
        for (side, moment), size in zip(new.items(), layer.shape[::-1], strict=True):
            count = state["measurements"].clone()
            follow(state[f"{side}_moment"], count, moment, ok, beta=self.beta)
            settings = {"power": self.exponent, "damping": self.damping, "previous": state[f"{side}_power"]}
            state[f"{side}_power"] = inverse_power(state[f"{side}_moment"], size, **settings)
        state["measurements"].add_(ok)

    def _follow(self, parts: list[Part], finite: Tensor) -> None:
        super()._follow([_without(part, self._in_layers) for part in parts], finite)
        ahead: dict[Tensor, Tensor] = {}
        for part in parts:
            momentum, nesterov = part.group["momentum"], part.group["nesterov"]
            for p, grad, state in zip(part.params, part.grads, part.states, strict=True):
                if p in self._in_layers:
                    buffer = state["momentum_buffer"]
                    buffer.mul_(_or_one(momentum, p, finite)).add_(grad.masked_fill(~finite.to(p.device), 0.0))
                    ahead[p] = grad + momentum * buffer if nesterov else buffer
        self._changes = {}
        for layer in self._matched.values():
            if any(p in ahead for p in layer.params):
                self._changes |= self._change(layer, ahead)

    def _change(self, layer: _Layer, ahead: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``w · φ(X)`` of one layer's weight and bias; what has no gradient brings zeros."""
        weight, state = layer.weight, self.state.get(layer.weight, {})
        columns = [ahead.get(p, torch.zeros_like(p)).reshape(len(p), -1) for p in layer.params]
        change = torch.cat(columns, dim=1).to(wide(weight.dtype))
        if "input_power" in state:
            change = matched(change, state["input_power"], state["output_power"])
        tiny = torch.finfo(change.dtype).tiny
        if self.length != "plain":
            change = change / change.abs().max().clamp_min(tiny)  # squares of small numbers would be lost
        if self.length == "spectral":
            change = orthogonalised(change)
        pieces = list(change.split([column.shape[1] for column in columns], dim=1))
        if self.length != "plain":
            size = _SIZE / math.sqrt(weight[0].numel())
            mean_square = pieces[0 if weight in ahead else 1].square().mean()
            pieces = [piece / mean_square.sqrt().clamp_min(tiny) * size for piece in pieces]
        return {p: piece.reshape(p.shape) for p, piece in zip(layer.params, pieces, strict=True)}

    def _update(self, part: Part, finite: Tensor) -> None:
        rest = _without(part, self._in_layers)
        if rest.params:
            super()._update(replace(rest, lr=part.lr * _REST), finite)
        for p in part.params:
            if p in self._changes:
                change = self._changes.pop(p).to(p.dtype).masked_fill(~finite.to(p.device), 0.0) * (-1.0 if part.group["maximize"] else 1.0)
                p.mul_(_or_one(1.0 - part.lr * part.group["weight_decay"], p, finite))
                p.sub_(change * part.lr)


def _without(part: Part, params: set[Tensor]) -> Part:
    """What of a group's share is not in ``params``."""
    kept = [i for i, p in enumerate(part.params) if p not in params]
    return Part(
        part.group,
        [part.params[i] for i in kept],
        [part.grads[i] for i in kept],
        [part.states[i] for i in kept],
        [part.norms[i] for i in kept],
        part.lr,
    )


def _or_one(factor: float | Tensor, p: Tensor, finite: Tensor) -> Tensor:
    """``factor`` on the parameter's device and wide enough for it; 1 where the step is not finite."""
    one = torch.ones((), device=p.device, dtype=wide(p.dtype))
    return torch.where(finite.to(p.device), one * factor, one)


def _mean_only(width: int) -> int:
    return 0
