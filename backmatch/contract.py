"""What torch.optim asks of an optimizer, and what every optimizer here adds: a model to watch, and steps that are whole or none."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn import DataParallel, Module
from torch.optim import Optimizer

from backmatch.checks import check_in
from backmatch.distributed import local, whole_norms
from backmatch.estimators import fan_ins, unit_dims
from backmatch.notice import warn_user
from backmatch.observer import InputObserver, Observer
from backmatch.replay import Replay, places_of
from backmatch.step import entry_norms, kinds_of

_OLDER = {"maximize": False, "foreach": None, "decay_floor": 0.0, "max_stretch": math.inf}
"""Settings of a group that checkpoints from before them lack."""


@dataclass
class Part:
    """A group's share of one step: what has a gradient, its state and rate, and norms per entry of a pace.

    Of sharded parameters ``grads`` are what this rank holds; the norms are those of whole gradients, and of whole parameters where
    the optimizer needs them (:meth:`ModelOptimizer._needs_size`).
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    norms: list[Tensor]
    sizes: list[Tensor | None]
    lr: float | Tensor


@dataclass(frozen=True)
class Units:
    """A tensor's output units: the dimension that counts them, and how many inputs drive one of them at a time."""

    dim: int
    fan_in: int


class ModelOptimizer(Optimizer):
    """An optimizer that may watch the forward calls of the model that owns its parameters.

    A subclass says what it watches (:meth:`_observe`), what state a parameter starts with, and how a step measures and moves. State
    lives under its parameter and keeps its own precision through save and load. A step whose gradients are not all finite changes
    nothing; it is counted and told of.
    """

    _kept: ClassVar[frozenset[str]] = frozenset({"interval", "cuda_graph", "_model", "_told_of", "_skipped"})
    """Attributes that copies and pickles keep, beside those of torch.optim.Optimizer."""

    _late_count: tuple[Tensor, torch.cuda.Event] | None = None
    _replay: Replay | None = None
    _watches_later: bool = False

    _when_unseen: ClassVar[str] = (
        "Build it on the model that you call, before the first call (and before torch.compile, after torch._dynamo.reset() if one of "
        "its class was compiled before: graphs are shared, hooks are not), and call model.train()."
    )
    """What to do if hooks were not called."""

    interval: int
    cuda_graph: bool = False

    def __init__(self, model_or_params: Module | Iterable[Any], model: Module | None, defaults: dict[str, Any]) -> None:
        self._model, params = _model_and_params(model_or_params, model)
        self._told_of: set[str] = set()
        self._skipped: Tensor | None = None
        self._units: dict[Tensor, Units | None] = {}
        super().__init__(params, defaults | {"step": 0})
        self._observer = self._observe()
        self._wake_observer(0)

    @abstractmethod
    def _observe(self) -> Observer | None:
        """An observer with its hooks on the model; None where none is needed."""

    @abstractmethod
    def _initialise(self, p: Tensor, state: dict[str, Any]) -> None:
        """Fill in what ``state`` lacks; "pace" and "momentum_buffer" at least."""

    def _refresh(self, seed: int) -> None:
        """Take up what the observer saw, on the host; called at steps where :func:`is_due`. Of a step that is not whole, nothing."""

    def _needs_size(self, p: Tensor) -> bool:
        """Whether a step needs the parameter's own norm beside its gradient's."""
        return False

    @abstractmethod
    def _follow(self, parts: list[Part], finite: Tensor) -> None:
        """Set the paces by this step's gradients, without waiting for the device."""

    @abstractmethod
    def _update(self, part: Part, finite: Tensor) -> None:
        """Move the parameters of one group where ``finite``."""

    @property
    def skipped_steps(self) -> int:
        """Steps since this optimizer was built that changed nothing, as their gradients were not all finite."""
        return 0 if self._skipped is None else int(self._skipped)

    def detach(self) -> None:
        """Take this optimizer's hooks off the model; what it measured stays as it is from then on. So does deleting the optimizer."""
        if self._observer is not None:
            self._observer.remove()
        self._observer = None

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
        # A compiled step has no use for a count that would make it another graph every time.
        if self._observer is not None or self._watches_later or not torch.compiler.is_compiling():
            self._on_host()
        parts = [part for part in map(self._part, self.param_groups) if part is not None]
        if parts and self.cuda_graph and self._is_replayed(parts):
            self._replayed(parts)
        elif parts:
            if self._replay is not None:
                self._replay.let_go("step")  # what that graph reads is kept for the work that comes next
            self._advance(parts)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters from now on, with options of their own; measured if the model owns them.

        Raises:
            TypeError, ValueError: As the constructor does; no group is added then.
        """
        super().add_param_group(self._named(param_group))
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group["step"] = self.param_groups[0]["step"]
        # Hooks on layers have to be on those that are new. The base class calls this too, before anything is observed.
        if not isinstance(self.__dict__.get("_observer"), (InputObserver, type(None))):
            self.detach()
            self._observer = self._observe()
            self._wake_observer(group["step"])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise if a setting of a new group, or a parameter of it, is none that a step can take."""
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        check_in("lr", float(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"], 0.0)
        check_in("momentum", group["momentum"], 0.0, 1.0)
        check_in("weight_decay", group["weight_decay"], 0.0)
        check_in("decay_floor", group["decay_floor"], 0.0)
        if "max_change" in group:
            check_in("max_change", group["max_change"], 0.0, math.inf, low_open=True, high_open=False)
        if group["nesterov"] and group["momentum"] == 0.0:
            raise ValueError("Invalid nesterov: True with momentum 0.0. Nesterov momentum needs momentum > 0; set nesterov=False.")
        for p in group["params"]:
            if p.is_complex() or p.is_sparse:
                kind = "complex" if p.is_complex() else "sparse"
                raise TypeError(
                    f"Invalid parameter: {kind}, of shape {list(p.shape)}. {type(self).__name__} takes real, dense ones; "
                    "leave it to another optimizer."
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's; what was observed of the gradients that go, as of a step that was skipped, is forgotten."""
        super().zero_grad(set_to_none)
        if self._observer is not None and not torch.compiler.is_compiling():
            self._observer.forget()

    def _named(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """The group with its names in the model where those before it have some, which torch asks of all or none."""
        given = param_group.get("params") if isinstance(param_group, dict) else None
        if given is None or isinstance(given, set) or self._model is None or not any("param_names" in g for g in self.param_groups):
            return param_group
        params = [given] if isinstance(given, Tensor) else list(given)
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        if all(isinstance(p, Tensor) and p in names for p in params):
            params = [(names[p], p) for p in params]
        return param_group | {"params": params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` stood; also between two measurements."""
        # Hooks of ours next to the loading itself: hooks of the user may replace what is loaded, and change what was.
        final: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, state_dict: final.update(self._checked(state_dict)))
        after = self.register_load_state_dict_post_hook(lambda _: self._complete(final), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        foreign = "its groups hold no 'step'" if any("step" not in g for g in state_dict["param_groups"]) else self._foreign(state_dict)
        if foreign:
            raise ValueError(
                f"Invalid state_dict: {foreign}, so it is not one of {type(self).__name__}. Load it into the optimizer that saved it."
            )
        return state_dict

    def _foreign(self, state_dict: dict[str, Any]) -> str:
        """What shows that one of the other optimizers here saved it, whose momentum is in other units; empty if nothing does."""
        return ""

    def _complete(self, state_dict: dict[str, Any]) -> None:
        """Restore of the loaded ``state_dict`` what the base class changes."""
        # It casts floating state to the parameter's dtype; averages in bfloat16 would lose what they average.
        saved_ids = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, p in zip(saved_ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and name != "momentum_buffer":
                    self.state[p][name] = value.detach().to(p.device, copy=True)
                    if value.dtype == torch.float32 and name != "measurements":
                        self.state[p][name] = self.state[p][name].to(wide(p.dtype))  # saved of a network that was narrower
                elif name == "measurements":  # a number in older checkpoints
                    self.state[p][name] = torch.tensor(float(value), device=p.device)
        for group in self.param_groups:
            group["step"] = int(group["step"])  # checkpoint formats of tensors alone make a tensor of it
        self._wake_observer(self.param_groups[0]["step"])

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches the copied model by hooks of its own.
        own = {name: value for name, value in self.__dict__.items() if name in self._kept}
        return super().__getstate__() | own | {"_watching": self._observer is not None or self._watches_later}

    def __setstate__(self, state: dict[str, Any]) -> None:
        watching = state.pop("_watching", None)  # None: called by load_state_dict
        super().__setstate__(state)
        for settings in (self.defaults, *self.param_groups):
            for name, value in _OLDER.items():
                settings.setdefault(name, value)
        if watching is not None:
            self._units = {}
            # A model that holds its optimizer, and is copied with it, is not whole before the optimizer is.
            self._watches_later = watching and self._model is not None and "_modules" not in vars(self._model)
            self._observer = self._observe() if watching and not self._watches_later else None
            self._wake_observer(self.param_groups[0]["step"])

    def _wake_observer(self, step: int) -> None:
        """Have it watch the forward calls before ``step`` if that measures."""
        if self._observer is not None:
            self._observer.active = is_due(step, self.interval)

    def _names(self) -> dict[Tensor, str]:
        """Every parameter of the groups and what it is called: in the model, or else in its group."""
        in_model = {p: name for name, p in self._model.named_parameters()} if self._model is not None else {}
        names: dict[Tensor, str] = {}
        taken: set[str] = set()
        for i, group in enumerate(self.param_groups):
            given = group.get("param_names", [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))])
            for j, (p, name) in enumerate(zip(group["params"], given, strict=True)):
                name = in_model.get(p, name)
                # Parameters of two modules, given with the names that they have there, may share one.
                names[p] = name if name not in taken else f"param_groups[{i}]['params'][{j}]"
                taken.add(names[p])
        return names

    def _units_of(self, p: Tensor) -> Units | None:
        """The output units of a parameter; None for a vector. Without a model the first dimension of every matrix counts them."""
        if p not in self._units:
            model = Module() if self._model is None else self._model
            dims, inputs, owned = unit_dims(model), fan_ins(model), {q: name for name, q in model.named_parameters()}
            for q in (q for group in self.param_groups for q in group["params"]):
                name = owned.get(q)
                if name in dims:
                    self._units[q] = Units(dims[name], inputs[name])
                else:
                    self._units[q] = Units(0, q.numel() // q.shape[0]) if name is None and q.ndim > 1 and q.numel() else None
        return self._units[p]

    def _part(self, group: dict[str, Any]) -> Part | None:
        """What one group brings to a step; None without gradients."""
        params = [p for p in group["params"] if p.grad is not None and p.numel()]  # what has no elements has no mean square
        if not params:
            return None
        grads = [local(p.grad) for p in params if p.grad is not None]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            self._initialise(p, state)
        # torch.optim takes a lr of any shape with one element; kernels want it 0-dim.
        lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
        return Part(group, params, grads, states, [], [], lr)

    def _advance(self, parts: list[Part]) -> None:
        """All that a step does on the device."""
        self._measure_norms(parts)
        finite = self._all_finite([norm for part in parts for norm in part.norms])
        self._follow(parts, finite)
        for part in parts:
            self._update(part, finite)

    def _is_replayed(self, parts: list[Part]) -> bool:
        """Whether a graph can do the work of these: all of it on one GPU, nothing of DTensors, and in no graph of the caller's own."""
        params = [p for part in parts for p in part.params]
        devices = {p.device for p in params} | ({self._skipped.device} if self._skipped is not None else set())
        if torch.compiler.is_compiling() or len(devices) > 1 or not params[0].is_cuda or any(local(p) is not p for p in params):
            return False
        return not torch.cuda.is_current_stream_capturing()

    def _replayed(self, parts: list[Part]) -> None:
        """:meth:`_advance` as a graph, which reads gradients and learning rates from where they are copied."""
        self._replay = self._replay or Replay()
        grads = [grad for part in parts for grad in part.grads]
        # Always tensors, so that steps in and out of the graph are the same to the last bit.
        lrs = [_lr_on(grads[0].device, wide(part.params[0].dtype), part.lr) for part in parts]

        def work(inputs: Sequence[Tensor]) -> None:
            read = iter(inputs)
            moved = [replace(part, grads=[next(read) for _ in part.grads], norms=[], sizes=[]) for part in parts]
            self._advance([replace(part, lr=next(read)) for part in moved])

        self._replay.run("step", work, [*grads, *lrs], self._place(parts))

    def _place(self, parts: list[Part]) -> object:
        """What a step decides by on the host, and where all that it reads and writes in place lies."""
        own = [value for name in sorted(self._kept) if isinstance(value := getattr(self, name, None), (bool, int, float, str))]
        groups = [[(k, v) for k, v in part.group.items() if k not in ("params", "param_names", "lr", "step")] for part in parts]
        counts = [len(part.params) for part in parts]
        held = [value for state in self.state.values() for value in state.values() if isinstance(value, Tensor)]
        held += [p for part in parts for p in part.params]
        return own, groups, counts, places_of(held)

    def _measure_norms(self, parts: list[Part]) -> None:
        """Of all groups at once, as norms of what is sharded take a sum over ranks."""
        params = [p for part in parts for p in part.params]
        paces = [state["pace"] for part in parts for state in part.states]
        sized = [i for i, p in enumerate(params) if self._needs_size(p)]
        tensors = [grad for part in parts for grad in part.grads] + [local(params[i]) for i in sized]
        entries = paces + [paces[i] for i in sized]
        whole = whole_norms(entry_norms(tensors, entries), entries, params + [params[i] for i in sized])
        norms, sizes = iter(whole), dict(zip(sized, whole[len(params) :], strict=True))
        numbers = iter(range(len(params)))
        for part in parts:
            part.norms = [next(norms) for _ in part.params]
            part.sizes = [sizes.get(next(numbers)) for _ in part.params]

    def _all_finite(self, norms: list[Tensor]) -> Tensor:
        """Whether all gradients and their squares are finite, 0-dim, and counted if not: half a step is none of those asked for."""
        # Each in its own dtype: float64 beside float32 would hold squares that are infinite where they are kept.
        kinds = [_flatten_dense_tensors([norms[i] for i in kind]).amax().square().isfinite() for kind in kinds_of(norms)]
        finite = torch.stack([kind.to(norms[0].device) for kind in kinds]).all()
        if self._skipped is None:
            self._skipped = torch.zeros((), device=finite.device, dtype=torch.int64)
        self._skipped.add_((~finite).to(self._skipped.device))
        return finite

    def _is_whole(self) -> Tensor:
        """What :meth:`_all_finite` will say of what this rank holds of this step's gradients, 0-dim."""
        grads = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        kinds = [[grads[i] for i in chosen] for chosen in kinds_of(grads)]
        norms = [norm.to(grads[0].device) for kind in kinds for norm in torch._foreach_norm(kind, 2, wide(kind[0].dtype))]
        return torch.stack(norms).square().isfinite().all() if norms else torch.ones((), dtype=torch.bool)

    @torch.compiler.disable
    def _on_host(self) -> None:
        """What a step does on the host: check, count, and take up what was observed when it is due."""
        count = self.param_groups[0]["step"]
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"The gradient of '{self._names()[p]}' {list(p.shape)} is sparse, which {type(self).__name__} does not support. "
                    "Build its embedding with sparse=False."
                )
        if self._watches_later:
            self._watches_later = False
            self._observer = self._observe()  # from the next forward on
        elif is_due(count, self.interval):
            self._tell_of_skipped()
            self._refresh(seed=count)
        for group in self.param_groups:
            group["step"] += 1
        self._wake_observer(count + 1)

    def _tell_of_skipped(self) -> None:
        count = self._skipped_lately()
        if count and f"skipped {count}" not in self._told_of:
            self._told_of.add(f"skipped {count}")
            warn_user(
                f"{type(self).__name__} skipped {count} steps so far whose gradients, or their squares, were NaN or infinite. "
                "Look at the loss and the data; clip gradients, or lower lr."
            )

    def _skipped_lately(self) -> int:
        """``skipped_steps``; of a GPU, which is not waited for, as it stood when last asked for."""
        if self._skipped is None or not self._skipped.is_cuda:
            return self.skipped_steps
        if self._late_count is not None and not self._late_count[1].query():
            return 0
        count = 0 if self._late_count is None else int(self._late_count[0])
        with torch.cuda.device(self._skipped.device):
            copy, event = torch.empty_like(self._skipped, device="cpu", pin_memory=True), torch.cuda.Event()
            self._late_count = copy.copy_(self._skipped, non_blocking=True), event
            event.record()
        return count


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
    if not isinstance(model_or_params, Module):
        return model, model_or_params
    named = [(name, p) for name, p in model_or_params.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("The model has no trainable parameter. Check requires_grad, or whether this is the model that you train.")
    return model, named


def check_whole(name: str, count: int) -> None:
    """Raise unless ``count`` is a whole number of at least 1."""
    check_in(name, count, 1)
    if not isinstance(count, int):
        raise TypeError(f"Invalid {name}: {count!r}. Must be a whole number.")


def _lr_on(device: torch.device, dtype: torch.dtype, lr: float | Tensor) -> Tensor:
    """A learning rate on a device, which is not waited for."""
    if isinstance(lr, Tensor) and lr.device == device:
        return lr.to(dtype)
    return torch.full((), float(lr), device=device, dtype=dtype)


def is_due(step: int, interval: int) -> bool:
    """Whether to measure at ``step`` (from 0): every ``min(interval, step / 4)`` steps, at each of the first 8."""
    return step % min(interval, max(1, step // 4)) == 0


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is averaged over steps: float32, or float64 for parameters of it."""
    return torch.float64 if dtype == torch.float64 else torch.float32
