r"""Back-matching in full: equations 1 and 2 solved through a whole network, any layers, by autodiff and in float64.

The reference that the approximations are tested against, for small networks: every Jacobian is formed and decomposed.
docs/derivation.md, section 2, derives the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backmatch.checks import check_in

Layers = nn.Sequential | Sequence[tuple[str, nn.Module]]
_ROWS_AT_ONCE = 128  # rows of a Jacobian per batched backward pass: bounds the memory


@dataclass(frozen=True)
class Solver:
    r"""How a least-squares problem ``min ‖J u − t‖²`` is solved; J itself is decomposed, never ``JᵀJ``.

    With ``J = Σ_k s_k a_k b_kᵀ`` (singular values in falling order) and m the mean eigenvalue of ``JᵀJ``:

        Solver()                 u = J⁺t = Σ_k b_k (a_kᵀt) / s_k             the shortest exact solution
        Solver(damping=λ)        u = (JᵀJ + λ m I)⁻¹ Jᵀt                     the gradient's direction for λ → ∞
        Solver(rank=r)           the r first terms of J⁺t
        Solver(rtol=ε)           the terms of J⁺t with s_k > ε·s_1
        Solver(terms=k, eta=η)   u = η Σ_{j<k} (I − η JᵀJ)^j Jᵀt             Neumann (Landweber) series of J⁺t

    The first term of the series is back-propagation: ``u = η Jᵀt``. With η = 1 for both problems of every layer, eq. 1 is
    ``δ_{b-1} = J_zᵀ δ_b`` and eq. 2 is ``Σ_i J_Wᵀ δ_b``, the gradient of the summed loss (:data:`BACK_PROPAGATION`). More
    terms lead from there to the exact match. Damping, rank and rtol combine; the series stands alone.

    Args:
        damping: λ, relative to the mean eigenvalue, in [0, inf).
        rank: How many singular directions are kept, at least 1; of each sample in eq. 1, of the batch in eq. 2.
        rtol: Smallest singular value kept, relative to the largest, in [0, 1). None: rounding error, ``ε_64 · max(shape)``.
        terms: Length of the series, at least 1.
        eta: Its step η, in (0, inf). None: ``1/s_1²`` of each problem, for which it converges.

    Raises:
        ValueError: If a setting is out of range or NaN, or the series is combined with another setting.
        TypeError: If a setting is not a number, or a count not a whole one.
    """

    damping: float = 0.0
    rank: int | None = None
    rtol: float | None = None
    terms: int | None = None
    eta: float | None = None

    def __post_init__(self) -> None:
        check_in("damping", self.damping, 0.0)
        if self.rtol is not None:
            check_in("rtol", self.rtol, 0.0, 1.0)
        if self.eta is not None:
            check_in("eta", self.eta, 0.0, low_open=True)
        for name, count in (("rank", self.rank), ("terms", self.terms)):
            if count is not None:
                check_in(name, count, 1)
                if not isinstance(count, int):
                    raise TypeError(f"Invalid {name}: {count}. Must be a whole number.")
        if self.terms is None and self.eta is not None:
            raise ValueError(f"Invalid eta: {self.eta} without terms. Must be None, or set terms to the length of the series.")
        if self.terms is not None and (self.damping, self.rank, self.rtol) != (0.0, None, None):
            raise ValueError("Invalid terms: the series takes no damping, rank or rtol. Use either terms (and eta) or those.")

    def solve(self, jacobian: Tensor, target: Tensor) -> Tensor:
        """The solution u of one problem, or of a batch of problems.

        Args:
            jacobian: J, ``[..., m, n]``, float64.
            target: t, ``[..., m]``, float64.

        Returns:
            u, ``[..., n]``.

        Raises:
            ValueError: If J is not finite, or ``eta`` is above ``2/s_1²`` and the series has more than one term.
        """
        if not jacobian.isfinite().all():
            raise ValueError("Invalid layer: its Jacobian is not finite at this input, e.g. a square root at 0. Move the input.")
        if self.terms is not None:
            return self._series(jacobian, target, self.terms)
        left, values, right = torch.linalg.svd(jacobian, full_matrices=False)
        rtol = torch.finfo(values.dtype).eps * max(jacobian.shape[-2:]) if self.rtol is None else self.rtol
        kept = values > rtol * values[..., :1]
        if self.rank is not None:
            kept[..., self.rank :] = False
        mean_eigenvalue = values.square().sum(-1, keepdim=True) / jacobian.shape[-1]
        factors = torch.where(kept, values / (values.square() + self.damping * mean_eigenvalue), 0.0)
        coefficients = factors * torch.einsum("...mk,...m->...k", left, target)
        return torch.einsum("...kn,...k->...n", right, coefficients)

    def _series(self, jacobian: Tensor, target: Tensor, terms: int) -> Tensor:
        if self.eta is not None and terms == 1:
            return self.eta * torch.einsum("...mn,...m->...n", jacobian, target)
        largest = torch.linalg.matrix_norm(jacobian, 2).square().clamp_min(torch.finfo(jacobian.dtype).tiny)[..., None]
        eta = 1 / largest if self.eta is None else torch.full_like(largest, self.eta)
        if (eta * largest > 2).any():
            raise ValueError(f"Invalid eta: {self.eta}. The series diverges here; must be at most {2 / largest.max():.3g}, or None.")
        change = jacobian.new_zeros(jacobian.shape[:-2] + jacobian.shape[-1:])
        for _ in range(terms):
            missing = target - torch.einsum("...mn,...n->...m", jacobian, change)
            change = change + eta * torch.einsum("...mn,...m->...n", jacobian, missing)
        return change


BACK_PROPAGATION = Solver(terms=1, eta=1.0)


@dataclass(frozen=True)
class LayerMatch:
    """What one layer is asked to change, in float64 and outside the graph.

    Residuals are the part of the wanted output change that the match leaves over, ``Σ‖J u − δ̂‖² / Σ‖δ̂‖²`` over the batch:
    0 if the layer can do all of it, 1 if nothing (0 if nothing is wanted).

    Attributes:
        name: The layer's name in the network.
        input_change: δ̂_{b-1} of eq. 1, ``[N, ...]`` like the layer's input; None if that is not floating (indices).
        parameter_change: ΔW_b of eq. 2 by the parameter's name in the layer; empty if it trains none.
        input_residual: Of eq. 1; None without ``input_change``.
        parameter_residual: Of eq. 2; None without parameters.
    """

    name: str
    input_change: Tensor | None
    parameter_change: dict[str, Tensor]
    input_residual: float | None
    parameter_residual: float | None


def match_input(module: nn.Module, x: Tensor, output_change: Tensor, solver: Solver = Solver()) -> Tensor:
    r"""Change of a layer's input that moves its output by ``output_change``: ``argmin_u ‖J_z u − δ̂‖²`` (eq. 1).

    One problem per sample. Where samples are coupled, as by BatchNorm on batch statistics (found by a backward pass, not by
    the layer's type), one joint problem over the batch, with the whole Jacobian ``[N·d_out, N·d_in]``. A normalisation all but
    removes the direction of x̂, which it passes on ``eps / (var + eps)`` times as strongly as others, so the exact match asks for
    a huge change along it: set ``damping`` or ``rtol``.

    The layer is left as it was: buffers are updated on copies, ``.grad`` and the global random state are untouched, and the
    result is outside the graph. Everything is computed in float64, whatever the dtype of the layer and its input. Forward hooks
    fire, as some of them make the weights; detach an optimizer that observes the layer first.

    Args:
        module: Any layer or block of layers, in its present mode.
        x: Its input, ``[N, ...]``, floating.
        output_change: δ̂, of the shape of its output, ``[N, ...]``.
        solver: How the problem is solved.

    Returns:
        u, float64, of the shape of ``x``, in input units.

    Raises:
        ValueError: If the batch is empty, a shape is wrong, a value is not finite or ``x`` has no derivative (indices).
        TypeError: If the layer does not map one real tensor to one real tensor.
    """
    with _isolated(module):
        layer = _evaluate(module, x)
    if not layer.x.is_floating_point():
        raise ValueError(f"Invalid layer input: {x.dtype} has no derivative. Must be floating; ask for match_parameters alone.")
    return _match_input(layer, _checked_change(output_change, layer), solver)[0]


def match_parameters(module: nn.Module, x: Tensor, output_change: Tensor, solver: Solver = Solver()) -> dict[str, Tensor]:
    r"""Change of a layer's parameters that moves its output by ``output_change``: ``argmin_V Σ_i ‖J_W^(i) V − δ̂^(i)‖²`` (eq. 2).

    One problem over the batch and over all trained parameters of the layer together, its biases included. For a linear
    layer it is ``ΔW̃ = G A⁻¹`` with ``G = E[δ̂ ãᵀ]``, ``A = E[ã ãᵀ]``, ã the input with a 1 appended. State and dtype: as
    for :func:`match_input`.

    Args:
        module: Any layer or block of layers, in its present mode.
        x: Its input, ``[N, ...]``.
        output_change: δ̂, of the shape of its output, ``[N, ...]``.
        solver: How the problem is solved.

    Returns:
        Name in the layer → V, float64, of the parameter's shape and in its unit; empty if no parameter requires grad.

    Raises:
        ValueError: If the batch is empty, a shape is wrong or a value is not finite.
        TypeError: If the layer does not map one real tensor to one real tensor.
    """
    with _isolated(module):
        layer = _evaluate(module, x)
    return _match_parameters(layer, _checked_change(output_change, layer), solver)[0]


def match(
    layers: Layers,
    inputs: Tensor,
    output_change: Tensor | Callable[[Tensor], Tensor],
    solver: Solver = Solver(),
    *,
    parameter_solver: Solver | None = None,
) -> list[LayerMatch]:
    r"""Back-matching propagation: eq. 1 and 2 for every layer of a network, from the top down, started with ``δ̂_B = δ_B``.

    A layer is one entry of the chain, whatever it holds: a block with a skip connection, or a Sequential inside the
    Sequential, is one layer and is matched as a whole. State and dtype: as for :func:`match_input`; random layers draw
    what the network's next forward pass would.

    Args:
        layers: A Sequential, or its layers as (name, module), first layer first.
        inputs: z_0, ``[N, ...]``.
        output_change: δ_B, of the shape of the output ``[N, ...]``: each sample's own gradient, without 1/N. Or the loss, a
            function of the float64 output that averages over samples (reduction "mean"); δ_B is then N times its gradient.
        solver: For eq. 1 of every layer.
        parameter_solver: For eq. 2; None: like ``solver``.

    Returns:
        One record per layer, in the order of ``layers``.

    Raises:
        ValueError: If there are no layers, the batch is empty, a shape is wrong, a value is not finite, or a layer above the
            first reads indices.
        TypeError: If a layer does not map one real tensor to one real tensor.
    """
    named = _named(layers)
    evaluated = []
    z = inputs
    with _isolated(*(module for _, module in named)):
        for name, module in named:
            evaluated.append(_evaluate(module, z, name))
            z = evaluated[-1].z.detach()
        if not isinstance(output_change, Tensor):
            output_change = _loss_gradient(output_change, z)
    change: Tensor | None = _checked_change(output_change, evaluated[-1])
    matches = []
    for layer in reversed(evaluated):
        assert change is not None  # only the first layer may read indices: every layer's output is floating
        parameter_change, parameter_residual = _match_parameters(layer, change, parameter_solver or solver)
        change, input_residual = _match_input(layer, change, solver) if layer.x.is_floating_point() else (None, None)
        matches.append(LayerMatch(layer.name, change, parameter_change, input_residual, parameter_residual))
    return matches[::-1]


def train_step(
    layers: Layers,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    lr: float,
    solver: Solver = Solver(),
    *,
    parameter_solver: Solver | None = None,
) -> Tensor:
    r"""One step of exact back-matching, in place: ``W_b ← W_b − lr·ΔW_b`` for all layers at once.

    With B layers that each try to correct the whole error, a rate of about 1/B is the one to start from; one linear layer
    under half the squared error is solved by ``lr = 1``. A parameter shared by several layers gets the sum of their changes.
    The forward pass counts as a training step's: running statistics and the global random state move on; ``.grad`` does not change.

    Args:
        layers: A Sequential, or its layers as (name, module), first layer first; in train mode.
        inputs: ``[N, ...]``.
        targets: As ``loss_fn`` takes them; floating targets are given to it in float64.
        loss_fn: (output, targets) → 0-dim loss, averaged over samples (reduction "mean"): N times its gradient is δ_B.
        lr: In [0, inf).
        solver: For eq. 1 of every layer, see :func:`match`.
        parameter_solver: For eq. 2; None: like ``solver``.

    Returns:
        The loss before the step, 0-dim, float64, outside the graph.

    Raises:
        ValueError: As :func:`match`, or if ``lr`` is out of range; the layers are then unchanged.
        TypeError: As :func:`match`.
    """
    check_in("lr", lr, 0.0)
    named = _named(layers)
    targets = targets.double() if targets.is_floating_point() else targets
    matches = match(named, inputs, lambda z: loss_fn(z, targets), solver, parameter_solver=parameter_solver)
    with torch.no_grad():
        z = inputs
        for _, module in named:
            z = module(z)
        for (_, module), layer_match in zip(named, matches, strict=True):
            for name, change in layer_match.parameter_change.items():
                parameter = module.get_parameter(name)
                parameter.sub_((lr * change).to(parameter.dtype))
        return loss_fn(z.double(), targets)


@dataclass(frozen=True)
class _Evaluated:
    """A layer's output as a function of its input and its trained parameters, recorded by one forward pass in float64."""

    name: str
    x: Tensor  # a leaf, unless it holds indices
    parameters: dict[str, Tensor]  # leaves
    z: Tensor


@contextmanager
def _isolated(*modules: nn.Module) -> Iterator[None]:
    """Gradients on, autocast off, and every random state put back at the end."""
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), ExitStack() as stack:
        for device_type in {"cpu", *(device.type for device in devices)}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _named(layers: Layers) -> list[tuple[str, nn.Module]]:
    if isinstance(layers, nn.Sequential):
        if type(layers).forward is not nn.Sequential.forward:
            raise TypeError(f"Invalid layers: {type(layers).__name__} has its own forward. Give its layers as (name, module), in order.")
        layers = list(layers._modules.items())  # named_children leaves out a module's second use
    if len(layers) == 0:
        raise ValueError("Invalid layers: none. Must be at least one.")
    return list(layers)


