"""Hypothesis strategies that draw a network, any stack of layers and branches that torch can train, and batches for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.cases import IN_PLACE_ACTIVATIONS
from tests.fuzz.layers import activations, convolutions, norms, pools

Shape = tuple[int, ...]
Block = tuple[nn.Module, str]
"""A module, and the layout of what it puts out."""

_WIDTHS = st.integers(1, 5)


@dataclass(frozen=True)
class Problem:
    """A network in training mode, and one batch per step; ``scale`` multiplies the loss.

    Every batch has been through the network and back once, so what fails afterwards is not torch's doing.
    """

    model: nn.Module
    batches: list[Tensor]
    scale: float
    autocast: bool

    def __repr__(self) -> str:
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        batches = ", ".join(f"{list(x.shape)} {x.dtype} strides {x.stride()}" for x in self.batches)
        dtypes = sorted({str(p.dtype) for p in self.model.parameters()})
        return f"Problem({self.model!r}\n{dtypes}, {frozen=}, scale={self.scale}, autocast={self.autocast}, batches: {batches})"

    def fresh(self) -> nn.Module:
        """A copy of the network to train; examples share nothing."""
        return copy.deepcopy(self.model)

    def backward(self, model: nn.Module, step: int) -> Tensor:
        """Gradients of a square loss on this step's batch into ``.grad``; its sum over nothing on an empty batch."""
        torch.manual_seed(step)
        model.zero_grad()
        with torch.autocast("cpu", enabled=self.autocast):
            output = model(self.batches[step].clone())  # in-place layers may write to it
        outputs = output if isinstance(output, tuple) else (output["logits"],) if isinstance(output, dict) else (output,)
        squares = [(z.to(torch.promote_types(z.dtype, torch.float32)) - 1).square() for z in outputs]
        loss = self.scale * sum(square.mean() if square.numel() else square.sum() for square in squares)
        loss.backward()
        return loss


class Reshaped(nn.Module):
    """A change of layout that a forward would write out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "swap":
            return x.transpose(1, 2)
        if self.how == "positions":
            return x.flatten(2).permute(0, 2, 1)
        if self.how == "mean":
            return x.mean(1)
        return x.reshape(x.shape[0], -1)

    def extra_repr(self) -> str:
        return self.how


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Concatenated(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x).flatten(1) for branch in self.branches], dim=1)


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(-x)


class WithUnused(nn.Module):
    """A layer beside one that the forward never calls, and a parameter without elements."""

    def __init__(self, used: nn.Module) -> None:
        super().__init__()
        self.used = used
        self.unused = nn.Linear(2, 3)
        self.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.nothing.sum()


class Scaled(nn.Module):
    """Bare parameters, a number and a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.offset


class InDtype(nn.Module):
    """A layer in a precision of its own."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.layer = layer.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return str(self.dtype)


class SelfAttention(nn.Module):
    def __init__(self, width: int, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class States(nn.Module):
    """The states of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Outputs(nn.Module):
    """A network whose forward returns its outputs in one of the forms that users choose."""

    def __init__(self, body: nn.Module, form: str) -> None:
        super().__init__()
        self.body = body
        self.form = form

    def forward(self, x: Tensor) -> Any:
        z = self.body(x)
        if self.form == "pair":
            return z, 2 * z
        if self.form == "mapping":
            return {"logits": z, "count": x.shape[0]}
        return z.flatten(1)[:, 0]

    def extra_repr(self) -> str:
        return self.form


def _linear(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], draw(_WIDTHS), bias=draw(st.booleans()))


