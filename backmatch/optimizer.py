"""SGD with back-matching's layer-wise adaptive rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import DataParallel, Module
from torch.optim import Optimizer

from backmatch.checks import check_in
from backmatch.estimators import Estimator, EstimatorName, Per, fan_in, make_estimator, unit_dims
from backmatch.pace import layer_paces, layer_sizes
from backmatch.step import bounded_change, paced_sgd, step_length

_OLDER = {"maximize": False, "foreach": None}
"""Settings of a group that checkpoints from before them lack."""


class BackMatchSGD(Optimizer):
    r"""SGD whose learning rate is set for every layer by back-matching propagation (arXiv 1802.09750).

    With g the gradient of a parameter tensor, r its pace and γ the learning rate, one step is

        θ ← (1 − γλ) θ                      decoupled weight decay λ
        b ← μ b + r g                       momentum μ
        θ ← θ − γ b                         (Nesterov: θ − γ (r g + μ b))

    The pace is ``w^(2 − 2·power) · s^(−power)``, at the default power ``w / √s``. The response ``s = m_W·M`` is the mean square of
    ``∂z_B/∂θ``, the change of the network's output per change of one element of the tensor (docs/derivation.md eq. 4 and 5); w is the
    root mean square of the tensor's entries, so that rates below power 1 keep the paper's independence of the weights' scale
    (:func:`backmatch.pace.layer_paces`). Responses are measured every ``interval`` steps and averaged. At the default power ``r g / w``
    depends neither on the units nor on the scale of the weights, only on the loss's; with cross-entropy, rates of 0.05 to 0.4 suit most.

    Build it before the first training forward: it watches the model's forward calls in training mode. A step whose gradients are
    not all finite changes nothing; it is counted (``skipped_steps``) and told of by a warning.

    Args:
        model_or_params: The network, all of whose trainable parameters then form one group; or parameters as torch.optim takes them
            (tensors, ``(name, tensor)`` pairs, or dicts of groups), with the network as ``model``.
        lr: Learning rate γ; a tensor of one element too.
        model: The network that owns the parameters, where they are given themselves. Without it no response can be measured and
            every pace is 1.
        momentum: μ in [0, 1).
        nesterov: Whether momentum looks ahead; needs momentum above 0.
        weight_decay: λ, decoupled: independent of pace and momentum.
        maximize: Whether to climb.
        foreach: Whether to update all tensors of a group in few large kernels, which takes memory for one more gradient; default: on
            CUDA.
        estimator: ``probe`` (eq. 5, any architecture), ``rules`` (closed forms along a torch.fx graph) or ``loss`` (read
            off the step's own backward).
        interval: K, steps from one measurement to the next; early in a run, when responses change fast, :func:`is_due` asks for more.
        beta: Weight of the old average; early on, all measurements weigh alike.
        power: Exponent in [0, 1]; 1 is the paper's rate.
        relative: Whether rates hold for relative changes of the parameters (the factor in w) or absolute ones. With ``power=0``
            and absolute changes every pace is 1; with ``weight_decay=0`` and ``max_change=math.inf`` the step is then that of
            ``torch.optim.SGD``, bit for bit.
        per: One pace per ``tensor``, or per output ``unit``, a row of a matrix or a filter, which ``probe`` alone resolves. Default:
            ``unit`` with ``probe``, ``tensor`` with the others.
        bound: Largest factor between a pace and the median of all.
        max_change: Largest change of all parameters of a group together by one step before momentum, ``γ‖r g‖ / ‖θ‖``; a longer
            one is shortened. Momentum can add up to 1/(1 − μ) of these. ``math.inf`` for no limit.
        samples: Samples of a batch that ``probe`` and ``rules`` measure on.

    Raises:
        TypeError: If a model or a setting is not of its type, or a parameter is complex.
        ValueError: If a setting is out of range, or the model has no trainable parameter.
        NotImplementedError: If the estimator has no rule for a layer, which the message names, or several ranks train together.
    """

    def __init__(
        self,
        model_or_params: Module | Iterable[Any],
        lr: float | Tensor = 0.2,
        *,
        model: Module | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 1e-3,
        maximize: bool = False,
        foreach: bool | None = None,
        estimator: EstimatorName = "probe",
        interval: int = 10,
        beta: float = 0.9,
        power: float = 0.5,
        relative: bool = True,
        per: Per | None = None,
        bound: float = 100.0,
        max_change: float = 0.01,
        samples: int = 32,
    ) -> None:
        model, params = _model_and_params(model_or_params, model)
        self.interval, self.beta = interval, beta
        self.power, self.relative, self.bound = power, relative, bound
        self.estimator, self.per, self.samples = estimator, per or ("unit" if estimator == "probe" else "tensor"), samples
        self._check()
        self._model = model
        self._told_of: set[str] = set()
        self._skipped: Tensor | None = None
        hyperparameters = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "max_change": max_change}
        super().__init__(params, hyperparameters | {"maximize": maximize, "foreach": foreach, "step": 0})
        self._estimator = self._observe()

    def paces(self) -> dict[str, Tensor]:
        """Parameter name → its present pace, 0-dim or one entry per output unit; empty before the first step."""
        return {name: self.state[p]["pace"] for p, name in self._names().items() if "pace" in self.state.get(p, {})}

    def responses(self) -> dict[str, Tensor]:
        """Parameter name → its averaged response m_W·M, shaped like its pace; empty before the first step."""
        return {name: self.state[p]["response"] for p, name in self._names().items() if "response" in self.state.get(p, {})}

    @property
    def skipped_steps(self) -> int:
        """Steps since this optimizer was built that changed nothing, as their gradients were not all finite."""
        return 0 if self._skipped is None else int(self._skipped)

    def detach(self) -> None:
        """Take this optimizer's hooks off the model; paces stay as they are from then on. So does deleting the optimizer."""
        if self._estimator is not None:
            self._estimator.observer.remove()
        self._estimator = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. ``closure``, if given, computes the loss and its gradients anew; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._measure_if_due()
        parts = [part for group in self.param_groups if (part := self._part(group)) is not None]
        if parts:
            finite = self._all_finite([part.change for part in parts])
            for part in parts:
                self._update(part, finite)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters from now on, with options of their own; measured if the model owns them.

        Raises:
            TypeError, ValueError: As the constructor does; no group is added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group["step"] = self.param_groups[0]["step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` stood; also between two measurements of the responses."""
        # Hooks of ours next to the loading itself: hooks of the user may replace what is loaded, and change what was.
        final: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, state_dict: final.update(_checked(state_dict)))
        after = self.register_load_state_dict_post_hook(lambda _: self._complete(final), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _complete(self, state_dict: dict[str, Any]) -> None:
        """Restore of the loaded ``state_dict`` what the base class changes."""
        # It casts floating state to the parameter's dtype; averages in bfloat16 would lose what they average.
        saved_ids = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, p in zip(saved_ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name in ("response", "pace"):
                if name in state_dict["state"].get(key, {}):
                    self.state[p][name] = state_dict["state"][key][name].detach().to(p.device, copy=True)
        for group in self.param_groups:
            group["step"] = int(group["step"])  # checkpoint formats of tensors alone make a tensor of it
        if self._estimator is not None:
            self._estimator.observer.active = is_due(self.param_groups[0]["step"], self.interval)

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches the copied model by hooks of its own.
        own = {name: value for name, value in self.__dict__.items() if name in _KEPT}
        return super().__getstate__() | own | {"_watching": self._estimator is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        watching = state.pop("_watching", None)  # None: called by load_state_dict
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in _OLDER.items():
                group.setdefault(name, value)
        if watching is not None:
            self._estimator = self._observe() if watching else None

    def _check(self) -> None:
        check_in("beta", self.beta, 0.0, 1.0)
        check_in("power", self.power, 0.0, 1.0, high_open=False)
        check_in("bound", self.bound, 1.0)
        for name, count in (("interval", self.interval), ("samples", self.samples)):
            check_in(name, count, 1)
            if not isinstance(count, int):
                raise TypeError(f"Invalid {name}: {count!r}. Must be a whole number.")

    def _observe(self) -> Estimator | None:
        """The estimator, with its hooks on the model; None where every pace is 1 anyway."""
        if self._model is None or (self.power == 0.0 and not self.relative):
            return None
        estimator = make_estimator(self.estimator, self._model, per=self.per, samples=self.samples)
        estimator.observer.active = is_due(self.param_groups[0]["step"], self.interval)
        return estimator

    def _names(self) -> dict[Tensor, str]:
        """Every parameter of the groups and what it is called: in the model, or else in its group."""
        in_model = {p: name for name, p in self._model.named_parameters()} if self._model is not None else {}
        names: dict[Tensor, str] = {}
        for i, group in enumerate(self.param_groups):
            given = group.get("param_names", [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))])
            names |= {p: in_model.get(p, name) for p, name in zip(group["params"], given, strict=True)}
        return names

    def _part(self, group: dict[str, Any]) -> _Part | None:
        """What one group brings to a step; None without gradients."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return None
        grads = [p.grad for p in params if p.grad is not None]
        states = [self._initialised_state(p) for p in params]
        # torch.optim takes a lr of any shape with one element; kernels want it 0-dim.
        lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
        return _Part(group, params, grads, states, lr, *step_length(params, grads, [state["pace"] for state in states], lr=lr))

    def _all_finite(self, changes: list[Tensor]) -> Tensor:
        """Whether the groups' steps all are finite, 0-dim, and counted if not: half a step is none of those asked for."""
        finite = torch.stack([change.isfinite().to(changes[0].device) for change in changes]).all()
        self._skipped = (~finite).long() if self._skipped is None else self._skipped + (~finite).to(self._skipped.device)
        return finite

    @staticmethod
    def _update(part: _Part, finite: Tensor) -> None:
        group, paces = part.group, [state["pace"] for state in part.states]
        if math.isfinite(group["max_change"]):
            factor = bounded_change(part.size, part.change, limit=group["max_change"])
            paces = [pace * factor.to(pace.device, pace.dtype) for pace in paces]
        paced_sgd(
            part.params,
            part.grads,
            [state["momentum_buffer"] for state in part.states],
            paces,
            finite=finite,
            lr=part.lr,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            foreach=part.params[0].is_cuda if group["foreach"] is None else group["foreach"],
        )

    def _initialised_state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if "pace" not in state:
            state["pace"] = self._fallback_pace(p)
        return state

    def _fallback_pace(self, p: Tensor) -> Tensor:
        """For what no measurement has reached: the middle of what the others have, as no number means the same everywhere."""
        others = [state["pace"].mean() for state in self.state.values() if "response" in state]
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        return torch.stack(others).median().to(p.device, dtype) if others else torch.ones((), device=p.device, dtype=dtype)

    @torch.compiler.disable
    def _measure_if_due(self) -> None:
        """What a step does on the host: count, check, and every ``interval`` steps measure."""
        count = self.param_groups[0]["step"]
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"The gradient of '{self._names()[p]}' {list(p.shape)} is sparse, which BackMatchSGD does not support. "
                    "Build its embedding with sparse=False."
                )
        if is_due(count, self.interval):
            self._tell_of_skipped()
            self._refresh(seed=count)
        for group in self.param_groups:
            group["step"] += 1
        if self._estimator is not None:
            self._estimator.observer.active = is_due(count + 1, self.interval)

    def _refresh(self, seed: int) -> None:
        """Measure the responses, average them, and set the pace of every parameter that has a gradient."""
        if self._estimator is None or self._model is None:
            return
        measured = self._estimator.responses(seed)
        if measured is None:
            self._warn(
                "BackMatchSGD saw no forward call of its model in training mode since the last step, so its paces stay as they are. "
                "Build it on the model that you call, before the first call (and before torch.compile), and call model.train()."
            )
            return
        stepped = {p for group in self.param_groups for p in group["params"] if p.grad is not None}
        tracked = {name: p for name, p in self._model.named_parameters() if p in stepped and name in measured}
        if not tracked:
            return
        for name, p in tracked.items():
            self._average(self.state[p], measured[name])
        responses = [self.state[p]["response"] for p in tracked.values()]
        sizes = None
        if self.relative:
            dims = unit_dims(self._model)
            squares = [_sum_like(p, r) * (r.numel() / p.numel()) for p, r in zip(tracked.values(), responses, strict=True)]
            sizes = layer_sizes(squares, [fan_in(p, dims.get(name)) for name, p in tracked.items()])
        paces = layer_paces(responses, sizes, power=self.power, bound=self.bound)
        for p, pace in zip(tracked.values(), paces, strict=True):
            self.state[p]["pace"] = pace
        self._set_fallback_paces(stepped)

    def _set_fallback_paces(self, stepped: set[Tensor]) -> None:
        unmeasured = {p: name for p, name in self._names().items() if p in stepped and "response" not in self.state[p]}
        for p in unmeasured:
            self.state[p]["pace"] = self._fallback_pace(p)
        new = sorted(set(unmeasured.values()) - self._told_of)
        if new:
            self._told_of.update(new)
            self._warn(
                f"BackMatchSGD measured no response for {', '.join(new[:5])}{f' and {len(new) - 5} more' if len(new) > 5 else ''}: "
                "forward does not use them, or the model does not own them. They take the median pace. See backmatch.coverage."
            )

    def _tell_of_skipped(self) -> None:
        count = self.skipped_steps
        if count and f"skipped {count}" not in self._told_of:
            self._told_of.add(f"skipped {count}")
            self._warn(
                f"BackMatchSGD skipped {count} steps so far whose gradients held NaN or infinity. Look at the loss and the data; clip "
                "gradients, or lower lr."
            )

    @staticmethod
    def _warn(text: str) -> None:
        warnings.warn(text, stacklevel=7)

    def _average(self, state: dict[str, Any], response: Tensor) -> None:
        """A moving average that starts as a plain mean, so that the first measurement does not stand for the rest."""
        seen = state.get("measurements", 0)
        # One bad batch must not stay in the average for ever.
        response = torch.where(response.isfinite(), response, state["response"] if seen else torch.zeros_like(response))
        state["response"] = torch.lerp(state["response"], response, max(1.0 - self.beta, 1.0 / (seen + 1))) if seen else response
        state["measurements"] = seen + 1


@dataclass
class _Part:
    """A group's share of one step: what has a gradient, its rate, its length and how far it would move."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    lr: float | Tensor
    size: Tensor
    change: Tensor


_KEPT = {"interval", "beta", "power", "relative", "bound", "estimator", "per", "samples", "_model", "_told_of", "_skipped"}
"""Attributes that copies and pickles of an optimizer keep, beside those of torch.optim.Optimizer."""


def _model_and_params(model_or_params: Module | Iterable[Any], model: Module | None) -> tuple[Module | None, Iterable[Any]]:
    """The model to measure, if any, and the parameters to optimize."""
    given = isinstance(model_or_params, Module)
    if given and model is not None:
        raise TypeError("Invalid model: given twice. Give the network first, or its parameters first and the network as model=.")
    model = model_or_params if isinstance(model_or_params, Module) else model
    if model is not None and not isinstance(model, Module):
        raise TypeError(f"Invalid model: {type(model).__name__}. Must be the torch.nn.Module that owns the parameters.")
    if isinstance(model, DataParallel):
        raise TypeError("Invalid model: DataParallel, whose replicas lose what hooks see. Give the model itself, on one device.")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if model is not None and distributed and torch.distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"BackMatchSGD does not yet average its measurements over ranks, of which there are {torch.distributed.get_world_size()}: "
            "their weights would drift apart. Train in one process, or give parameters without a model for plain SGD."
        )
    if not isinstance(model_or_params, Module):
        return model, model_or_params
    named = [(name, p) for name, p in model_or_params.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("The model has no trainable parameter. Check requires_grad, or whether this is the model that you train.")
    return model, named


def _checked(state_dict: dict[str, Any]) -> dict[str, Any]:
    if any("step" not in group for group in state_dict["param_groups"]):
        raise ValueError(
            "Invalid state_dict: its groups hold no 'step', so it is not one of BackMatchSGD. Load it into the optimizer that saved it."
        )
    return state_dict


def _check_group(group: dict[str, Any]) -> None:
    if isinstance(group["lr"], Tensor):
        if group["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    else:
        check_in("lr", group["lr"], 0.0)
    check_in("momentum", group["momentum"], 0.0, 1.0)
    check_in("weight_decay", group["weight_decay"], 0.0)
    check_in("max_change", group["max_change"], 0.0, math.inf, low_open=True, high_open=False)
    if group["nesterov"] and group["momentum"] == 0.0:
        raise ValueError("Invalid nesterov: True with momentum 0.0. Nesterov momentum needs momentum > 0; set nesterov=False.")
    for p in group["params"]:
        if p.is_complex() or p.is_sparse:
            kind = "complex" if p.is_complex() else "sparse"
            raise TypeError(
                f"Invalid parameter: {kind}, of shape {list(p.shape)}. BackMatchSGD takes real, dense ones; leave it to another optimizer."
            )


def is_due(step: int, interval: int) -> bool:
    """Whether responses are measured at ``step`` (from 0): every ``min(interval, step / 4)`` steps, at each of the first 8."""
    return step % min(interval, max(1, step // 4)) == 0


def _sum_like(tensor: Tensor, entry: Tensor) -> Tensor:
    """Squares of ``tensor`` summed over what one entry of ``entry`` covers, shaped like it."""
    return tensor.to(entry.dtype).square().sum_to_size(entry.shape)
