"""Per layer: gain, accumulated scale, response, pace, and the eigenvalues of both local Hessians on given inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from backmatch import layers
from backmatch.checks import check_in
from backmatch.estimators import fan_ins
from backmatch.graph import isolated
from backmatch.pace import Joined, layer_paces, layer_sizes
from backmatch.probe import Inputs, squared_response_gradients
from backmatch.scale import layer_scales, responses

Method = Literal["exact", "iterative"]
Hessian = tuple[Callable[[Tensor], Tensor], int, torch.device]  # rows [k, width] to rows times the Hessian, its width and place

_ROWWISE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_COLUMNS_AT_ONCE = 64  # columns of a Hessian per batched product: bounds the memory
_SAMPLES_AT_ONCE = 8
_POWER_STEPS = 100
_POWER_RTOL = 1e-3
_RANDOM_VECTORS = 32
_PROBES = 16


@dataclass(frozen=True)
class Spectrum:
    """Smallest, mean and largest eigenvalue of a local Hessian.

    Attributes:
        low: Smallest eigenvalue; None if ``method`` is "iterative".
        mean: Mean eigenvalue, the scalar that stands in for the Hessian (docs/derivation.md eq. 3).
        high: Largest eigenvalue.
        method: "exact": all eigenvalues. "iterative", for Hessians too wide: ``high`` by power iteration, which approaches it from
            below (to about 1%), and ``mean`` from the layer's rule or, without one, as the average of vᵀHv over random v of unit length.
    """

    low: float | None
    mean: float
    high: float
    method: Method


@dataclass(frozen=True)
class LayerRecord:
    """One call of a layer that owns parameters. ``response``, ``pace`` and ``weight_hessian`` are those of its first parameter.

    Attributes:
        name: Path of the layer in the model.
        kind: Its class name.
        parameter: Full name of its first parameter, usually the weight.
        shape: Shape of that parameter.
        gain: m_z; None if the layer reads no floating tensor, or several.
        scale: M, accumulated over everything above the layer.
        response: m_W·M of the parameter, summed over all calls.
        pace: Its multiplier on the learning rate (:func:`backmatch.pace.layer_paces` in relative coordinates, one per tensor, unbounded).
        estimator: Where ``scale`` and ``response`` come from: "rules", or "probe" where those do not know the model.
        input_hessian: Spectrum of ``J_zᵀJ_z``, mean over samples; for batch normalisation on batch statistics, that of the batch.
            None as for ``gain``.
        weight_hessian: Spectrum of ``(1/N) Σ_i J_WᵀJ_W``.
    """

    name: str
    kind: str
    parameter: str
    shape: tuple[int, ...]
    gain: float | None
    scale: float
    response: float
    pace: float
    estimator: Literal["rules", "probe"]
    input_hessian: Spectrum | None
    weight_hessian: Spectrum


def inspect_layers(model: nn.Module, *inputs: Any, power: float = 0.5, samples: int = 4, exact_width: int = 1024) -> list[LayerRecord]:
    """Describe every call of a layer that owns trainable parameters, in order of execution.

    Hessians are computed in float64 at the layer's own input, by products with Jacobians, hence for any layer that autograd
    differentiates twice. A parameter of a module that contains trainable layers (a position embedding, ``in_proj_weight`` of
    attention) is a layer that reads nothing and puts out the parameter itself, shared by the N samples. Parameters that no layer's own
    forward uses are not listed. The model is left as it was: parameters, buffers, modes, gradients and random state.

    Args:
        model: The network, in the mode (training or eval) to describe.
        *inputs: Arguments of its forward, a batch ``[N, ...]``.
        power: Exponent of the pace, in [0, 1].
        samples: Samples whose ``J_zᵀJ_z`` are averaged, at least 1.
        exact_width: Widest Hessian that is decomposed in full.

    Raises:
        TypeError: If a count is no number, or no input is a tensor.
        ValueError: If a setting is out of range, the batch is empty or not finite, or no parameter is trainable.
    """
    check_in("power", power, 0.0, 1.0, high_open=False)
    check_in("samples", samples, 1)
    check_in("exact_width", exact_width, 1)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        raise ValueError("The model has no trainable parameter. Check requires_grad.")
    estimator: Literal["rules", "probe"] = "rules"
    scales: dict[str, list[float]] = {}
    try:
        for call in layer_scales(model, *inputs):
            scales.setdefault(call.name, []).append(call.scale.item())
        measured = responses(model, *inputs)
    except NotImplementedError:
        estimator = "probe"
        scales.clear()
        measured = _probed(model, inputs)
    pace = _tensor_paces(measured, model, power)
    count = next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)).shape[0]

    records = []
    for name, layer, arguments in _calls(model, inputs):
        key, parameter = next((key, p) for key, p in layer.named_parameters(recurse=False) if p.requires_grad)
        response = measured[names[parameter]].item()
        bare = any(p.requires_grad for child in layer.children() for p in child.parameters())
        gain, input_hessian, weight_hessian = None, None, Spectrum(1 / count, 1 / count, 1 / count, "exact")
        if not bare:
            with isolated(model), torch.enable_grad():
                gain, input_hessian = _input_side(layer, arguments, samples, exact_width)
                weight_hessian = _weight_side(layer, key, arguments, count, exact_width)
        above = response / weight_hessian.mean if weight_hessian.mean else math.nan
        records.append(
            LayerRecord(
                name=name,
                kind="Parameter" if bare else type(layer).__name__,
                parameter=names[parameter],
                shape=tuple(parameter.shape),
                gain=gain,
                scale=scales[name].pop(0) if scales.get(name) else above,
                response=response,
                pace=pace[names[parameter]],
                estimator=estimator,
                input_hessian=input_hessian,
                weight_hessian=weight_hessian,
            )
        )
    return records


def _probed(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Responses by equation 5, averaged over several draws."""
    draws = [squared_response_gradients(model, Inputs(inputs, {}), seed=seed) for seed in range(_PROBES)]
    return {name: torch.stack([draw[name].mean() for draw in draws]).mean() for name in draws[0]}