def _convolution(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return draw(convolutions(shape, transposed=False))


def _transposed(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return draw(convolutions(shape, transposed=True))


def _pool(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return draw(pools(shape))


def _activation(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return draw(activations(shape[0]) | st.sampled_from(IN_PLACE_ACTIVATIONS).map(lambda make: make()))


def _dropout(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return draw(st.sampled_from([nn.Dropout, nn.AlphaDropout]))(draw(st.sampled_from([0.0, 0.3, 1.0])))


def _last_norm(draw: st.DrawFn, shape: Shape) -> nn.Module:
    kind = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
    return kind(shape[-1], elementwise_affine=draw(st.booleans()))


def _channel_norm(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return draw(norms(shape))


def _bare(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return Scaled(shape[-1])


def _normalised(draw: st.DrawFn, shape: Shape) -> nn.Module:
    layer = _linear(draw, shape) if len(shape) == 1 else _convolution(draw, shape)
    return draw(st.sampled_from([parametrizations.weight_norm, parametrizations.spectral_norm]))(layer)


def _tied(draw: st.DrawFn, shape: Shape) -> nn.Module:
    first, second = nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], shape[-1])
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def _attention(draw: st.DrawFn, shape: Shape) -> nn.Module:
    heads = draw(st.sampled_from([h for h in (1, 2) if shape[-1] % h == 0]))
    if draw(st.booleans()):
        settings = {"batch_first": True, "norm_first": draw(st.booleans())}
        return nn.TransformerEncoderLayer(shape[-1], heads, dim_feedforward=4, dropout=draw(st.sampled_from([0.0, 0.1])), **settings)
    return SelfAttention(shape[-1], num_heads=heads, bias=draw(st.booleans()))


def _recurrent(draw: st.DrawFn, shape: Shape) -> nn.Module:
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    return States(kind(shape[-1], draw(_WIDTHS), draw(st.integers(1, 2)), batch_first=True, bidirectional=draw(st.booleans())))


_Draw = Callable[[st.DrawFn, Shape], nn.Module]
_SAME: dict[str, list[_Draw]] = {
    "vector": [_linear, _linear, _activation, _dropout, _last_norm, _channel_norm, _bare, _normalised, _tied],
    "signal": [_convolution, _convolution, _transposed, _pool, _activation, _dropout, _channel_norm, _bare, _normalised],
    "image": [_convolution, _convolution, _transposed, _pool, _activation, _dropout, _channel_norm, _bare, _normalised],
    "sequence": [_linear, _linear, _attention, _recurrent, _activation, _dropout, _last_norm, _bare, _tied],
}
_CHANGES: dict[str, list[tuple[Callable[[], nn.Module], str]]] = {
    "vector": [(lambda: nn.Unflatten(1, (1, -1)), "signal"), (lambda: nn.Unflatten(1, (-1, 1)), "sequence")],
    "signal": [(nn.Flatten, "vector"), (lambda: Reshaped("swap"), "sequence")],
    "image": [(nn.Flatten, "vector"), (lambda: Reshaped("positions"), "sequence")],
    "sequence": [(lambda: Reshaped("mean"), "vector"), (lambda: Reshaped("flat"), "vector"), (lambda: Reshaped("swap"), "signal")],
}
_SHAPES = {
    "vector": st.tuples(_WIDTHS),
    "signal": st.tuples(st.integers(1, 4), st.integers(1, 6)),
    "image": st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    "sequence": st.tuples(st.integers(1, 4), _WIDTHS),
}


def _after(module: nn.Module, shape: Shape) -> Shape:
    """What a block makes of samples of this shape."""
    x = torch.randn(2, *shape)
    with torch.no_grad():
        return tuple(copy.deepcopy(module).eval()(x).shape[1:])


def _block(draw: st.DrawFn, layout: str, shape: Shape, depth: int) -> Block:
    ways = ["layer"] * 6 + ["change", "residual", "concatenated", "twice", "unused", "dtype"]
    way = draw(st.sampled_from(ways if depth > 0 else ways[:7]))
    if way == "layer":
        return draw(st.sampled_from(_SAME[layout]))(draw, shape), layout
    if way == "change":
        make, after = draw(st.sampled_from(_CHANGES[layout]))
        return make(), after
    inner, after = _stack(draw, layout, shape, depth - 1)
    if way == "residual" and _after(inner, shape) == shape:
        return Residual(inner), layout
    if way in ("residual", "concatenated"):
        other = nn.Linear(shape[-1], 0) if draw(st.booleans()) else nn.Identity()
        return Concatenated(inner, other), "vector"
    if way == "dtype":
        return InDtype(inner, draw(st.sampled_from([torch.float64, torch.bfloat16]))), after
    return (Twice if way == "twice" else WithUnused)(inner), after


def _stack(draw: st.DrawFn, layout: str, shape: Shape, depth: int) -> Block:
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        module, layout = _block(draw, layout, shape, depth)
        shape = _after(module, shape)
        modules.append(module)
    return (nn.Sequential(*modules) if len(modules) > 1 else modules[0]), layout


def _network(draw: st.DrawFn, layout: str, shape: Shape) -> nn.Module:
    if layout != "tokens":
        body, layout = _stack(draw, layout, shape, depth=2)
        bare = not any(True for _ in body.parameters())
        return nn.Sequential(body, nn.Linear(_after(body, shape)[-1], 3)) if draw(st.booleans()) or bare else body
    table = nn.Embedding(7, draw(_WIDTHS), padding_idx=draw(st.sampled_from([None, 0])))
    inside = (*shape, table.embedding_dim)
    body, layout = _stack(draw, "sequence", inside, depth=1)
    head = nn.Linear(_after(body, inside)[-1], 7)
    if head.in_features == table.embedding_dim and draw(st.booleans()):
        head.weight = table.weight
    return nn.Sequential(table, body, head)


def _batch(draw: st.DrawFn, layout: str, shape: Shape, samples: int, dtype: torch.dtype) -> Tensor:
    if layout == "tokens":
        return torch.randint(0, 7, (samples, *shape))
    memory = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"] + ["channels last"] * (layout == "image")))
    x = torch.randn(samples, *shape, dtype=dtype)
    if memory == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if memory == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if memory == "expanded" and samples:
        return x[:1].expand_as(x)
    return x.contiguous(memory_format=torch.channels_last) if memory == "channels last" else x


@st.composite
def problems(draw: st.DrawFn, *, sizes: tuple[int, ...] = (0, 1, 2, 5), steps: int = 4, scales: tuple[float, ...] = (1.0,)) -> Problem:
    """Networks of any kind, in any dtype, with batches of ``sizes`` samples for that many steps."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of layers without outputs
        torch.manual_seed(0)
        layout = draw(st.sampled_from([*_SHAPES, "tokens"]))
        shape = draw(_SHAPES[layout]) if layout in _SHAPES else (draw(st.integers(1, 4)),)
        dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        try:
            model = _network(draw, layout, shape).to(dtype)
        except (RuntimeError, ValueError):  # sizes that a layer of torch refuses
            reject()
        for module in model.modules():
            if isinstance(module, InDtype):
                module.layer.to(module.dtype)
        parameters = list(model.parameters())
        for i in draw(st.sets(st.integers(0, len(parameters) - 1), max_size=2)):
            parameters[i].requires_grad_(False)
        if draw(st.integers(0, 3)) == 3:
            model = Outputs(model, draw(st.sampled_from(["pair", "mapping", "column"])))
        if layout == "image" and draw(st.booleans()):
            model = model.to(memory_format=torch.channels_last)
        batches = [_batch(draw, layout, shape, draw(st.sampled_from(sizes)), dtype) for _ in range(steps)]
        problem = Problem(model, batches, draw(st.sampled_from(scales)), autocast=draw(st.integers(0, 4)) == 4)
        if _writes_out_of_bounds(problem) or not _trains(problem):
            reject()
        return problem


def _writes_out_of_bounds(problem: Problem) -> bool:
    """Whether torch 2.13 may: the backward of GroupNorm, on images that lie channels last and need no gradient themselves."""
    images = [x for x in (*problem.batches, *problem.model.parameters()) if x.ndim == 4]
    return any(isinstance(m, nn.GroupNorm) for m in problem.model.modules()) and not all(x.is_contiguous() for x in images)


def _trains(problem: Problem) -> bool:
    """Whether torch itself can run and differentiate the network, on every batch."""
    model = problem.fresh()
    try:
        for step in range(len(problem.batches)):
            problem.backward(model, step)
    except (RuntimeError, ValueError, IndexError):
        return False
    return True
