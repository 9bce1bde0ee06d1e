"""The contract of torch.optim: from bare parameters over torch's own tables, then with the estimator at work on a model."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
    optim_inputs_func_sgd,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from backmatch import BackMatchSGD
from backmatch.ladder import BackMatch
from tests.reference import Reference
from tests.test_optimizer import batch, conv_net, train_steps

SGD_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """SGD's settings but for dampening, which we lack, and our own."""
    own: list[dict[str, Any]] = [{"momentum": 0.0, "nesterov": False}, {"nesterov": False}, {"max_change": 0.01, "lr": 0.05}]
    own += [
        {"maximize": True},
        {"per": "tensor"},
        {"estimator": "probe"},
        {"max_stretch": math.inf},
        {"max_stretch": 0.002, "lr": 0.05},
        {"decay_floor": 0.3, "weight_decay": 0.5},
    ]
    theirs = [given for given in optim_inputs_func_sgd(device) if "dampening" not in given.kwargs]
    return theirs + [OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in own]


INFO = OptimizerInfo(
    BackMatchSGD,
    optim_inputs_func=inputs,
    optim_error_inputs_func=get_error_inputs_for_all_optims,
    scheduler_inputs=SGD_INFO.scheduler_inputs,
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "maximize"),
    supports_sparse=False,
    supports_complex=False,
)
assert_equal = partial(assert_close, rtol=0.0, atol=0.0)
over_inputs = optims([INFO], dtypes=[torch.float64])


class Bowl:
    """``Σ c ‖θ − t‖² / 2``, a loss whose gradient ``c (θ − t)`` is known; c differs by tensor."""

    def __init__(self, device: str, dtype: torch.dtype, *, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in ((4, 3), (5,), ())]
        if not contiguous:
            values[0] = values[0].T.contiguous().T
            values[1] = torch.stack([values[1], values[1]], dim=1)[:, 0]
        self.params = [nn.Parameter(value) for value in values]
        self.targets = [torch.full_like(p, 0.5) for p in self.params]
        self.curvatures = [1.0, 2.0, 0.25]
        assert contiguous == all(p.is_contiguous() for p in self.params)

    def __call__(self) -> Tensor:
        for p in self.params:
            p.grad = None
        parts = zip(self.curvatures, self.params, self.targets, strict=True)
        loss = torch.stack([c * (p - t).square().sum() / 2 for c, p, t in parts]).sum()
        loss.backward()
        return loss.detach()

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"layer{i}", p) for i, p in enumerate(self.params)]

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def reference(self, *, per: str = "unit", estimator: str = "gradient") -> Reference:
        """The stated equations from here on; without a model other estimators have a pace of 1."""
        absolute: dict[str, Any] = {} if estimator == "gradient" else {"power": 0.0, "relative": False}
        return Reference(self.params, [0 if p.ndim > 1 else None for p in self.params], per=per, **absolute)

    def grads(self, values: list[Tensor]) -> list[Tensor]:
        return [c * (value - t) for c, value, t in zip(self.curvatures, values, self.targets, strict=True)]


def numbered(optimizer: BackMatchSGD) -> list[dict[str, Any]]:
    return optimizer.state_dict()["param_groups"]