def _tensor_paces(measured: dict[str, Tensor], model: nn.Module, power: float) -> dict[str, float]:
    """The paces that the optimizer would set in relative coordinates, one per tensor and without a bound."""
    parameters = [model.get_parameter(name).detach() for name in measured]
    inputs = fan_ins(model)
    joined = Joined.of(list(measured.values()))
    sizes = layer_sizes(joined.like([p.float().square().mean() for p in parameters]), [inputs.get(n) for n in measured])
    return dict(zip(measured, layer_paces(joined, sizes, power=power, bound=math.inf).values.tolist(), strict=True))


def _calls(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[str, nn.Module, tuple[Any, ...]]]:
    """Name, layer and arguments of every call of a layer that owns trainable parameters, from one forward."""
    found: list[tuple[str, nn.Module, tuple[Any, ...]]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((name, layer, _copied((*args, *kwargs.values()))))  # a layer further on may work in place

        return before

    handles = [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, layer in model.named_modules()
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    ]
    try:
        with isolated(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _input_side(layer: nn.Module, arguments: tuple[Any, ...], samples: int, exact_width: int) -> tuple[float | None, Spectrum | None]:
    """Gain m_z and the spectrum of ``J_zᵀJ_z``."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if len(tensors) != 1 or not tensors[0].is_floating_point():
        return None, None
    x = tensors[0]
    gain = layers.gain(layer, x).item() if layers.is_known(layer) else None
    if isinstance(layer, nn.Linear) and min(layer.weight.shape) <= exact_width:
        # WᵀW at every position of every sample; its eigenvalues are squares of singular values, and 0 where d_in is larger.
        squares = torch.linalg.svdvals(layer.weight.detach().double()).square()
        missing = layer.in_features - len(squares)
        spectrum = _of_eigenvalues(torch.cat([squares, squares.new_zeros(missing)]))
    elif isinstance(layer, _BATCH_NORMS):
        spectrum = _batch_norm_spectrum(layer, x)
    else:
        needed = 1 if isinstance(layer, _ROWWISE) else samples  # the Jacobian of a linear layer is that of every sample
        parts = x[:needed].split(1)
        means = [layers.gain(layer, part).item() if gain is not None else None for part in parts]
        hessians = (_hessian(lambda v: _output(layer, {}, v), part) for part in parts)
        spectrum = _average([_spectrum(hessian, exact_width, mean) for hessian, mean in zip(hessians, means, strict=True)])
    return spectrum.mean if gain is None else gain, spectrum


def _batch_norm_spectrum(layer: Any, x: Tensor) -> Spectrum:
    """``JᵀJ`` of the batch, channel by channel ``γ²/s² · (I − 11ᵀ/D − x̂x̂ᵀ/D)²`` with D elements each (backmatch/layers/norm.py).

    Its eigenvalues are 0 along the ones, ``γ²/s² (1 − ρ)²`` along x̂, ρ = mean(x̂²), and γ²/s² across; γ²/s² alone on running
    statistics.
    """
    rows = x.detach().double().transpose(0, 1).flatten(1)
    fixed = not layer.training and layer.running_mean is not None
    var = layer.running_var.double() if fixed else rows.var(1, correction=0)
    squares = (1.0 if layer.weight is None else layer.weight.detach().double().square()) / (var + layer.eps)
    if fixed:
        return _of_eigenvalues(squares)
    along = squares * (layer.eps / (var + layer.eps)).square()  # 1 − ρ = eps / s²
    size = rows.shape[1]
    high = squares.max() if size > 2 else along.max()
    mean = ((size - 2) * squares + along).mean() / size
    return Spectrum(0.0, mean.item(), high.item(), "exact")


def _weight_side(layer: nn.Module, key: str, arguments: tuple[Any, ...], count: int, exact_width: int) -> Spectrum:
    """Spectrum of ``(1/N) Σ_i J_WᵀJ_W`` for the parameter ``key``, with N = ``count``."""
    mean = None
    x = arguments[0]
    if layers.is_known(layer):
        mean = layers.curvature(layer, x)[key].item() * x.shape[0] / count
    if isinstance(layer, _ROWWISE) and key == "weight" and layer.weight[0].numel() <= exact_width:
        return _of_eigenvalues(torch.linalg.eigvalsh(_input_moments(layer, x) / count).flatten())
    if isinstance(layer, _BATCH_NORMS) and key == "weight":
        # z = γ x̂ + β: the Hessian is diagonal, the sums of x̂² of every channel.
        plain = {name: torch.full_like(p, name == "weight") for name, p in layer.named_parameters()}
        return _of_eigenvalues(_output(layer, plain, x).transpose(0, 1).flatten(1).square().sum(1).detach() / count)
    hessian = _hessian(lambda w: _output(layer, {key: w}, *arguments), layer.get_parameter(key), count)
    return _spectrum(hessian, exact_width, mean)


def _input_moments(layer: Any, x: Tensor) -> Tensor:
    """``Σ patch patchᵀ`` over samples and positions, for each group, ``[groups, w, w]``.

    The weights' Hessian repeats this block for every output unit of the group. With the identity as its weights, a layer puts
    out the patches that it reads, whatever its stride, padding or dilation.
    """
    groups, width = getattr(layer, "groups", 1), layer.weight[0].numel()
    identity = torch.eye(width, dtype=torch.float64, device=x.device).view(-1, *layer.weight.shape[1:])
    weights = {"weight": identity.repeat(groups, *[1] * (identity.ndim - 1))}
    if layer.bias is not None:
        weights["bias"] = torch.zeros(groups * width, dtype=torch.float64, device=x.device)
    total = torch.zeros(groups, width, width, dtype=torch.float64, device=x.device)
    for part in x.split(_SAMPLES_AT_ONCE):
        with torch.no_grad():
            patches = _output(layer, weights, part)
        channels = patches.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).reshape(groups, width, -1)
        total += channels @ channels.mT
    return total


class _Unhooked(nn.Module):
    """Runs a layer past its hooks, which a measurement must not fire."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer.forward(*args)


def _output(layer: nn.Module, replaced: dict[str, Tensor], *args: Any) -> Tensor:
    """The layer's (first) output in float64, with some of its parameters replaced."""
    held = {name: tensor.detach() for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    state = {f"layer.{name}": tensor for name, tensor in _copied(held | replaced, double=True).items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        output = torch.func.functional_call(_Unhooked(layer), state, _copied(args, double=True))
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _copied(tree: Any, *, double: bool = False) -> Any:
    """The same with every tensor copied, inside the graph; floating ones to float64 if ``double``."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(torch.float64 if double and t.is_floating_point() else t.dtype, copy=True), tree)


def _hessian(function: Callable[[Tensor], Tensor], x: Tensor, count: int = 1) -> Hessian:
    """``JᵀJ / count`` with J the Jacobian of ``function`` at ``x``, as a product; J is never formed."""
    point = x.detach().double().requires_grad_()
    value = function(point)
    # Jᵀv is linear in v, so its own derivative along u is Ju: two backward passes instead of forward-mode rules.
    v = torch.zeros_like(value, requires_grad=True)
    (pulled,) = torch.autograd.grad(value, point, v, create_graph=True)

    def product(rows: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pulled, v, rows.view(-1, *point.shape), retain_graph=True, is_grads_batched=True)
        (back,) = torch.autograd.grad(value, point, pushed, retain_graph=True, is_grads_batched=True)
        return back.flatten(1) / count

    return product, point.numel(), point.device


def _spectrum(hessian: Hessian, exact_width: int, mean: float | None) -> Spectrum:
    """Of ``hessian``, whose mean eigenvalue is ``mean`` if known."""
    product, width, device = hessian
    if width <= exact_width:
        identity = torch.eye(width, dtype=torch.float64, device=device)
        return _of_eigenvalues(torch.linalg.eigvalsh(torch.cat([product(rows) for rows in identity.split(_COLUMNS_AT_ONCE)])))
    generator = torch.Generator(device).manual_seed(0)
    if mean is None:
        vectors = torch.randn(_RANDOM_VECTORS, width, dtype=torch.float64, generator=generator, device=device)
        mean = ((vectors * product(vectors)).sum(1) / vectors.square().sum(1)).mean().item()
    vector = torch.randn(1, width, dtype=torch.float64, generator=generator, device=device)
    high = 0.0
    for _ in range(_POWER_STEPS):
        last, vector = high, product(vector / vector.norm())
        high = vector.norm().item()
        if high - last <= _POWER_RTOL * high:
            break
    return Spectrum(None, mean, high, "iterative")


def _of_eigenvalues(values: Tensor) -> Spectrum:
    values = values.clamp_min(0.0)  # rounding puts zeros below 0
    return Spectrum(values.min().item(), values.mean().item(), values.max().item(), "exact")


def _average(spectra: Sequence[Spectrum]) -> Spectrum:
    lows = [spectrum.low for spectrum in spectra if spectrum.low is not None]
    means, highs = [spectrum.mean for spectrum in spectra], [spectrum.high for spectrum in spectra]
    return Spectrum(fmean(lows) if lows else None, fmean(means), fmean(highs), spectra[0].method)