def _evaluate(module: nn.Module, x: Tensor, name: str = "") -> _Evaluated:
    label = f"layer '{name}' ({type(module).__name__})" if name else f"layer {type(module).__name__}"
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if not isinstance(x, Tensor) or x.is_complex() or any(value.is_complex() for value in state.values()):
        raise TypeError(f"Invalid {label}: its input and state must be real tensors.")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"Invalid input of {label}: shape {list(x.shape)}. Must be [N, ...] with at least one sample.")
    if not x.isfinite().all():
        raise ValueError(f"Invalid input of {label}: it holds values that are not finite.")
    x, state = _leaf(x, trained=True), {key: _leaf(value, trained=value.requires_grad) for key, value in state.items()}
    # The layer gets a copy of its input, because a layer that works in place must not write to a leaf.
    z = torch.func.functional_call(module, state, (x.clone(),))
    if not isinstance(z, Tensor) or not z.is_floating_point():
        returned = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"Invalid {label}: it returns {returned}. Must be one floating tensor.")
    if z.ndim == 0 or z.shape[0] != x.shape[0]:
        raise ValueError(f"Invalid {label}: input {list(x.shape)}, output {list(z.shape)}. Both must have the batch as first dimension.")
    if not z.isfinite().all():
        raise ValueError(f"Invalid {label}: its output holds values that are not finite.")
    return _Evaluated(name, x, {key: value for key, value in state.items() if value.requires_grad}, z)