def of_constructor(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Settings that no group keeps."""
    return {name: kwargs[name] for name in ("estimator", "per") if name in kwargs}


def step_times(optimizer: BackMatchSGD, bowl: Bowl, count: int) -> None:
    for _ in range(count):
        bowl()
        optimizer.step()


class TestContract(TestCase):
    def cases(self, info: OptimizerInfo, device: str) -> Iterator[dict[str, Any]]:
        for given in info.optim_inputs_func(device=device):
            yield copy.deepcopy(given.kwargs)

    @over_inputs
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for case in optim_info.optim_error_inputs_func(device, dtype):
            given = case.optimizer_error_input
            params = Bowl(device, dtype).params if given.params is None else given.params
            check = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
            with check(case.error_type, match=case.error_regex):
                BackMatchSGD(params, **given.kwargs)
        with pytest.raises(ValueError, match="Invalid momentum: -0.5"):
            BackMatchSGD(Bowl(device, dtype).params, momentum=-0.5)

    @parametrize("contiguous", [True, False])
    @parametrize("with_scheduler", [True, False])
    @over_inputs
    def test_forloop_goes_right_direction(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, contiguous: bool, with_scheduler: bool
    ) -> None:
        for kwargs in self.cases(optim_info, device):
            for builders in optim_info.scheduler_inputs if with_scheduler else ([],):
                bowl, expected = Bowl(device, dtype, contiguous=contiguous), Bowl(device, dtype).reference(**of_constructor(kwargs))
                optimizer = BackMatchSGD(bowl.params, foreach=False, **copy.deepcopy(kwargs))
                self.directed(optimizer, bowl, expected, builders)

    @over_inputs
    def test_param_group_with_lrscheduler_goes_right_direction(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for builders in optim_info.scheduler_inputs:
            bowl = Bowl(device, dtype)
            groups = [{"params": bowl.params[:2]}, {"params": bowl.params[2:], "lr": 0.002}]
            self.directed(BackMatchSGD(groups, lr=0.02), bowl, bowl.reference(), builders)

    def directed(self, optimizer: BackMatchSGD, bowl: Bowl, expected: Reference, builders: list[Callable[..., Any]]) -> None:
        """Down, or up if maximizing, along the equations at the rates that the schedulers set."""
        schedulers = [build(optimizer) for build in builders]
        first = bowl()
        for _ in range(12):
            loss = bowl()
            expected.step(bowl.grads(expected.params), numbered(optimizer))
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(loss) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
        # A lr in a float32 tensor makes float32 of 1 − γλ.
        assert_close(bowl.values(), expected.params, rtol=1e-6, atol=1e-6)
        assert bowl() > first if optimizer.defaults["maximize"] else bowl() < first

    @parametrize("ndim", [0, 1, 2])
    @parametrize("foreach", [False, True])
    @over_inputs
    def test_tensor_lr(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, ndim: int, foreach: bool) -> None:
        for kwargs in self.cases(optim_info, device):
            lr = float(kwargs.pop("lr", 0.1))
            plain, tensor = Bowl(device, dtype), Bowl(device, dtype)
            lr_tensor = torch.tensor(lr, dtype=dtype).reshape([1] * ndim)
            step_times(BackMatchSGD(plain.params, lr, foreach=foreach, **kwargs), plain, 5)
            optimizer = BackMatchSGD(tensor.params, lr_tensor, foreach=foreach, **kwargs)
            step_times(optimizer, tensor, 5)
            assert_close(tensor.values(), plain.values(), rtol=1e-12, atol=0.0)
            assert optimizer.param_groups[0]["lr"] is lr_tensor
            assert_equal(lr_tensor, torch.full([1] * ndim, lr, dtype=dtype))

    @over_inputs
    def test_param_groups_weight_decay(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        self.grouped(device, dtype, optim_info, "weight_decay")

    @over_inputs
    def test_param_groups_lr(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        self.grouped(device, dtype, optim_info, "lr")

    def grouped(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, option: str) -> None:
        for kwargs in self.cases(optim_info, device):
            kwargs.pop(option, None)
            bowl, expected = Bowl(device, dtype), Bowl(device, dtype).reference(**of_constructor(kwargs))
            groups = [{"params": bowl.params[:1], option: 0.25}, {"params": bowl.params[1:2]}, {"params": bowl.params[2:], option: 0.0625}]
            optimizer = BackMatchSGD(groups, **kwargs, **{option: 0.125})
            assert [group[option] for group in optimizer.param_groups] == [0.25, 0.125, 0.0625]
            for _ in range(6):
                bowl()
                expected.step(bowl.grads(expected.params), numbered(optimizer))
                optimizer.step()
            assert_close(bowl.values(), expected.params, rtol=1e-6, atol=1e-6)

    @over_inputs
    def test_step_is_noop_when_params_have_no_grad(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for kwargs in self.cases(optim_info, device):
            bowl = Bowl(device, dtype)
            before = bowl.values()
            optimizer = BackMatchSGD(bowl.params, **kwargs)
            optimizer.step()
            assert_equal(bowl.values(), before)
            assert optimizer.state_dict()["state"] == {}

    @parametrize("foreach", [False, True])
    @over_inputs
    def test_step_is_noop_for_zero_grads(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, foreach: bool) -> None:
        for kwargs in self.cases(optim_info, device):
            bowl = Bowl(device, dtype)
            before = bowl.values()
            for p in bowl.params:
                p.grad = torch.zeros_like(p)
            decay, lr = kwargs.setdefault("weight_decay", 0.0), kwargs.setdefault("lr", 0.1)
            kwargs["decay_floor"] = 0.0
            BackMatchSGD(bowl.params, foreach=foreach, **kwargs).step()
            assert_close(bowl.values(), [value * (1.0 - float(lr) * decay) for value in before], rtol=1e-7 if decay else 0.0, atol=0.0)

    @over_inputs
    def test_optimizer_can_be_printed(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for kwargs in self.cases(optim_info, device):
            bowl = Bowl(device, dtype)
            optimizer = BackMatchSGD(bowl.params, **kwargs)
            step_times(optimizer, bowl, 1)
            text = repr(optimizer)
            assert text.startswith("BackMatchSGD (\nParameter Group 0\n")
            for name, value in optimizer.param_groups[0].items():
                assert (f"    {name}: {value}\n" in text) == (name != "params")

    @over_inputs
    def test_state_dict_deterministic(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A loaded optimizer continues like the one saved, as often as one likes; so with weights_only, and named or not."""
        for kwargs in self.cases(optim_info, device):
            self.continues(device, dtype, kwargs, copy.deepcopy)

    @over_inputs
    def test_save_load_equality_with_weights_only(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for kwargs in self.cases(optim_info, device):
            self.continues(device, dtype, kwargs, through_file)

    @over_inputs
    def test_load_nontensor_step(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Our count is a number of the group; it may come as a tensor."""
        for kwargs in self.cases(optim_info, device):
            self.continues(device, dtype, kwargs, with_tensor_step)

    @over_inputs
    def test_can_load_older_state_dict(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        def older(state: dict[str, Any]) -> dict[str, Any]:
            state = copy.deepcopy(state)
            for group in state["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    del group[flag]
            return state

        for kwargs in self.cases(optim_info, device):
            kwargs.pop("maximize", None)
            loaded = self.continues(device, dtype, kwargs, older)
            assert [(group["maximize"], group["foreach"]) for group in loaded.param_groups] == [(False, None)] * 2

    @parametrize("named_before", [False, True])
    @parametrize("named_after", [False, True])
    @over_inputs
    def test_can_load_from_to_named_state_dict(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, named_before: bool, named_after: bool
    ) -> None:
        for kwargs in self.cases(optim_info, device):
            loaded = self.continues(device, dtype, kwargs, copy.deepcopy, named_before=named_before, named_after=named_after)
            names = [["layer0", "layer1"], ["layer2"]] if named_before or named_after else [None, None]
            assert [group.get("param_names") for group in loaded.param_groups] == names

    def continues(
        self,
        device: str,
        dtype: torch.dtype,
        kwargs: dict[str, Any],
        transport: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        named_before: bool = False,
        named_after: bool = False,
    ) -> BackMatchSGD:
        """Two optimizers built at another rate, loaded with what ``transport`` makes of the state, go where the saved one goes."""

        def build(bowl: Bowl, named: bool, **kwargs: Any) -> BackMatchSGD:
            params: list[Any] = bowl.named() if named else bowl.params
            return BackMatchSGD([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.03}], **kwargs)

        bowl = Bowl(device, dtype)
        optimizer = build(bowl, named_before, **kwargs)
        step_times(optimizer, bowl, 3)
        saved, stood = transport(optimizer.state_dict()), bowl.values()
        step_times(optimizer, bowl, 9)
        for _ in range(2):
            again = Bowl(device, dtype)
            for p, value in zip(again.params, stood, strict=True):
                p.data.copy_(value)
            loaded = build(again, named_after, lr=0.7, momentum=0.5, **of_constructor(kwargs))
            loaded.load_state_dict(copy.deepcopy(saved))
            assert [(group["step"], type(group["step"])) for group in loaded.param_groups] == [(3, int)] * 2
            step_times(loaded, again, 9)
            assert_equal(again.values(), bowl.values())
            assert_equal(loaded.state_dict()["state"], optimizer.state_dict()["state"])
        return loaded

    @over_inputs
    def test_state_dict_pre_hook(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        optimizer = BackMatchSGD(Bowl(device, dtype).params, lr=0.1)
        handle = optimizer.register_state_dict_pre_hook(lambda opt: opt.param_groups[0].update(lr=0.3))
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.3
        handle.remove()
        optimizer.param_groups[0]["lr"] = 0.1
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1

    @over_inputs
    def test_state_dict_post_hook(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        optimizer = BackMatchSGD(Bowl(device, dtype).params)
        optimizer.register_state_dict_post_hook(lambda opt, state: {"only": sorted(state)})
        assert optimizer.state_dict() == {"only": ["param_groups", "state"]}

    @over_inputs
    def test_state_dict_pre_post_hook(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        optimizer, calls = BackMatchSGD(Bowl(device, dtype).params), []
        optimizer.register_state_dict_post_hook(lambda opt, state: calls.append("post"))
        optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))
        optimizer.register_state_dict_pre_hook(lambda opt: calls.append("first"), prepend=True)
        optimizer.state_dict()
        assert calls == ["first", "pre", "post"]

    @over_inputs
    def test_load_state_dict_pre_hook_and_prepend(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """What a hook returns is what is loaded: its count, its options and its paces, unrounded by bfloat16 parameters."""
        bowl = Bowl(device, torch.bfloat16)
        optimizer = BackMatchSGD(bowl.params)
        step_times(optimizer, bowl, 2)
        state = optimizer.state_dict()
        bare = {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}
        pace = torch.tensor(1.0 + 2**-20)

        def replace(opt: BackMatchSGD, given: dict[str, Any]) -> dict[str, Any]:
            assert given == bare
            return {**state, "state": {i: {**entry, "pace": pace} for i, entry in state["state"].items()}}

        def count(opt: BackMatchSGD, given: dict[str, Any]) -> None:
            assert [group["step"] for group in given["param_groups"]] == [2]
            given["param_groups"] = [{**group, "step": 7} for group in given["param_groups"]]

        loaded = BackMatchSGD(bowl.params)
        loaded.register_load_state_dict_pre_hook(count)
        loaded.register_load_state_dict_pre_hook(replace, prepend=True)
        loaded.load_state_dict(bare)
        assert numbered(loaded)[0]["step"] == 7
        assert_equal(list(loaded.paces().values()), [pace] * 3)

    @over_inputs
    def test_load_state_dict_post_hook(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        bowl = Bowl(device, dtype)
        optimizer = BackMatchSGD(bowl.params)
        step_times(optimizer, bowl, 1)
        doubled = [pace * 2 for pace in optimizer.paces().values()]

        def double(opt: BackMatchSGD) -> None:
            for p in bowl.params:
                opt.state[p]["pace"] = opt.state[p]["pace"] * 2

        optimizer.register_load_state_dict_post_hook(double)
        optimizer.load_state_dict(optimizer.state_dict())
        assert_equal(list(optimizer.paces().values()), doubled)

    @over_inputs
    def test_load_state_dict_pre_post_hook(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        optimizer, calls = BackMatchSGD(Bowl(device, dtype).params), []
        optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("post"))
        optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("pre"))
        optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("first post"), prepend=True)
        for _ in range(2):  # loading leaves no hook of its own
            optimizer.load_state_dict(optimizer.state_dict())
        assert calls == ["pre", "first post", "post"] * 2
        assert [len(optimizer._optimizer_load_state_dict_pre_hooks), len(optimizer._optimizer_load_state_dict_post_hooks)] == [1, 2]

    @over_inputs
    def test_step_post_hook(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        self.hooked(device, dtype, lambda opt, hook: opt.register_step_post_hook(hook), sees_step=True)

    @over_inputs
    def test_step_pre_hook(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        self.hooked(device, dtype, lambda opt, hook: opt.register_step_pre_hook(hook), sees_step=False)

    def hooked(self, device: str, dtype: torch.dtype, register: Callable[..., Any], *, sees_step: bool) -> None:
        bowl = Bowl(device, dtype)
        optimizer, seen = BackMatchSGD(bowl.params), []
        handle = register(optimizer, lambda opt, args, kwargs: seen.append((opt, opt.param_groups[0]["step"])))
        step_times(optimizer, bowl, 2)
        handle.remove()
        step_times(optimizer, bowl, 1)
        assert seen == [(optimizer, step + sees_step) for step in range(2)]

    @over_inputs
    def test_step_all_hooks(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        bowl, calls = Bowl(device, dtype), []
        optimizer = BackMatchSGD(bowl.params)

        def note(name: str) -> Callable[..., None]:
            return lambda opt, args, kwargs: calls.append(name)

        handles = [register_optimizer_step_pre_hook(note("global pre")), register_optimizer_step_post_hook(note("global post"))]
        optimizer.register_step_post_hook(note("post"))
        optimizer.register_step_pre_hook(note("pre"))
        try:
            optimizer.step(lambda: calls.append("closure") or bowl())
            copy.deepcopy(optimizer).step()  # a copy has none of its own
        finally:
            for handle in handles:
                handle.remove()
        assert calls == ["global pre", "pre", "closure", "post", "global post", "global pre", "global post"]

    @over_inputs
    def test_deepcopy_copies_all_public_attrs(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        def public(optimizer: BackMatchSGD) -> dict[str, Any]:
            keyed_by_parameters = ("state", "param_groups")
            return {name: value for name, value in vars(optimizer).items() if name[0] != "_" and name not in keyed_by_parameters}

        for kwargs in self.cases(optim_info, device):
            bowl = Bowl(device, dtype)
            optimizer = BackMatchSGD(bowl.params, interval=3, beta=0.5, bound=7.0, samples=5, power=0.25, **kwargs)
            step_times(optimizer, bowl, 2)
            for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                copied.defaults.pop("differentiable", None)  # which torch.optim.Optimizer adds
                assert public(copied) == public(optimizer)
                assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
                assert_equal(copied.state_dict()["state"], optimizer.state_dict()["state"])
                assert {*map(id, copied.state)}.isdisjoint(map(id, optimizer.state))

    @over_inputs
    def test_non_empty_state(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for kwargs in self.cases(optim_info, device):
            bowl = Bowl(device, dtype)
            optimizer = BackMatchSGD(bowl.params, **kwargs)
            bowl()
            bowl.params[1].grad = None
            optimizer.step()
            measured: set[str] = set() if "estimator" in kwargs else {"response", "measurements"}
            matrix, scalar = bowl.params[::2]
            kept = {"momentum_buffer", "pace"} | measured
            axes = {"axes"} if optimizer.defaults["max_stretch"] < math.inf else set()
            assert {p: set(state) for p, state in optimizer.state.items()} == {matrix: kept | axes, scalar: kept}

    @parametrize("mixed", [False, True])
    @over_inputs
    def test_foreach_matches_forloop(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, mixed: bool) -> None:
        for kwargs in self.cases(optim_info, device):
            ends = []
            for foreach in (False, True):
                bowl = Bowl(device, dtype)
                if mixed:
                    bowl.params[0].data, bowl.targets[0] = bowl.params[0].data.float(), bowl.targets[0].float()
                optimizer = BackMatchSGD(bowl.params, foreach=foreach, **kwargs)
                if mixed:
                    for c, p, t in zip(bowl.curvatures, bowl.params, bowl.targets, strict=True):
                        p.grad = c * (p.detach() - t)
                    optimizer.step()
                else:
                    step_times(optimizer, bowl, 5)
                ends.append(bowl.values())
            assert_equal(*ends)

    @over_inputs
    def test_what_is_not_supported_is_refused(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """test_complex, test_complex_2d, test_rosenbrock_sparse; differentiable is not supported."""
        for shape in ((3,), (3, 2)):
            p = nn.Parameter(torch.ones(shape, dtype=torch.complex64))
            with pytest.raises(TypeError, match=r"complex, of shape \[3.*another optimizer"):
                BackMatchSGD([p])
        for option in ("differentiable", "fused", "capturable", "dampening"):
            with pytest.raises(TypeError, match=option):
                BackMatchSGD(Bowl(device, dtype).params, **{option: True})
        bowl = Bowl(device, dtype)
        optimizer, before = BackMatchSGD(bowl.named()), bowl.values()
        bowl()
        bowl.params[1].grad = torch.ones(5, dtype=dtype).to_sparse()
        with pytest.raises(RuntimeError, match=r"gradient of 'layer1' \[5\] is sparse.*sparse=False"):
            optimizer.step()
        assert_equal(bowl.values(), before)
        assert (optimizer.state_dict()["state"], numbered(optimizer)[0]["step"]) == ({}, 0)


instantiate_device_type_tests(TestContract, globals(), only_for=("cpu",))


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_tensor_step(state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group["step"] = torch.tensor(float(group["step"]))
    return state


# From here on a model, with the estimator at work.

WATCHING = ["probe", "rules", "loss"]
ESTIMATORS = ["gradient", *WATCHING]


def settings(estimator: str, **kwargs: Any) -> dict[str, Any]:
    return {"lr": 0.02 if estimator == "gradient" else 0.1, "interval": 3, "estimator": estimator, **kwargs}


def assert_same(ours: tuple[nn.Module, BackMatchSGD], theirs: tuple[nn.Module, BackMatchSGD], *, rtol: float = 0.0) -> None:
    """Weights, momentum, responses and paces; that there are responses at all too."""
    assert all("response" in entry for entry in theirs[1].state_dict()["state"].values())
    assert_close(dict(ours[0].state_dict()), dict(theirs[0].state_dict()), rtol=rtol, atol=rtol)
    assert_close(ours[1].state_dict()["state"], theirs[1].state_dict()["state"], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("given", ["named_parameters", "parameters", "groups"])
def test_parameters_with_their_model_equal_the_model(estimator: str, given: str) -> None:
    ours, theirs = conv_net(), conv_net()
    params = [{"params": ours.parameters()}] if given == "groups" else getattr(ours, given)()
    mine, reference = BackMatchSGD(params, model=ours, **settings(estimator)), BackMatchSGD(theirs, **settings(estimator))
    train_steps(ours, mine, range(7))
    train_steps(theirs, reference, range(7))
    assert_same((ours, mine), (theirs, reference))
    assert mine.paces().keys() == reference.paces().keys() == dict(ours.named_parameters()).keys()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "other", [{"foreach": True}, {"maximize": True}, {"lr": torch.tensor([0.02], dtype=torch.float64)}], ids=["foreach", "maximize", "lr"]
)
def test_a_step_by_another_way_is_the_same_step(estimator: str, other: dict[str, Any]) -> None:
    """foreach equals the for-loop, maximize equals minimising the negated loss, a tensor as lr equals the number."""
    pairs = []
    for kwargs in ({"foreach": False}, other):
        net = conv_net(torch.float64)
        optimizer = BackMatchSGD(net, **settings(estimator, **{"lr": 0.02} | kwargs))
        for step in range(7):
            x, y = batch(step, torch.float64)
            torch.manual_seed(step)
            optimizer.zero_grad()
            (nn.functional.cross_entropy(net(x), y) * (-1 if "maximize" in kwargs else 1)).backward()
            optimizer.step()
        pairs.append((net, optimizer))
    assert_same(*pairs, rtol=1e-12 if "lr" in other else 0.0)  # a product with a tensor rounds once more


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 4]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.8)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=7),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.8)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=6, power=0.9),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_among_those_tested() -> None:
    known = {name for name, value in vars(lr_scheduler).items() if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler)}
    assert known - {"LRScheduler", "_LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_rates_arrive_in_the_step(name: str, as_tensor: bool) -> None:
    net = conv_net(torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    optimizer = BackMatchSGD(net, lr, momentum=0.9, nesterov=False, weight_decay=0.02, decay_floor=0.0, max_stretch=math.inf)
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)  # only its schedule is used
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](sgd)
    buffers = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    rates = []
    for step in range(8):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        train_steps(net, optimizer, range(step, step + 1))
        rate, momentum = sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]
        rates.append(float(rate))
        for key, p in net.named_parameters():
            assert p.grad is not None
            buffers[key] = momentum * buffers[key] + optimizer.paces()[key] * p.grad
            assert_close(p.detach(), (1 - rate * 0.02) * before[key] - rate * buffers[key])
        net.zero_grad()
        sgd.step()
        for scheduler in (ours, theirs):
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    assert len(set(rates)) > 1


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_groups_keep_rates_of_their_own(per: str, estimator: str) -> None:
    """One measurement serves all groups; each steps by its own lr, momentum and decay."""
    net, plain = conv_net(torch.float64), conv_net(torch.float64)
    options = {"0": {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1}, "1": {"lr": 0.05}, "5": {"nesterov": True}}
    groups = [{"params": list(net[int(i)].named_parameters(prefix=i)), **option} for i, option in options.items()]
    chosen: dict[str, Any] = {"estimator": estimator, "per": per}
    usual = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "decay_floor": 0.0, "nesterov": False}
    optimizer = BackMatchSGD(groups, model=net, max_change=math.inf, max_stretch=math.inf, interval=3, **usual, **chosen)
    buffers = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(5):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        train_steps(net, optimizer, range(step, step + 1))
        if step == 0:
            reference = BackMatchSGD(plain, **chosen)
            train_steps(plain, reference, range(1))
            assert_equal(optimizer.paces(), reference.paces())
        for name, p in net.named_parameters():
            group = usual | options[name[0]]
            assert p.grad is not None
            paced = optimizer.paces()[name] * p.grad
            buffers[name] = group["momentum"] * buffers[name] + paced
            move = paced + group["momentum"] * buffers[name] if group["nesterov"] else buffers[name]
            assert_close(p.detach(), (1 - group["lr"] * group["weight_decay"]) * before[name] - group["lr"] * move)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("named", "transport"), [((False, True), through_file), ((True, False), with_tensor_step)])
def test_a_checkpoint_goes_between_the_ways_to_build(
    estimator: str, named: tuple[bool, bool], transport: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    net = conv_net()

    def build(net: nn.Module, named: bool) -> BackMatchSGD:
        return BackMatchSGD(net.named_parameters() if named else net.parameters(), model=net, **settings(estimator))

    optimizer = build(net, named[0])
    train_steps(net, optimizer, range(4))
    again = copy.deepcopy(net)
    resumed = build(again, named[1])
    resumed.load_state_dict(transport(optimizer.state_dict()))
    train_steps(net, optimizer, range(4, 12))
    train_steps(again, resumed, range(4, 12))
    assert_same((net, optimizer), (again, resumed))


def test_a_hook_may_load_by_name() -> None:
    """The recipe of torch's documentation: a pre-hook that sorts what was saved in another order."""
    net = conv_net()
    optimizer = BackMatchSGD(list(net.named_parameters())[::-1], model=net, **settings("probe", max_change=math.inf))
    train_steps(net, optimizer, range(4))

    def sort(opt: BackMatchSGD, state: dict[str, Any]) -> dict[str, Any]:
        (group,) = state["param_groups"]
        saved = dict(zip(group["param_names"], group["params"], strict=True))
        names = opt.param_groups[0]["param_names"]
        group = {**group, "param_names": names, "params": list(range(len(names)))}
        return {"state": {i: state["state"][saved[name]] for i, name in enumerate(names)}, "param_groups": [group]}

    again = copy.deepcopy(net)
    resumed = BackMatchSGD(again, **settings("probe"))
    resumed.register_load_state_dict_pre_hook(sort)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_steps(net, optimizer, range(4, 12))
    train_steps(again, resumed, range(4, 12))
    assert_equal(dict(again.state_dict()), dict(net.state_dict()))
    assert_equal(resumed.responses(), optimizer.responses())


def test_hooks_of_a_step_stand_around_its_measurement() -> None:
    net = conv_net()
    optimizer, seen = BackMatchSGD(net, **settings("probe")), []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(opt.responses()))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(opt.responses()))
    train_steps(net, optimizer, range(11))
    assert seen[0] == {}
    for step in range(1, 11):  # measured in all but step 9
        before, within = seen[2 * step], seen[2 * step + 1]
        assert_equal(before, seen[2 * step - 1])
        if step == 9:
            assert_equal(within, before)
        else:
            assert not any(torch.equal(within[name], value) for name, value in before.items() if name != "0.bias")


def test_a_pickle_from_before_a_setting_takes_more_groups() -> None:
    optimizer = BackMatchSGD([nn.Parameter(torch.ones(2, 2))])
    state = optimizer.__getstate__()
    for settings in (state["defaults"], *state["param_groups"]):
        del settings["decay_floor"]
    older = BackMatchSGD.__new__(BackMatchSGD)
    older.__setstate__(state)
    older.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert [group["decay_floor"] for group in older.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("stop", [0, 2, 3])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_continue_bit_for_bit(estimator: str, stop: int, copied: Callable[[Any], Any]) -> None:
    net = conv_net()
    optimizer = BackMatchSGD(net, **settings(estimator))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)  # replaces step on the instance
    train_steps(net, optimizer, range(stop))
    if stop:
        scheduler.step()
    other, theirs = copied((net, optimizer))
    third, its = copied((other, theirs))  # a copy of a copy, which waits
    before = copy.deepcopy(net.state_dict())
    train_steps(other, theirs, range(stop, stop + 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    train_steps(net, optimizer, range(stop, stop + 8))
    train_steps(third, its, range(stop, stop + 8))
    assert_same((net, optimizer), (other, theirs))
    assert_same((net, optimizer), (third, its))
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    assert all(p.data_ptr() != q.data_ptr() and optimizer.state[p] is not theirs.state.get(q) for p, q in pairs)
    assert theirs.skipped_steps == 0
    assert {name for name in vars(theirs) if not name.startswith("_")} == {
        name for name in vars(optimizer) if name[0] != "_" and name != "step"
    }


@pytest.mark.parametrize("kind", [BackMatchSGD, BackMatch])
def test_hooks_of_state_and_step_are_called(kind: type[BackMatchSGD]) -> None:
    net, calls = conv_net(), []
    optimizer = kind(net)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("step", opt.param_groups[0]["step"])))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(("stepped", opt.param_groups[0]["step"])))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    train_steps(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert calls == [("step", 0), ("stepped", 1), ("step", 1), ("stepped", 2), "save", "load", "loaded"]
    optimizer.load_state_dict(with_tensor_step(saved))
    assert optimizer.param_groups[0]["step"] == 2
    assert_equal(optimizer.state_dict()["state"], saved["state"])
    assert repr(optimizer).startswith(f"{kind.__name__} (\nParameter Group 0\n")


@pytest.mark.parametrize("estimator", WATCHING)
def test_deleting_the_optimizer_takes_its_hooks_off(estimator: str) -> None:
    net = conv_net()
    other = BackMatchSGD(net, **settings(estimator))

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())

    own = hooks()
    optimizer = BackMatchSGD(net, **settings(estimator))
    train_steps(net, optimizer, range(4))
    assert hooks() == 2 * own > 0
    del optimizer
    gc.collect()
    assert hooks() == own
    train_steps(net, other, range(4))
    assert other.responses().keys() == dict(net.named_parameters()).keys()


