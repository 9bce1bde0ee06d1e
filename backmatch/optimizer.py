"""SGD with back-matching's layer-wise adaptive rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from backmatch.checks import check_in
from backmatch.estimators import EstimatorName, Per, make_estimator
from backmatch.pace import layer_paces, layer_sizes


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

    Build it before the first training forward: it watches the model's forward calls in training mode.

    Args:
        model: The network. All its trainable parameters form one group.
        lr: Learning rate γ.
        momentum: μ in [0, 1).
        nesterov: Whether momentum looks ahead; needs momentum above 0.
        weight_decay: λ, decoupled: independent of pace and momentum.
        estimator: ``probe`` (eq. 5, any architecture), ``rules`` (closed forms along a torch.fx graph) or ``loss`` (read
            off the step's own backward).
        interval: K, steps from one measurement to the next.
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
        TypeError: If ``model`` is not a module, or a setting is not a number.
        ValueError: If a setting is out of range, or the model has no trainable parameter.
        NotImplementedError: If the estimator has no rule for a layer; the message names it.
    """

    def __init__(
        self,
        model: Module,
        lr: float = 0.2,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 1e-3,
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
        if not isinstance(model, Module):
            raise TypeError(f"Invalid model: {type(model).__name__}. BackMatchSGD takes the torch.nn.Module itself, not its parameters.")
        check_in("lr", lr, 0.0)
        check_in("momentum", momentum, 0.0, 1.0)
        check_in("weight_decay", weight_decay, 0.0)
        check_in("beta", beta, 0.0, 1.0)
        check_in("power", power, 0.0, 1.0, high_open=False)
        check_in("bound", bound, 1.0)
        check_in("max_change", max_change, 0.0, math.inf, low_open=True, high_open=False)
        for name, count in (("interval", interval), ("samples", samples)):
            check_in(name, count, 1)
            if not isinstance(count, int):
                raise TypeError(f"Invalid {name}: {count!r}. Must be a whole number.")
        if nesterov and momentum == 0.0:
            raise ValueError("Invalid nesterov: True with momentum 0.0. Nesterov momentum needs momentum > 0; set nesterov=False.")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("The model has no trainable parameter. Check requires_grad, or whether this is the model that you train.")
        hyperparameters = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(named, hyperparameters | {"step": 0})
        self.interval, self.beta, self.max_change = interval, beta, max_change
        self.power, self.relative, self.bound = power, relative, bound
        self._model = model
        per = per or ("unit" if estimator == "probe" else "tensor")
        self._estimator = make_estimator(estimator, model, per=per, samples=samples)
        self._detached = False

    def paces(self) -> dict[str, Tensor]:
        """Parameter name → its present pace, 0-dim or one entry per output unit; empty before the first step."""
        return {name: self.state[p]["pace"] for name, p in self._model.named_parameters() if "pace" in self.state.get(p, {})}

    def responses(self) -> dict[str, Tensor]:
        """Parameter name → its averaged response m_W·M, shaped like its pace; empty before the first step."""
        return {name: self.state[p]["response"] for name, p in self._model.named_parameters() if "response" in self.state.get(p, {})}

    def detach(self) -> None:
        """Take this optimizer's hooks off the model; paces stay as they are from then on."""
        self._estimator.observer.remove()
        self._detached = True

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
        count = self.param_groups[0]["step"]
        if count % self.interval == 0:
            self._refresh(seed=count)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params if p.grad is not None]
            states = [self._initialised_state(p) for p in params]
            paces = [state["pace"] for state in states]
            if params and math.isfinite(self.max_change):
                factor = bounded_change(params, grads, paces, lr=group["lr"], limit=self.max_change)
                paces = [pace * factor for pace in paces]
            paced_sgd(
                params,
                grads,
                [state["momentum_buffer"] for state in states],
                paces,
                lr=group["lr"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                weight_decay=group["weight_decay"],
            )
            group["step"] += 1
        self._estimator.observer.active = (count + 1) % self.interval == 0
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` stood; also between two measurements of the responses."""
        if any("step" not in group for group in state_dict["param_groups"]):
            raise ValueError(
                "Invalid state_dict: its groups hold no 'step', so it is not one of BackMatchSGD. Load it into the optimizer that saved it."
            )
        super().load_state_dict(state_dict)
        # The base class casts floating state to the parameter's dtype; averages in bfloat16 would lose what they average.
        saved_ids = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, p in zip(saved_ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name in ("response", "pace"):
                if name in state_dict["state"].get(key, {}):
                    self.state[p][name] = state_dict["state"][key][name].detach().to(p.device, copy=True)
        self._estimator.observer.active = self.param_groups[0]["step"] % self.interval == 0

    def _initialised_state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if "pace" not in state:
            # Only where nothing was measured yet: the middle of what the others have, as no number means the same everywhere.
            others = [other["pace"].mean() for other in self.state.values() if "pace" in other]
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            state["pace"] = torch.stack(others).median().to(p.device, dtype) if others else torch.ones((), device=p.device, dtype=dtype)
        return state

    def _refresh(self, seed: int) -> None:
        """Measure the responses, average them, and set the pace of every parameter that has a gradient."""
        if self._detached:
            return
        if self.power == 0.0 and not self.relative:
            self.detach()  # every pace is 1: nothing is ever measured
            return
        measured = self._estimator.responses(seed)
        if measured is None:
            warnings.warn(
                "BackMatchSGD saw no forward call of its model in training mode since the last step, so its paces stay as they are. "
                "Build it on the model that you call, before the first call (and before torch.compile), and call model.train().",
                stacklevel=5,
            )
            return
        owned = {p for group in self.param_groups for p in group["params"] if p.grad is not None}
        stepped = {name: p for name, p in self._model.named_parameters() if p in owned}
        unmeasured = [name for name, p in stepped.items() if name not in measured and "response" not in self.state[p]]
        if unmeasured:
            raise NotImplementedError(
                f"Parameter '{unmeasured[0]}' has a gradient, but its layer was not called, so its response is not known. "
                "Use estimator='probe', which needs no layers."
            )
        tracked = {name: p for name, p in stepped.items() if name in measured}
        if not tracked:
            return
        for name, p in tracked.items():
            self._average(self.state[p], measured[name])
        responses = [self.state[p]["response"] for p in tracked.values()]
        sizes = None
        if self.relative:
            squares = [_sum_like(p, r) * (r.numel() / p.numel()) for p, r in zip(tracked.values(), responses, strict=True)]
            sizes = layer_sizes(squares, [p.ndim <= 1 for p in tracked.values()])
        paces = layer_paces(responses, sizes, power=self.power, bound=self.bound)
        for p, pace in zip(tracked.values(), paces, strict=True):
            self.state[p]["pace"] = pace

    def _average(self, state: dict[str, Any], response: Tensor) -> None:
        """A moving average that starts as a plain mean, so that the first measurement does not stand for the rest."""
        seen = state.get("measurements", 0)
        # One bad batch must not stay in the average for ever.
        response = torch.where(response.isfinite(), response, state["response"] if seen else torch.zeros_like(response))
        state["response"] = torch.lerp(state["response"], response, max(1.0 - self.beta, 1.0 / (seen + 1))) if seen else response
        state["measurements"] = seen + 1


def _sum_like(tensor: Tensor, entry: Tensor) -> Tensor:
    """Squares of ``tensor`` summed over what one entry of ``entry`` covers, shaped like it."""
    return tensor.to(entry.dtype).square().sum_to_size(entry.shape)


def bounded_change(params: Sequence[Tensor], grads: Sequence[Tensor], paces: Sequence[Tensor], *, lr: float, limit: float) -> Tensor:
    """``min(1, limit · ‖θ‖ / (γ ‖r g‖))``: the factor that keeps a step from changing the parameters by more than ``limit``.

    A plain deep network that leaves its plateau multiplies its gradients by hundreds within one measurement interval, and the
    paces follow only at the next. The lengths are those of all tensors together, before momentum.

    Args:
        params: Parameters θ.
        grads: Their gradients g.
        paces: Paces r, each broadcastable against its gradient.
        lr: Learning rate γ.
        limit: Largest γ‖r g‖ / ‖θ‖.

    Returns:
        The factor, 0-dim, on the device of the parameters, without waiting for it; 1 for parameters that are all zero.
    """
    size = torch.stack([torch.linalg.vector_norm(param, dtype=pace.dtype) for param, pace in zip(params, paces, strict=True)]).norm()
    change = (
        lr * torch.stack([torch.linalg.vector_norm(grad * pace, dtype=pace.dtype) for grad, pace in zip(grads, paces, strict=True)]).norm()
    )
    allowed = torch.where(size > 0, limit * size, change)
    return torch.where(change > allowed, allowed / change, torch.ones_like(change))


def paced_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    paces: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """``θ ← (1 − γλ) θ``, ``b ← μ b + r g``, ``θ ← θ − γ b`` (Nesterov: ``θ − γ (r g + μ b)``). In place; gradients untouched."""
    for param, grad, buffer, pace in zip(params, grads, momentum_buffers, paces, strict=True):
        if weight_decay != 0.0:
            param.mul_(1.0 - lr * weight_decay)
        paced = grad * pace.to(grad.dtype)
        buffer.mul_(momentum).add_(paced)
        param.add_(paced.add_(buffer, alpha=momentum) if nesterov else buffer, alpha=-lr)