def _leaf(tensor: Tensor, *, trained: bool) -> Tensor:
    """A copy that autograd begins at, in float64 if it is floating."""
    copy = tensor.detach().clone()
    return copy.double().requires_grad_(trained) if copy.is_floating_point() else copy


def _loss_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    value = loss(z)
    if value.ndim != 0:
        raise ValueError(f"Invalid loss: shape {list(value.shape)}. Must be 0-dim, the mean over samples.")
    return torch.autograd.grad(value, z)[0] * z.shape[0]


def _checked_change(output_change: Tensor, layer: _Evaluated) -> Tensor:
    if output_change.shape != layer.z.shape:
        raise ValueError(f"Invalid output_change: shape {list(output_change.shape)}. Must be the output's, {list(layer.z.shape)}.")
    if not output_change.isfinite().all():
        raise ValueError("Invalid output_change: it holds values that are not finite.")
    return output_change.detach().double()


def _match_input(layer: _Evaluated, output_change: Tensor, solver: Solver) -> tuple[Tensor, float]:
    n = layer.x.shape[0]
    if _couples_samples(layer):
        jacobian = _jacobian(layer.z, [layer.x])
        target = output_change.flatten()
    else:
        jacobian = _jacobian_per_sample(layer.z, layer.x)
        target = output_change.reshape(n, -1)
    change = solver.solve(jacobian, target)
    return change.reshape(layer.x.shape), _residual(jacobian, change, target)