@pytest.mark.parametrize("estimator", WATCHING)
def test_a_layer_unfrozen_later_is_measured_at_the_next_refresh(estimator: str) -> None:
    net = conv_net()
    net[0].requires_grad_(False)
    optimizer = BackMatchSGD(net, **settings(estimator))
    train_steps(net, optimizer, range(9))
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].named_parameters(prefix="0")), "lr": 0.03})
    before = net[0].weight.detach().clone()
    train_steps(net, optimizer, range(9, 10))  # the refresh comes at step 10
    middle = torch.stack([optimizer.paces()[name].mean() for name in optimizer.responses()]).median()
    assert not torch.equal(net[0].weight, before)
    assert "0.weight" not in optimizer.responses()
    assert optimizer.paces()["0.weight"] == middle
    before_refresh = copy.deepcopy(net)
    train_steps(net, optimizer, range(10, 11))

    fresh = BackMatchSGD(before_refresh, **settings(estimator, lr=0.0))
    fresh.param_groups[0]["step"] = 10  # the same probe
    train_steps(before_refresh, fresh, range(10, 11))
    for name in ("0.weight", "0.bias"):
        assert torch.equal(optimizer.responses()[name], fresh.responses()[name])
    assert [group["step"] for group in optimizer.param_groups] == [11, 11]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("given", ["a list", "a generator", "one"])
