"""The ladder: gradients matched through the local Hessians of every layer, scalar, one-sided or two-sided (eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from backmatch import distributed
from backmatch.checks import check_in
from backmatch.contract import Part, check_whole, wide
from backmatch.distributed import local
from backmatch.kron import inverse_powers, is_without_waiting, mean_eigenvalue, moment_shape
from backmatch.matching import Length, MatchedLayer, changes, matched_layers
from backmatch.notice import warn_user
from backmatch.observer import GradMoment, MomentObserver, Moments, Observer
from backmatch.optimizer import BackMatchSGD
from backmatch.pace import follow_each
from backmatch.replay import Replay, places_of
from backmatch.step import Factors, kinds_of, look_ahead, move

Match = Literal["scalar", "gram", "kron"]

_REST = 0.1
"""Learning rate of what is not matched, relative to that of what is: momentum adds up paced steps there, and is part of the length here."""


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
    that always has its full length relative to them would let them grow without end. The bias, a column of X, has the scale of its
    weight, up to a root mean square of ½: beside small inputs it would go without bound.

    Linear, Conv1d and Conv2d layers (one group) are matched where their weight belongs to one layer. A convolution whose windows overlap
    has an A of its channels, the same at every tap, and no row for its bias. All else (such biases, embeddings, whose A is diagonal, norms,
    tied weights, recurrent and bare parameters) follows the rule of :class:`backmatch.optimizer.BackMatchSGD` with responses read off
    gradients, at a tenth of lr: one lr serves both. See :meth:`rules`.

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
        rows: Positions of one call of a layer, on every rank, that A and B are measured on, at most about; large feature maps are sampled.
        widest: A and B of more rows than this are cut into diagonal blocks, so that memory grows linearly with the width.
        cuda_graph: As for :class:`backmatch.optimizer.BackMatchSGD`. With power 0.5 a measurement is a graph too, for which what was
            summed up for A and B is kept once more.

    Raises:
        TypeError: If no model is given, or a setting is not of its type.
        ValueError: If a setting is out of range, or the model has no trainable parameter.
        NotImplementedError: If parameters are sharded over more than one mesh, or along more than one dimension.
    """

    def __init__(
        self,
        model_or_params: Module | Iterable[Any],
        lr: float | Tensor = 0.05,
        *,
        model: Module | None = None,
        match: Match = "kron",
        step: Length = "spectral",
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.05,
        maximize: bool = False,
        power: float = 0.5,
        damping: float = 0.1,
        interval: int = 20,
        beta: float = 0.9,
        rows: int = 1024,
        widest: int = 384,
        cuda_graph: bool = False,
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
        given = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "decay_floor": 0.0}
        kept = {"interval": interval, "beta": beta, "cuda_graph": cuda_graph, "max_stretch": math.inf}
        super().__init__(model_or_params, model=model, maximize=maximize, **given, **kept)  # type: ignore[arg-type]

    _matched: dict[str, MatchedLayer] = {}  # noqa: RUF012 (replaced, never changed)
    _changes: dict[Tensor, Tensor]
    _kept = BackMatchSGD._kept | {"match", "length", "exponent", "damping", "rows", "widest", "_matched", "_layer_of"}

    def rules(self) -> dict[str, str]:
        """Parameter name → the rule it follows."""
        return {
            name: f"{self.match}, {self.length}" if p in self._layer_of else "a pace read off its gradients, at lr / 10"
            for p, name in self._names().items()
        }

    def _observe(self) -> Observer | None:
        if self._model is None:
            raise TypeError("Invalid model: None. BackMatch measures layers: give the network first, or as model=.")
        self._find_layers()
        return MomentObserver(
            self._model,
            {name: self._model.get_submodule(name) for name in self._matched},
            with_bias={name for name, layer in self._matched.items() if len(layer.params) > 1},
            # Not methods: a cycle would keep the hooks until the garbage is collected.
            input_blocks=partial(_blocks, self._widest["input"]),
            output_blocks=partial(_blocks, self._widest["output"]),
            limit=self.rows,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["decay_floor"] > 0.0:
            raise ValueError(f"Invalid decay_floor: {group['decay_floor']}. BackMatch decays all weights alike: leave it out.")
        if group["max_stretch"] < math.inf:
            raise ValueError(f"Invalid max_stretch: {group['max_stretch']}. BackMatch has step='spectral' for that: leave it out.")

    def _foreign(self, state_dict: dict[str, Any]) -> str:
        if any(group.get("max_stretch", math.inf) < math.inf for group in state_dict["param_groups"]):
            return "its steps are held to max_stretch"
        floors = {group.get("decay_floor", 0.0) for group in state_dict["param_groups"]} - {0.0}
        return f"its weight decay ends at decay_floor {max(floors)}" if floors else ""

    def _find_layers(self) -> None:
        assert self._model is not None
        optimized = {p for group in self.param_groups for p in group["params"]}
        self._matched = matched_layers(self._model, optimized, widest=self.widest)
        self._layer_of = {p: layer for layer in self._matched.values() for p in layer.params}

    @property
    def _widest(self) -> dict[str, int | None]:
        """Rows of a block of A and of B, at most; None for their mean eigenvalue alone."""
        return {"input": None if self.match == "scalar" else self.widest, "output": self.widest if self.match == "kron" else None}

    def _moment_shapes(self, layer: MatchedLayer) -> dict[str, tuple[int, ...]]:
        return {side: moment_shape(width, _blocks(self._widest[side], width)) for side, width in layer.widths.items()}

    def _initialise(self, p: Tensor, state: dict[str, Any]) -> None:
        layer = self._layer_of.get(p)
        if layer is None:
            if "momentum_buffer" in state and "response" not in state:
                state["momentum_buffer"].zero_()  # of gradients as they were, from a checkpoint of when this was matched
            super()._initialise(p, state)
            return
        if "pace" not in state or state.pop("response", None) is not None:  # one is of when this was not matched
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["pace"] = torch.ones((), device=p.device, dtype=wide(p.dtype))
        # Who shards the weights shards the factors too: only the owner keeps them.
        if p is layer.weight and (layer.is_mine or not layer.is_sharded):
            shapes = self._moment_shapes(layer)
            if any(f"{side}_moment" not in state or state[f"{side}_moment"].shape != shape for side, shape in shapes.items()):
                state["measurements"] = torch.zeros((), device=p.device)
                for side, shape in shapes.items():
                    state[f"{side}_moment"] = torch.zeros(shape, device=p.device, dtype=wide(p.dtype))
                    eye = torch.eye(shape[-1]) if shape else torch.ones(())
                    state[f"{side}_power"] = eye.to(state[f"{side}_moment"]).expand(shape).clone()

    def _needs_size(self, p: Tensor) -> bool:
        return p not in self._layer_of and super()._needs_size(p)

    def _refresh(self, seed: int) -> None:
        if not isinstance(self._observer, MomentObserver):
            return
        self._find_layers()  # fully_shard and the like put new parameters in place of old ones
        seen, top, whole = self._sums_over_ranks(*self._observer.take(), self._is_whole())
        if self._matched and not seen:
            warn_user(
                "BackMatch saw no sample go through its layers in training mode since the last step, or no gradient come back to them, "
                "so A and B stay as they are. " + self._when_unseen
            )
        elif self.length == "plain" and not top.count:
            warn_user(
                "BackMatch saw no gradient come back to the model's output since the last step, so A and B stay as they are: "
                "lengths of step='plain' are relative to it. Call the model that it was built on, and take the loss of what that returns, "
                "outside of forward; or choose step='spectral' or 'rms', which need neither."
            )
            seen = {}
        else:
            self._tell_of_unseen(seen)
        measured = [layer for name, layer in self._matched.items() if name in seen and seen[name].count]
        for layer in measured:
            self._initialise(layer.weight, self.state[layer.weight])
        if self._is_measured_by_graph(measured, seen):
            self._replay_measurement(measured, seen, top, whole)
            return
        kept = [layer for layer in measured if layer.is_mine or not layer.is_sharded]
        for device in {layer.weight.device: None for layer in kept}:
            self._average([layer for layer in kept if layer.weight.device == device], seen, top, whole)
        self._invert([layer for layer in measured if layer.is_mine])
        self._share_powers([layer for layer in measured if not layer.is_sharded])

    def _is_measured_by_graph(self, measured: list[MatchedLayer], seen: Mapping[str, Moments]) -> bool:
        """Whether to take up a measurement never has the host wait, all is on one GPU, and it is asked for."""
        if not self.cuda_graph or not measured or distributed.ranks() > 1 or any(layer.is_sharded for layer in measured):
            return False
        if len({layer.weight.device for layer in measured}) > 1:
            return False
        sums = [value for layer in measured for value in (seen[layer.name].inputs, seen[layer.name].outputs)]
        if not all(isinstance(value, Tensor) and value.is_cuda for value in sums) or torch.cuda.is_current_stream_capturing():
            return False
        held = [self.state[layer.weight][f"{side}_moment"] for layer in measured for side in layer.widths]
        return all(is_without_waiting(moment, self.exponent, self.damping) for moment in held)

    def _replay_measurement(self, measured: list[MatchedLayer], seen: Mapping[str, Moments], top: GradMoment, whole: Tensor) -> None:
        """:meth:`_average` and :meth:`_invert` as a graph."""
        self._replay = self._replay or Replay()
        device, moments = measured[0].weight.device, [seen[layer.name] for layer in measured]
        values = [value for m in moments for value in (m.inputs, m.outputs)] + [top.total, top.predictions, whole]
        inputs = [value.to(device) for value in values if isinstance(value, Tensor)]

        def work(inputs: Sequence[Tensor]) -> None:
            read = iter(inputs)
            found = {layer.name: replace(m, inputs=next(read), outputs=next(read)) for layer, m in zip(measured, moments, strict=True)}
            total, predictions = (next(read) if isinstance(value, Tensor) else value for value in (top.total, top.predictions))
            self._average(measured, found, replace(top, total=total, predictions=predictions), next(read))
            self._invert(measured)

        counts = [(layer.name, m.count, m.positions) for layer, m in zip(measured, moments, strict=True)]
        held = [value for layer in measured for value in self.state[layer.weight].values() if isinstance(value, Tensor)]
        own = [None if isinstance(value, Tensor) else value for value in (top.total, top.count, top.predictions)]
        self._replay.run("measurement", work, inputs, (counts, own, self.beta, self.exponent, self.damping, places_of(held)))

    def _tell_of_unseen(self, seen: Collection[str]) -> None:
        """Name layers, once, whose weights have a gradient and of which nothing was ever measured."""
        unseen = []
        for name, layer in self._matched.items():
            grad, count = layer.weight.grad, self.state[layer.weight].get("measurements", 0)
            if name not in seen and name not in self._told_of and grad is not None and local(grad).any() and not count:
                unseen.append(name)
        if unseen:
            self._told_of.update(unseen)
            warn_user(
                f"BackMatch saw no sample go through {', '.join(unseen[:5])}{f' and {len(unseen) - 5} more' if len(unseen) > 5 else ''}, "
                "which have gradients: their weights are used without calling them, or their inputs are sparse or nested. "
                "A and B are left at the identity there. Call the layers themselves."
            )

    def _sums_over_ranks(self, seen: dict[str, Moments], top: GradMoment, whole: Tensor) -> tuple[dict[str, Moments], GradMoment, Tensor]:
        """What all ranks saw, by one all-reduce; a rank that did not run a layer brings zeros."""
        if distributed.ranks() == 1 or not self._matched:
            return seen, top, whole
        rows = []
        for name, layer in self._matched.items():
            moments, like = seen.get(name, Moments()), torch.zeros((), device=layer.weight.device, dtype=wide(layer.weight.dtype))
            shapes = self._moment_shapes(layer)
            rows += [like.new_zeros(shapes["input"]) + moments.inputs, like.new_zeros(shapes["output"]) + moments.outputs]
            rows.append(like.new_tensor([moments.count, moments.positions]))
        rows.append(torch.stack([torch.as_tensor(value).to(like) for value in (top.total, top.count, top.predictions, ~whole)]))
        *rows, (total, count, predictions, broken) = distributed.sum_over_ranks(rows)
        found = {
            name: Moments(inputs=inputs, outputs=outputs, count=int(counts[0]), positions=int(counts[1]))
            for name, inputs, outputs, counts in zip(self._matched, rows[::3], rows[1::3], rows[2::3], strict=True)
            if counts[0] > 0
        }
        return found, GradMoment(total=total, count=int(count), predictions=float(predictions)), broken == 0

    def _average(self, measured: list[MatchedLayer], seen: Mapping[str, Moments], top: GradMoment, whole: Tensor) -> None:
        """Take up a measurement of A and B of some layers on one device."""
        states, moments = [self.state[layer.weight] for layer in measured], [seen[layer.name] for layer in measured]
        ok = whole.to(states[0]["measurements"].device)
        # Of the batch's positions that share W (eq. 2), per prediction; δ in units of the loss's own (section 4). Where the loss was not
        # taken of the model's output, A is of one position and B relative to its own mean eigenvalue: a step of given length is the same.
        if top.count:
            unit = torch.as_tensor(top.mean()).to(ok.device)
            predictions = top.predictions.to(ok.device) if isinstance(top.predictions, Tensor) else top.predictions
            inputs = [torch.as_tensor(m.inputs * (m.positions / (m.count * predictions))) for m in moments]
            outputs = [torch.as_tensor(m.outputs) / (m.count * unit) for m in moments]
            units = [unit] * len(states)
        else:
            inputs = [torch.as_tensor(m.inputs / m.count) for m in moments]
            sums = [torch.as_tensor(m.outputs) for m in moments]
            units = [mean_eigenvalue(moment, layer.widths["output"]) for layer, moment in zip(measured, sums, strict=True)]
            outputs = [moment / unit for moment, unit in zip(sums, units, strict=True)]
        averages = [(state["input_moment"], state["output_moment"]) for state in states]
        # Activations may be wider than weights.
        new = [(a.to(mean_a.dtype), b.to(mean_b.dtype)) for a, b, (mean_a, mean_b) in zip(inputs, outputs, averages, strict=True)]
        # By their largest entries, as squares may overflow where no entry does. And relative to an output gradient whose square
        # overflows, the finite B of a layer below would be 0.
        entries = [entry for (a, b), unit in zip(new, units, strict=True) for entry in (a, b, unit.to(b.dtype))]
        ok = ok & torch.stack(torch._foreach_norm(entries, math.inf)).isfinite().view(-1, 3).all(dim=1)
        follow_each(averages, [state["measurements"] for state in states], new, ok, beta=self.beta)

    def _invert(self, layers: list[MatchedLayer]) -> None:
        """Take the powers of A and B anew."""
        places = [(self.state[layer.weight], side) for layer in layers for side in layer.widths]
        found = inverse_powers(
            [state[f"{side}_moment"] for state, side in places],
            [size for layer in layers for size in layer.widths.values()],
            power=self.exponent,
            damping=self.damping,
            previous=[state[f"{side}_power"] for state, side in places],
        )
        for (state, side), power in zip(places, found, strict=True):
            state[f"{side}_power"].copy_(power)

    def _share_powers(self, measured: list[MatchedLayer]) -> None:
        """Every rank has the powers that one of them took."""
        if distributed.ranks() == 1:
            return
        places = [(layer, f"{side}_power") for layer in measured for side in ("input", "output")]
        powers = [self.state[layer.weight][key] for layer, key in places]
        shared = distributed.sum_over_ranks(
            [power if layer.is_mine else torch.zeros_like(power) for power, (layer, _) in zip(powers, places, strict=True)]
        )
        for power, other in zip(powers, shared, strict=True):
            power.copy_(other)

    def _follow(self, parts: list[Part], finite: Tensor) -> None:
        super()._follow([_without(part, self._layer_of) for part in parts], finite)
        ahead: dict[Tensor, Tensor] = {}
        for part in parts:
            ahead |= self._looked_ahead(_picked(part, [i for i, p in enumerate(part.params) if p in self._layer_of]), finite)
        moving = [layer for layer in self._matched.values() if any(p in ahead for p in layer.params)]
        for layer in moving:
            if layer.weight not in ahead:  # only the bias has a gradient
                self._initialise(layer.weight, self.state[layer.weight])
        self._changes = self._sharded_changes([layer for layer in moving if layer.is_sharded], ahead)
        self._changes |= changes([layer for layer in moving if not layer.is_sharded], ahead, self.state, self.length)

    def _looked_ahead(self, part: Part, finite: Tensor) -> dict[Tensor, Tensor]:
        """``b ← μ b + G`` and, of every parameter, ``G + μ b`` (without Nesterov b), in tensors that may be changed."""
        found: dict[Tensor, Tensor] = {}
        for chosen in kinds_of(part.grads):
            grads = [part.grads[i] for i in chosen]
            factors, zero = self._factors(part, grads[0], finite), grads[0].new_zeros(())
            updates = look_ahead(
                [grad.clone() if factors.broken is None else torch.where(factors.broken, zero, grad) for grad in grads],
                [local(part.states[i]["momentum_buffer"]) for i in chosen],
                factors,
                nesterov=part.group["nesterov"],
            )
            found |= {part.params[i]: update for i, update in zip(chosen, updates, strict=True)}
        return found

    def _sharded_changes(self, moving: list[MatchedLayer], ahead: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """This rank's shares of the changes: each is made from whole matrices, by the owner of A and B."""
        if not moving:
            return {}
        owner = {p: layer.owner for layer in moving for p in layer.params if p in ahead}
        params, owners = list(owner), list(owner.values())
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        whole = distributed.to_owners([ahead[p].to(dtype) for p in params], params, owners)
        mine = {params[i]: tensor for i, tensor in whole.items()}
        found = changes([layer for layer in moving if layer.is_mine], mine, self.state, self.length)
        back = {i: found[p].to(dtype) for i, p in enumerate(params) if p in found}
        return dict(zip(params, distributed.from_owners(back, params, owners, ahead[params[0]].to(dtype)), strict=True))

    def _update(self, part: Part, finite: Tensor) -> None:
        rest = _without(part, self._layer_of)
        if rest.params:
            super()._update(replace(rest, lr=part.lr * _REST), finite)
        params = [p for p in part.params if p in self._changes]
        changes = [self._changes.pop(p).to(p.dtype) for p in params]
        for chosen in kinds_of(changes):
            updates = [changes[i] for i in chosen]
            if part.group["maximize"]:
                torch._foreach_neg_(updates)
            move([local(params[i]) for i in chosen], updates, self._factors(part, updates[0], finite))

    @staticmethod
    def _factors(part: Part, like: Tensor, finite: Tensor) -> Factors:
        group = part.group
        return Factors.of(finite.to(like.device), like.dtype, lr=part.lr, momentum=group["momentum"], weight_decay=group["weight_decay"])


def _blocks(widest: int | None, width: int) -> int:
    """How many diagonal blocks a moment of this width has; 0 stands for its mean eigenvalue."""
    return 0 if widest is None else -(-width // widest)


def _without(part: Part, params: Collection[Tensor]) -> Part:
    """What of a group's share is not in ``params``."""
    return _picked(part, [i for i, p in enumerate(part.params) if p not in params])


def _picked(part: Part, kept: list[int]) -> Part:
    """A group's share of these of its parameters."""
    lists = ("params", "grads", "states", "norms", "sizes")
    left: dict[str, Any] = {name: [getattr(part, name)[i] for i in kept] for name in lists}
    return replace(part, **left)