def _match_parameters(layer: _Evaluated, output_change: Tensor, solver: Solver) -> tuple[dict[str, Tensor], float | None]:
    if not layer.parameters:
        return {}, None
    parameters = list(layer.parameters.values())
    jacobian = _jacobian(layer.z, parameters)
    target = output_change.flatten()
    change = solver.solve(jacobian, target)
    parts = change.split([parameter.numel() for parameter in parameters])
    changes = {name: part.reshape(parameter.shape) for (name, parameter), part in zip(layer.parameters.items(), parts, strict=True)}
    return changes, _residual(jacobian, change, target)


def _residual(jacobian: Tensor, change: Tensor, target: Tensor) -> float:
    left_over = (torch.einsum("...mn,...n->...m", jacobian, change) - target).square().sum()
    wanted = target.square().sum()
    return float(left_over / wanted) if wanted > 0 else 0.0


def _couples_samples(layer: _Evaluated) -> bool:
    """Whether some sample's output depends on another sample's input, at this input.

    Any two samples differ in a binary digit of their index, so noise sent down from the samples that have a digit must
    not reach those that lack it, for every digit and both ways round.
    """
    n = layer.x.shape[0]
    digits = torch.arange(n) >> torch.arange((n - 1).bit_length())[:, None] & 1
    sent = torch.cat([digits, 1 - digits]).bool().to(layer.z.device)
    if n == 1:
        return False
    noise = torch.randn(layer.z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(layer.z.device)
    (received,) = _pull_back(layer.z, [layer.x], torch.einsum("kn,n...->kn...", sent.double(), noise))
    return bool(received.reshape(*sent.shape, -1)[~sent].count_nonzero())


def _jacobian_per_sample(z: Tensor, x: Tensor) -> Tensor:
    """``[N, d_out, d_in]``: with uncoupled samples, one backward pass gives a row of every sample's Jacobian."""
    n, d_out = z.shape[0], z[0].numel()
    rows = []
    for block in torch.arange(d_out, device=z.device).split(_ROWS_AT_ONCE):
        basis = nn.functional.one_hot(block, d_out).double()
        (grads,) = _pull_back(z, [x], basis[:, None].expand(-1, n, -1).reshape(-1, *z.shape))
        rows.append(grads.reshape(len(block), n, -1))
    return torch.cat(rows).transpose(0, 1)


def _jacobian(z: Tensor, inputs: list[Tensor]) -> Tensor:
    """``[numel(z), Σ numel(inputs)]``, the whole batch's."""
    rows = []
    for block in torch.arange(z.numel(), device=z.device).split(_ROWS_AT_ONCE):
        basis = nn.functional.one_hot(block, z.numel()).double()
        grads = _pull_back(z, inputs, basis.reshape(-1, *z.shape))
        rows.append(torch.cat([grad.reshape(len(block), -1) for grad in grads], dim=1))
    return torch.cat(rows)


def _pull_back(z: Tensor, inputs: list[Tensor], output_grads: Tensor) -> list[Tensor]:
    """One backward pass per entry of ``output_grads``, ``[K, *z.shape]``, batched; zeros for an input that z does not depend on."""
    count = output_grads.shape[0]
    if not z.requires_grad:
        return [x.new_zeros(count, *x.shape) for x in inputs]
    grads = torch.autograd.grad(z, inputs, output_grads, is_grads_batched=True, retain_graph=True, allow_unused=True)
    return [x.new_zeros(count, *x.shape) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]