def test_a_layer_unfrozen_later_needs_no_names(estimator: str, given: str) -> None:
    """As torch.optim takes parameters of a model, and as callbacks that unfreeze layers give them."""
    nets, optimizers = [conv_net(), conv_net()], []
    for net in nets:
        net[0].requires_grad_(False)
        optimizers.append(BackMatchSGD(net, **settings(estimator)))
        net[0].requires_grad_(True)
    first, second = nets
    if given == "one":
        optimizers[0].add_param_group({"params": first[0].weight, "lr": 0.03})
        optimizers[1].add_param_group({"params": [("0.weight", second[0].weight)], "lr": 0.03})
    else:
        params = first[0].parameters()
        optimizers[0].add_param_group({"params": list(params) if given == "a list" else params, "lr": 0.03})
        optimizers[1].add_param_group({"params": list(second[0].named_parameters(prefix="0")), "lr": 0.03})
    for net, optimizer in zip(nets, optimizers, strict=True):
        train_steps(net, optimizer, range(4))
    assert_same((first, optimizers[0]), (second, optimizers[1]))


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"momentum": 1.0}, ValueError),
        ({"momentum": 0.0}, ValueError),  # with the nesterov of the defaults
        ({"max_change": "0.1"}, TypeError),
        ({"params": [("new", nn.Parameter(torch.ones(2, dtype=torch.complex64)))]}, TypeError),
        ({"params": [nn.Parameter(torch.ones(2))]}, ValueError),  # without a name
        ({"params": [("new", torch.ones(2, requires_grad=True) * 2)]}, ValueError),  # no leaf
    ],
    ids=str,
)
def test_a_failed_add_param_group_leaves_no_group(group: dict[str, Any], error: type[Exception]) -> None:
    net, untouched = conv_net(), conv_net()
    optimizer, reference = (BackMatchSGD(n, **settings("probe")) for n in (net, untouched))
    with pytest.raises(error):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))], **group})
    assert len(optimizer.param_groups) == 1
    train_steps(net, optimizer, range(4))
    train_steps(untouched, reference, range(4))
    assert_same((net, optimizer), (untouched, reference))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_told_of(bad: float, foreach: bool, grouped: bool) -> None:
    """All groups together: half a step is none of the steps asked for."""
    net = conv_net()
    params: Any = [{"params": net[:5].parameters()}, {"params": net[5].parameters()}] if grouped else net.parameters()
    optimizer = BackMatchSGD(params, model=net, foreach=foreach, **settings("probe"))

    def kept() -> list[Tensor]:
        return [value.detach().clone() for p in net.parameters() for value in (p, optimizer.state[p]["momentum_buffer"])]

    told = []
    for step in range(13):
        net.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(net(x), y).backward()
        spoilt = step in (1, 4, 5)
        if spoilt:
            net[5].bias.grad[1] = bad
        before = kept() if step else []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [(step, str(w.message).split(" whose")[0]) for w in caught]
        if step:
            assert all(torch.equal(a, b) == spoilt for a, b in zip(before, kept(), strict=True))
        assert optimizer.skipped_steps == sum(s <= step for s in (1, 4, 5))
    assert told == [(step, f"BackMatchSGD skipped {count} steps so far") for step, count in ((2, 1), (5, 2), (6, 3))]


@pytest.mark.parametrize("kind", [BackMatchSGD, BackMatch])
def test_a_sparse_gradient_is_refused_by_name_before_anything_changes(kind: type[BackMatchSGD]) -> None:
    net = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2))
    optimizer = kind(net)
    before = copy.deepcopy(net.state_dict())
    net(torch.arange(5)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of '0.weight' \[6, 4\] is sparse, .*sparse=False"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not optimizer.state
