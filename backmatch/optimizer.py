"""SGD with back-matching's layer-wise adaptive rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backmatch import distributed
from backmatch.checks import check_in
from backmatch.contract import ModelOptimizer, Part, check_whole, wide
from backmatch.distributed import local
from backmatch.estimators import Estimator, EstimatorName, Per, check_estimator, default_per, make_estimator
from backmatch.leading import Lead, first_axes
from backmatch.notice import warn_user
from backmatch.observer import Observer
from backmatch.pace import Joined, decay_shares, follow, follow_all, layer_paces, layer_sizes, live_median
from backmatch.step import bounded_change, entry_norms, paced_sgd, step_length

_GRADIENT_DEFAULTS = {"lr": 0.01, "momentum": 0.95, "weight_decay": 1.0, "decay_floor": 0.7, "max_change": math.inf}
_OTHER_DEFAULTS = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3, "decay_floor": 0.0, "max_change": 0.01}
"""Responses read off gradients are in the loss's units, and follow a burst of gradients at once."""

_STRETCH = 0.0125
"""``max_stretch`` by default, where steps can be held."""


class BackMatchSGD(ModelOptimizer):
    r"""SGD whose learning rate is set for every layer by back-matching propagation (arXiv 1802.09750).

    With g the gradient of a parameter tensor, r its pace and γ the learning rate, one step is

        θ ← (1 − γλ·max(0, 1 − f²/w²)) θ    decoupled weight decay λ, down to the size f = decay_floor/√n
        b ← μ b + r g                       momentum μ
        θ ← θ − γ b                         (Nesterov: θ − γ (r g + μ b))

    The pace is ``w^(2 − 2·power) · s^(−power)``, at the default power ``w / √s``. The response ``s = m_W·M`` is the mean square of
    ``∂z_B/∂θ``, the change of the network's output per change of one element of the tensor (docs/derivation.md eq. 4 and 5); w is the
    root mean square of the tensor's entries, so that rates below power 1 keep the paper's independence of the weights' scale
    (:func:`backmatch.pace.layer_paces`).

    The default estimator, ``gradient``, reads responses off every step's gradients: ``E[g²] = s · E[δ_B²] / N`` where the N samples
    push in independent directions, and more where they agree (section 3.8). Then ``r g / w`` has a mean square near 1: lr is the
    relative change of every unit per step, whatever the loss's scale, as far as float32 holds the squares of gradients, from some 1e-19
    to 1e19.

    In the step of a matrix, momentum included, six leading singular directions are told from the rest (section 3.11). The rest gets the
    mean square that it would have if nothing led, so that it is what lr speaks of; the leading singular values are held to
    ``max_stretch``, and the others to four times that, whatever lr.

    The other estimators measure s itself every ``interval`` steps, under a unit gradient of the output; there ``r g / w`` shrinks with
    the loss's gradient, as SGD's steps do. They watch the model's forward calls in training mode: build the optimizer before the first.

    A step whose gradients are not all finite changes nothing; it is counted (``skipped_steps``) and told of by a warning.

    Args:
        model_or_params: The network, all of whose trainable parameters then form one group; or parameters as torch.optim takes them
            (tensors, ``(name, tensor)`` pairs, or dicts of groups), with the network as ``model``.
        lr: Learning rate γ; a tensor of one element too. Default: 0.01 with ``gradient``, 0.2 with the others.
        model: The network that owns the parameters, where they are given themselves. Without it ``gradient`` takes the first
            dimension of every matrix for its output units, and the other estimators leave every pace at 1.
        momentum: μ in [0, 1). Default: 0.95 with ``gradient``, 0.9 with the others.
        nesterov: Whether momentum looks ahead; needs momentum above 0.
        weight_decay: λ, decoupled: independent of pace and momentum. Default: 1 with ``gradient``, 0.001 with the
            others.
        decay_floor: Size of a matrix, or of one of its output units with n inputs, in units of ``1/√n``, that decay ends at; vectors then
            do not decay. With 0 all decays, whatever its size. Default: 0.7 with ``gradient``, 0 with the others.
        maximize: Whether to climb.
        foreach: Whether to update all tensors of a group in few large kernels, which takes memory for one more gradient, and of
            narrow ones, held, for two in float32. Default: on a GPU, and for sharded tensors that are held; on a CPU small tensors go
            together, as many as stay in its cache.
        estimator: ``gradient`` (any architecture, no extra pass), ``probe`` (eq. 5, any architecture), ``rules`` (closed forms along a
            torch.fx graph) or ``loss`` (layer by layer off the step's own backward).
        interval: K, steps from one measurement to the next; early in a run, when responses change fast, :func:`is_due` asks for more.
            ``gradient`` measures at every step.
        beta: Weight of the old average; early on, all measurements weigh alike.
        power: Exponent in [0, 1]; 1 is the paper's rate.
        relative: Whether rates hold for relative changes of the parameters (the factor in w) or absolute ones. With ``power=0``
            and absolute changes every pace is 1; with ``weight_decay=0`` and ``max_change=math.inf`` the step is then that of
            ``torch.optim.SGD``, bit for bit, or, as a graph, of an SGD whose lr is a tensor.
        per: One pace per ``tensor``, or per output ``unit``, a row of a matrix or a filter, which ``gradient`` and ``probe``
            resolve. Default: ``unit`` with these, ``tensor`` with the others.
        bound: Largest factor between a pace and the median of all that have a response.
        max_change: Largest change of all parameters of a group together by one step before momentum, ``γ‖r g‖ / ‖θ‖``; a longer
            one is shortened, before ``max_stretch`` is seen to. Momentum can add up to 1/(1 − μ) of these. Default: ``math.inf``, no
            limit, with ``gradient``, whose paced steps stay below γ/√(1 − beta) where ``bound`` raises no pace; 0.01 with the others.
        max_stretch: Largest singular value of the step of a matrix ``[m, n]`` that is let be, relative to ``w(√m + √n)``, that of a matrix
            of independent entries of size w; the six leading ones are shortened to it, and the rest moves at its own length, with
            singular values up to four times that (:func:`backmatch.leading.hold`). Not of tables that are looked up. Default: 0.0125
            with ``gradient`` in relative coordinates, which it needs; ``math.inf`` otherwise, with which steps stay as they are (an lr
            of 0.005 then suits most networks, half of it or less transformers on images; docs/experiments.md, 38).
        samples: Samples of a batch that ``probe`` and ``rules`` measure on; more than 1 where a layer normalises over the batch.
        cuda_graph: Whether a GPU does the work of a step as a CUDA graph, which one call of the host starts, in place of hundreds of
            kernels. It takes memory for what a step computes on the way, which no other work can use, and for one more gradient. The
            learning rate may change from step to step; where another setting, or what has a gradient, does, there is no graph, nor on a
            CPU, over several devices or for sharded parameters. Steps are then as without, but that lr is a tensor always.

    Raises:
        TypeError: If a model or a setting is not of its type, or a parameter is complex.
        ValueError: If a setting is out of range, or the model has no trainable parameter.
        NotImplementedError: If the estimator has no rule for a layer, which the message names; if parameters are sharded and it is
            not ``gradient``, or they are sharded over more than one mesh or dimension.
    """

    def __init__(
        self,
        model_or_params: Module | Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        model: Module | None = None,
        momentum: float | None = None,
        nesterov: bool = True,
        weight_decay: float | None = None,
        decay_floor: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        estimator: EstimatorName = "gradient",
        interval: int = 10,
        beta: float = 0.9,
        power: float = 0.5,
        relative: bool = True,
        per: Per | None = None,
        bound: float = 100.0,
        max_change: float | None = None,
        max_stretch: float | None = None,
        samples: int = 32,
        cuda_graph: bool = False,
    ) -> None:
        self.interval, self.beta, self.cuda_graph = interval, beta, cuda_graph
        self.power, self.relative, self.bound = power, relative, bound
        self.estimator, self.per, self.samples = estimator, per or default_per(estimator), samples
        check_in("beta", beta, 0.0, 1.0)
        check_in("power", power, 0.0, 1.0, high_open=False)
        check_in("bound", bound, 1.0)
        check_whole("interval", interval)
        check_whole("samples", samples)
        check_estimator(estimator, self.per)
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decay_floor": decay_floor, "max_change": max_change}
        usual = _GRADIENT_DEFAULTS if estimator == "gradient" else _OTHER_DEFAULTS
        settings = usual | {name: value for name, value in given.items() if value is not None}
        if max_stretch is None:
            max_stretch = _STRETCH if self._reads_gradients and relative else math.inf
        rest = {"max_stretch": max_stretch, "nesterov": nesterov, "maximize": maximize, "foreach": foreach}
        super().__init__(model_or_params, model, settings | rest)

    _estimator: Estimator | None = None
    _latest: tuple[list[Any], Joined] | None = None
    _decays: dict[Tensor, Tensor]
    _sizes: dict[Tensor, Tensor]
    _kept = ModelOptimizer._kept | {"beta", "power", "relative", "bound", "estimator", "per", "samples"}

    def paces(self) -> dict[str, Tensor]:
        """Parameter name → its present pace, 0-dim or one entry per output unit; empty before the first step."""
        return {name: self.state[p]["pace"].clone() for p, name in self._names().items() if "pace" in self.state.get(p, {})}

    def responses(self) -> dict[str, Tensor]:
        """Parameter name → its averaged response m_W·M up to now, shaped like its pace; empty before the first step.

        With ``gradient`` in units of its own gradients, E[g²].
        """
        return {name: self.state[p]["response"].clone() for p, name in self._names().items() if "response" in self.state.get(p, {})}

    @property
    def _is_sgd(self) -> bool:
        return self.power == 0.0 and not self.relative

    @property
    def _reads_gradients(self) -> bool:
        return self.estimator == "gradient" and not self._is_sgd

    def _holds(self, group: dict[str, Any]) -> bool:
        """Whether a group's steps are held; its setting may have come with a checkpoint of another estimator's."""
        return math.isfinite(group["max_stretch"]) and self._reads_gradients and self.relative

    def _is_table(self, p: Tensor) -> bool:
        """Whether rows of it are looked up: each has one input, always 1, that all of its entries share."""
        units = self._units_of(p)
        return units is not None and units.fan_in == 1 < p.numel() // p.shape[units.dim]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_in("max_stretch", group["max_stretch"], 0.0, math.inf, low_open=True, high_open=False)
        if math.isinf(group["max_stretch"]):
            return
        if not self._reads_gradients or not self.relative:
            raise ValueError(
                f"Invalid max_stretch: {group['max_stretch']} with estimator={self.estimator!r}, relative={self.relative}. "
                "It needs estimator='gradient' and relative=True: leave it out."
            )

    def _observe(self) -> Observer | None:
        if self.estimator == "gradient" or self._model is None or self._is_sgd:
            return None
        if any(distributed.share_of(p) is not None for group in self.param_groups for p in group["params"]):
            raise NotImplementedError(
                f"estimator={self.estimator!r} runs the network on its own, for which sharded parameters would have to be gathered. "
                "Use estimator='gradient'."
            )
        self._estimator = make_estimator(self.estimator, self._model, per=self.per, samples=self.samples)
        return self._estimator.observer

    def _initialise(self, p: Tensor, state: dict[str, Any]) -> None:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if self._reads_gradients and "response" not in state:
            state["response"] = torch.zeros(self._response_shape(p), device=p.device, dtype=wide(p.dtype))
            state["pace"] = torch.ones_like(state["response"])
            state["measurements"] = torch.zeros((), device=p.device)
        if "pace" not in state:
            state["pace"] = self._fallback_pace(p)

    def _part(self, group: dict[str, Any]) -> Part | None:
        part = super()._part(group)
        if part is not None and self._holds(group):
            for p, state in zip(part.params, part.states, strict=True):
                if "axes" not in state and self._units_of(p) is not None and not self._is_table(p):
                    state["axes"] = first_axes(p)
        return part

    def _foreign(self, state_dict: dict[str, Any]) -> str:
        return "it holds moments of matched layers" if any("input_moment" in state for state in state_dict["state"].values()) else ""

    def _complete(self, state_dict: dict[str, Any]) -> None:
        super()._complete(state_dict)
        for p, state in self.state.items():
            response = state.get("response")
            if self._is_sgd:
                state.pop("pace", None)
            if response is not None and (self._is_sgd or response.shape != self._response_shape(p)):
                for name in ("response", "measurements"):
                    state.pop(name, None)  # of other settings, and no start for an average of these

    def _fallback_pace(self, p: Tensor) -> Tensor:
        """For what no measurement has reached: the middle of what the others have, as no number means the same everywhere."""
        dtype = wide(p.dtype)
        others = [(state["pace"].mean(), state["response"]) for state in self.state.values() if "response" in state]
        if not others:
            return torch.ones((), device=p.device, dtype=dtype)
        paces, responses = zip(*others, strict=True)
        return live_median(Joined.of(paces).values, Joined.of(responses).means()).nan_to_num(1.0).to(p.device, dtype)

    def _needs_size(self, p: Tensor) -> bool:
        if any(_decays_to_a_floor(group) for group in self.param_groups):
            return True
        return self._reads_gradients and (self.relative or any(math.isfinite(group["max_change"]) for group in self.param_groups))

    def _follow(self, parts: list[Part], finite: Tensor) -> None:
        params = [p for part in parts for p in part.params]
        sizes = [size for part in parts for size in part.sizes if size is not None]
        squares = _mean_squares(self._laid_out(params, sizes).like(sizes), params) if sizes else None
        self._decays = {} if squares is None else self._decay_shares(parts, squares)
        if not self._reads_gradients or not params:
            return
        states, norms = [state for part in parts for state in part.states], [norm for part in parts for norm in part.norms]
        averages = [state["response"] for state in states]
        measured = _mean_squares(self._laid_out(params, averages).like(norms), params)
        responses = follow_all(averages, [state["measurements"] for state in states], measured, finite, beta=self.beta)
        self._set_paces(params, responses, squares)

    def _laid_out(self, params: list[Tensor], tensors: list[Tensor]) -> Joined:
        """Tensors, one for each of ``params``, or others like them of an earlier step: what is made on the host for them is kept."""
        if torch.compiler.is_compiling():
            return Joined.of(tensors)  # a compiler makes constants of it by itself
        places = [(id(p), tensor.shape, tensor.dtype, tensor.device) for p, tensor in zip(params, tensors, strict=True)]
        if self._latest is None or places != self._latest[0]:
            self._latest = places, Joined.of(tensors)
        return self._latest[1]

    def _refresh(self, seed: int) -> None:
        if self._estimator is None or self._model is None or self._observer is None:
            return
        # Every rank its own noise, on its own samples.
        measured = self._mean_over_ranks(self._estimator.responses(seed * distributed.ranks() + distributed.rank()))
        if measured is None:
            warn_user(
                "BackMatchSGD saw no sample go through its model in training mode since the last step, so its paces stay as they are. "
                + self._when_unseen
            )
            return
        stepped = {p for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()}
        tracked = {name: p for name, p in self._model.named_parameters() if p in stepped and name in measured}
        if not tracked:
            return
        whole = self._is_whole()
        for name, p in tracked.items():
            state, response = self.state[p], measured[name]
            ok = response.isfinite().all() & whole.to(response.device)
            if "response" not in state:
                if not ok:
                    continue  # an average of nothing would be a response of 0, and its pace the highest of all
                state["response"], state["measurements"] = torch.zeros_like(response), torch.zeros((), device=response.device)
            follow(state["response"], state["measurements"], response, ok, beta=self.beta)
        # Also those whose own response overflowed in this step: one median bounds all.
        known: list[Tensor] = [p for group in self.param_groups for p in group["params"] if p in stepped and "response" in self.state[p]]
        if known:
            averages = [self.state[p]["response"] for p in known]
            responses = Joined.of(averages)
            self._set_paces(known, responses, _mean_squares(responses.like(entry_norms(known, averages)), known) if self.relative else None)
        self._set_fallback_paces(stepped)

    def _mean_over_ranks(self, measured: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The mean over those ranks that measured, a parameter at a time; None if none measured any."""
        if distributed.ranks() == 1 or self._model is None:
            return measured
        named = dict(self._model.named_parameters())
        found = [(measured or {}).get(name) for name in named]
        sums = [torch.zeros(self._response_shape(p), device=p.device, dtype=wide(p.dtype)) for p in named.values()]
        for total, response in zip(sums, found, strict=True):
            if response is not None:
                total.copy_(response)
        counts = torch.tensor([response is not None for response in found], dtype=torch.float32, device=sums[0].device)
        *sums, counts = distributed.sum_over_ranks([*sums, counts])
        return {name: total / count for name, total, count in zip(named, sums, counts, strict=True) if count > 0} or None

    def _response_shape(self, p: Tensor) -> tuple[int, ...]:
        units = self._units_of(p) if self.per == "unit" else None
        return () if units is None else tuple(size if dim == units.dim else 1 for dim, size in enumerate(p.shape))

    def _set_paces(self, params: list[Tensor], responses: Joined, squares: Joined | None) -> None:
        """From the averaged responses of ``params`` and the mean squares of their entries, in relative coordinates, laid out alike.

        And, where steps are held, the sizes that their limits are relative to, for :meth:`_leads`.
        """
        sizes = layer_sizes(squares, self._fan_ins(params)) if self.relative and squares is not None else None
        if sizes is not None and any(map(self._holds, self.param_groups)):
            self._sizes = dict(zip(params, sizes.holding(sizes.values.square()).means().sqrt().unbind(), strict=True))
        paces = layer_paces(responses, sizes, power=self.power, bound=self.bound).split()
        for p, pace in zip(params, paces, strict=True):
            if "pace" not in self.state[p] or self.state[p]["pace"].shape != pace.shape:  # or the median one, up to now
                self.state[p]["pace"] = torch.empty_like(pace)
        torch._foreach_copy_([self.state[p]["pace"] for p in params], paces)

    def _fan_ins(self, params: list[Tensor]) -> list[int | None]:
        """Inputs that drive one output unit of each; None for vectors."""
        return [None if units is None else units.fan_in for units in map(self._units_of, params)]

    def _decay_shares(self, parts: list[Part], squares: Joined) -> dict[Tensor, Tensor]:
        """How much of the weight decay what each entry of a pace covers takes; of no parameter if all take all of it."""
        if not any(_decays_to_a_floor(part.group) for part in parts):
            return {}
        params = [p for part in parts for p in part.params]
        relative = [part.group["decay_floor"] for part in parts for _ in part.params]
        floors = [math.inf if n is None else floor / math.sqrt(n) for floor, n in zip(relative, self._fan_ins(params), strict=True)]
        return dict(zip(params, decay_shares(squares, floors).split(), strict=True))

    def _set_fallback_paces(self, stepped: set[Tensor]) -> None:
        unmeasured = {p: name for p, name in self._names().items() if p in stepped and "response" not in self.state[p]}
        for p in unmeasured:
            self.state[p].setdefault("pace", torch.ones((), device=p.device, dtype=wide(p.dtype))).copy_(self._fallback_pace(p))
        new = sorted(set(unmeasured.values()) - self._told_of)
        if new:
            self._told_of.update(new)
            warn_user(
                f"BackMatchSGD measured no response for {', '.join(new[:5])}{f' and {len(new) - 5} more' if len(new) > 5 else ''}: "
                "forward does not use them, the model does not own them, or it was not finite. "
                "They take the median pace. See backmatch.coverage."
            )

    def _leads(self, part: Part) -> list[Lead | None] | None:
        """What holds the step of each matrix, before it is multiplied by γ."""
        if not self._holds(part.group):
            return None
        sizes = [self._sizes.pop(p) for p in part.params]
        lr = part.lr.to(sizes[0].device) if isinstance(part.lr, Tensor) else part.lr
        stretch = part.group["max_stretch"] / lr if isinstance(lr, Tensor) or lr > 0.0 else math.inf
        return [
            Lead(p, state["axes"], size * (_white_norm(p) * stretch)) if "axes" in state else None
            for p, state, size in zip(part.params, part.states, sizes, strict=True)
        ]

    def _update(self, part: Part, finite: Tensor) -> None:
        group, paces = part.group, [state["pace"] for state in part.states]
        params = [local(p) for p in part.params]
        if math.isfinite(group["max_change"]):
            sizes = [p if size is None else size for p, size in zip(params, part.sizes, strict=True)]
            factor = bounded_change(*step_length(sizes, part.norms, paces, lr=part.lr), limit=group["max_change"])
            paces = [pace * factor.to(pace.device, pace.dtype) for pace in paces]
        paces = [_held(pace, p) for pace, p in zip(paces, part.params, strict=True)]
        decays = [_held(self._decays.pop(p), p) for p in part.params] if _decays_to_a_floor(part.group) else None
        leads, foreach = self._leads(part), group["foreach"]
        if foreach is None and leads is not None and any(distributed.share_of(p) is not None for p in part.params):
            foreach = True  # ranks hold steps together, but each would take together what fits of its own share
        paced_sgd(
            params,
            part.grads,
            [local(state["momentum_buffer"]) for state in part.states],
            paces,
            decay_shares=decays,
            leads=leads,
            finite=finite,
            lr=part.lr,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            foreach=foreach,
        )


def _white_norm(p: Tensor) -> float:
    """The largest singular value of a large matrix of p's shape whose entries are independent and of size 1."""
    return math.sqrt(p.shape[0]) + math.sqrt(p.numel() // p.shape[0])


def _held(entry: Tensor, p: Tensor) -> Tensor:
    """What of a pace, or the like of it, is of the part of ``p`` that this rank holds."""
    share = distributed.share_of(p)
    return entry if share is None else share.of(entry, p)


def _decays_to_a_floor(group: dict[str, Any]) -> bool:
    return group["decay_floor"] > 0.0 and group["weight_decay"] > 0.0


def _mean_squares(norms: Joined, params: list[Tensor]) -> Joined:
    """Of all entries, or of those of every unit, from their norms."""
    return norms.holding(norms.values.square()).scaled([length / p.numel() for length, p in zip(norms.lengths, params, strict=True)])
