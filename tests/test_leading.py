"""``max_stretch``: a matrix's step with its leading singular values held to a limit and the rest at its own length, against the SVD."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from backmatch import BackMatchSGD, leading
from backmatch.cli.models import build_model
from backmatch.cli.optimizers import state_bytes
from backmatch.leading import AXES, Lead, by_elimination, eliminated, first_axes, hold

exact = {"rtol": 0.0, "atol": 0.0}
SHAPES = [(40, 12), (12, 40), (9, 9), (3, 2), (1, 7), (7, 1), (16, 3, 3, 3)]


def decaying(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A matrix whose singular values fall by a third from each to the next, from 8."""
    generator = torch.Generator().manual_seed(seed)
    left, values, right = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64).flatten(1), full_matrices=False)
    values = 8.0 * (2 / 3) ** torch.arange(len(values), dtype=torch.float64)
    return ((left * values) @ right).view(shape)


def expected(matrix: Tensor, limit: float) -> Tensor:
    """By SVD: six leading singular values at most the limit; the others as large as if none led, tenfold at most, and by the limit."""
    left, values, right = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    if len(values) > AXES:
        rest = values[AXES:].square().sum() / values.square().sum() / (1.0 - AXES / len(values))
        values[AXES:] *= rest.clamp(0.01, 1.0).rsqrt().clamp_max(4.0 * limit / values[AXES - 1])
    values[:AXES] = values[:AXES].clamp_max(limit)
    return ((left * values) @ right).view(matrix.shape)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture(params=["by a factorisation", "by elimination"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How axes are made orthonormal on a CPU, and on a GPU."""
    if request.param == "by elimination":
        monkeypatch.setattr(leading, "_orthonormal", by_elimination)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limit", [1.5, 0.02])
def test_leading_singular_values_are_held(shape: tuple[int, ...], limit: float) -> None:
    matrix = decaying(shape)
    axes = first_axes(matrix).double()
    for _ in range(60):
        found = matrix.clone()
        hold([found], [Lead(matrix, axes, number(limit))])
    assert_close(found, expected(matrix, limit), rtol=0.0, atol=3e-4)
    assert_close(axes @ axes.mT, torch.eye(len(axes), dtype=torch.float64), rtol=0.0, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_axes_in_bfloat16_follow_a_matrix_that_turns() -> None:
    matrix, other = decaying((40, 12)), decaying((40, 12), seed=1)
    axes = first_axes(matrix)
    assert (axes.dtype, axes.shape) == (torch.bfloat16, (AXES, 12))
    for step in range(100):
        found = matrix + 0.001 * step * (other - matrix)
        before = found.clone()
        hold([found], [Lead(matrix, axes, number(6.0))])
        if step > 20:  # one singular value is above, and the rest comes near it
            assert torch.linalg.svdvals(found)[0] < 6.0 * 1.05
            assert (found - expected(before, 6.0)).norm() < 0.15 * (before - expected(before, 6.0)).norm()


@pytest.mark.usefixtures("way")
def test_how_much_longer_the_rest_becomes() -> None:
    """Hardly, where nothing leads; not at all where there is nothing but what leads, at any rank."""
    white, small = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for shape in ((200, 300), (6, 9)))
    one = torch.outer(torch.arange(1.0, 31.0).double(), torch.ones(20).double())
    for matrix, most in ((white, 1.1), (one, 1.00001), (small, 1.0)):
        axes = first_axes(matrix).double()
        for _ in range(20):
            found = matrix.clone()
            hold([found], [Lead(matrix, axes, number(math.inf))])
        assert 1.0 - 1e-9 <= found.norm() / matrix.norm() <= most + 1e-9


def test_coarse_products_hold_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 keeps ten bits of what is multiplied. Of rows that are nearly parallel an orthonormal basis must be made without it."""
    matmul = Tensor.__matmul__

    def coarse(x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(leading, "_orthonormal", by_elimination)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.outer(torch.randn(200, generator=generator), torch.randn(100, generator=generator))
    matrix += 0.01 * torch.randn(200, 100, generator=generator)
    fine, axes = first_axes(matrix), first_axes(matrix)
    for _ in range(5):
        exactly, found = matrix.clone(), matrix.clone()
        hold([exactly], [Lead(matrix, fine, torch.tensor(1.0))])
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "__matmul__", lambda one, other: matmul(coarse(one), coarse(other)))
            hold([found], [Lead(matrix, axes, torch.tensor(1.0))])
    assert torch.linalg.svdvals(found)[0] < 1.1 * torch.linalg.svdvals(exactly)[0]


@pytest.mark.usefixtures("way")
def test_nothing_to_hold_leaves_axes_to_start_from() -> None:
    axes = first_axes(torch.zeros(50, 40))
    before = axes.clone()
    hold([matrix := torch.zeros(50, 40)], [Lead(matrix, axes, torch.tensor(0.0))])
    assert_close(matrix, torch.zeros(50, 40), **exact)
    assert_close(axes, before, rtol=0.0, atol=0.01)  # but for orthonormality in bfloat16


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("first", [1.0, 1e2, 1e4])
def test_the_rest_comes_to_four_times_the_limit(first: float) -> None:
    """Whatever the leading singular value is in units of the others, which axes in bfloat16 see hardly beside a large one."""
    left, values, right = torch.linalg.svd(torch.randn(60, 40, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.cat([torch.tensor([first]), torch.linspace(1.0, 0.3, len(values) - 1)])
    matrix = (left * values) @ right
    axes, limit = first_axes(matrix), torch.tensor(0.1)
    for _ in range(60):
        found = matrix.clone()
        hold([found], [Lead(matrix, axes, limit)])
    assert 0.35 < torch.linalg.svdvals(found)[0] < 0.45
    assert_close(axes.float() @ axes.float().mT, torch.eye(len(axes)), rtol=0.0, atol=0.02)


@pytest.mark.usefixtures("way")
def test_a_limit_of_nothing_leaves_nothing() -> None:
    found = decaying((40, 12))
    hold([found], [Lead(found, first_axes(found), number(0.0))])
    assert_close(found, torch.zeros_like(found), **exact)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_elimination_is_cholesky(count: int) -> None:
    """What a GPU does in place of the library's."""
    rows = torch.randn(5, count, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grams = rows @ rows.mT
    expected = torch.linalg.inv(torch.linalg.cholesky(grams))
    assert_close(eliminated(grams), expected, rtol=1e-10, atol=1e-12)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (decaying(tuple(p.shape), seed) if p.ndim > 1 else torch.randn(p.shape, generator=generator)).to(p.dtype)


def steps(optimizer: BackMatchSGD, model: nn.Module, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        give_gradients(model, i % 3)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)])
def test_a_step_is_the_unlimited_one_with_its_singular_values_held(nesterov: bool, lr: float | Tensor) -> None:
    settings: dict[str, Any] = {"nesterov": nesterov, "weight_decay": 0.0}
    mine, free = net(), net()
    held, plain = (BackMatchSGD(each, lr, max_stretch=limit, **settings) for each, limit in ((mine, 0.002), (free, math.inf)))
    start = copy.deepcopy(mine.state_dict())
    for _ in range(80):  # from the same weights, so that sizes and paces are alike
        mine.load_state_dict(start)
        free.load_state_dict(start)
        for model, optimizer in ((mine, held), (free, plain)):
            give_gradients(model)
            optimizer.step()
    shortened = 0
    for (name, p), q in zip(mine.named_parameters(), free.parameters(), strict=True):
        moved, would = p.detach() - start[name], q.detach() - start[name]
        if p.ndim == 1:
            assert_close(moved, would, **exact)
            continue
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        units = start[name].flatten(1).square().mean(dim=1).sqrt().clamp_min(0.5 / math.sqrt(columns))
        limit = 0.002 * units.square().mean().sqrt().item() * (math.sqrt(rows) + math.sqrt(columns))
        values = torch.linalg.svdvals(would.flatten(1))
        shortened += int(values[0] > 1.5 * limit)
        assert_close(moved, expected(would, limit), rtol=0.0, atol=2e-3 * values[0].item())
    assert shortened == 3


def test_weights_decay_as_without() -> None:
    model = net()
    optimizer = BackMatchSGD(model, 0.01, decay_floor=0.0, max_stretch=1e-12)
    give_gradients(model)
    optimizer.step()
    assert_close(model[5].weight, net()[5].weight * 0.99, rtol=0.0, atol=1e-6)  # of three singular values nothing is left


def test_what_is_looked_up_and_vectors_are_not_held() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3))
    optimizer = BackMatchSGD(model, max_stretch=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [name for name, p in model.named_parameters() if "axes" in optimizer.state[p]] == ["1.weight"]


def test_a_skipped_step_leaves_the_axes() -> None:
    model = net()
    optimizer = BackMatchSGD(model, 0.01, max_stretch=0.01)
    steps(optimizer, model, 3)
    before = {p: optimizer.state[p]["axes"].clone() for p in model.parameters() if p.ndim > 1}
    weights = copy.deepcopy(model.state_dict())
    give_gradients(model, 5)
    model[3].bias.grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for p, axes in before.items():
        assert_close(optimizer.state[p]["axes"], axes, **exact)
    assert_close(dict(model.state_dict()), dict(weights), **exact)


def test_a_run_goes_on_bit_for_bit() -> None:
    model = net()
    optimizer = BackMatchSGD(model, 0.01, max_stretch=0.01)
    steps(optimizer, model, 4)
    other = copy.deepcopy(model)
    resumed = BackMatchSGD(other, 0.3, max_stretch=math.inf)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, model, 4, first=4)
    steps(resumed, other, 4, first=4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p, q, **exact)
        assert optimizer.state[p].get("axes") is None or optimizer.state[p]["axes"].dtype == torch.bfloat16


def test_other_estimators_do_not_hold_what_a_checkpoint_brings() -> None:
    model = net()
    optimizer = BackMatchSGD(model, 0.01, max_stretch=0.01)
    steps(optimizer, model, 2)
    other = BackMatchSGD(model, 0.01, power=0.0, relative=False)
    other.load_state_dict(optimizer.state_dict())
    steps(other, model, 2)
    assert other.param_groups[0]["max_stretch"] == 0.01


def test_groups_have_limits_of_their_own() -> None:
    model = net()
    optimizer = BackMatchSGD(
        [{"params": model[3].parameters(), "max_stretch": 0.001}, {"params": model[5].parameters()}],
        0.01,
        model=model,
        max_stretch=math.inf,
    )
    give_gradients(model)
    optimizer.step()
    assert "axes" in optimizer.state[model[3].weight]
    assert "axes" not in optimizer.state[model[5].weight]
    with pytest.raises(ValueError, match=r"Invalid max_stretch: -1.0. Must be in \(0.0, inf\]"):
        optimizer.add_param_group({"params": model[0].parameters(), "max_stretch": -1.0})
    assert len(optimizer.param_groups) == 2


def test_climbing_is_descending_the_negative() -> None:
    down, up = net(), net()
    descent, ascent = BackMatchSGD(down, 0.01, max_stretch=0.003), BackMatchSGD(up, 0.01, max_stretch=0.003, maximize=True)
    for i in range(5):
        give_gradients(down, i)
        give_gradients(up, i)
        for p in up.parameters():
            assert p.grad is not None
            p.grad.neg_()
        descent.step()
        ascent.step()
    for p, q in zip(down.parameters(), up.parameters(), strict=True):
        assert_close(p, q, **exact)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = BackMatchSGD(model, 0.01, max_stretch=0.003)
    steps(optimizer, model, 3)
    other, another = copied((model, optimizer))
    steps(optimizer, model, 3)
    steps(another, other, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p, q, **exact)


def test_a_rate_of_zero_moves_nothing() -> None:
    model = net()
    optimizer = BackMatchSGD(model, 0.0, max_stretch=0.003)
    before = copy.deepcopy(list(model.parameters()))
    steps(optimizer, model, 3)
    for p, q in zip(model.parameters(), before, strict=True):
        assert_close(p, q, **exact)


def test_older_checkpoints_have_no_limit() -> None:
    model = net()
    optimizer = BackMatchSGD(model, 0.01)
    steps(optimizer, model, 2)
    older = copy.deepcopy(optimizer.state_dict())
    del older["param_groups"][0]["max_stretch"]
    optimizer.load_state_dict(older)
    assert optimizer.param_groups[0]["max_stretch"] == math.inf


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ways_to_the_same_step(foreach: bool | None, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backmatch.step._RUN", 200)  # entries at a time on a CPU, of 464
    usual, model = net(), net().to(memory_format=memory_format)
    for each, how in ((usual, True), (model, foreach)):
        optimizer = BackMatchSGD(each, 0.01, max_stretch=0.003, foreach=how)
        steps(optimizer, each, 6)
    for p, q in zip(usual.parameters(), model.parameters(), strict=True):
        assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_step_is_the_same(memory_format: torch.memory_format) -> None:
    usual, model = net(), net().to(memory_format=memory_format)
    for each, compiled in ((usual, False), (model, True)):
        optimizer = BackMatchSGD(each, torch.tensor(0.01), max_stretch=0.003)
        step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        for i in range(4):
            give_gradients(each, i)
            step()
    for p, q in zip(usual.parameters(), model.parameters(), strict=True):
        assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_a_step_under_autocast_is_the_same() -> None:
    usual, model = net().float(), net().float()
    optimizers = [BackMatchSGD(each, 0.01, max_stretch=0.003) for each in (usual, model)]
    for i in range(4):
        for each in (usual, model):
            give_gradients(each, i)
        optimizers[0].step()
        with torch.autocast("cpu", torch.bfloat16):
            optimizers[1].step()
    for p, q in zip(usual.parameters(), model.parameters(), strict=True):
        assert_close(p, q, **exact)


def test_parameters_in_bfloat16() -> None:
    wide, narrow, start = net().float(), net().bfloat16(), net().float()
    for model in (wide, narrow):
        optimizer = BackMatchSGD(model, 0.1, max_stretch=0.02)
        for i in range(5):
            give_gradients(wide, i)
            for p, q in zip(wide.parameters(), model.parameters(), strict=True):
                assert p.grad is not None
                q.grad = p.grad.to(q.dtype)
            optimizer.step()
    for p, q, first in zip(wide.parameters(), narrow.parameters(), start.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        assert (q.float() - p).norm() < 0.1 * (p - first).norm()


def test_state_of_transformers() -> None:
    """At most 1.02 floats per parameter, also with axes."""
    for name, shape in (("gpt-mini", (64,)), ("vit", (3, 32, 32))):
        model = build_model(name, in_shape=shape, classes=65 if name == "gpt-mini" else 10)
        optimizer = BackMatchSGD(model, max_stretch=0.0125)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert any("axes" in state for state in optimizer.state.values())
        assert state_bytes(optimizer) / 4 / sum(p.numel() for p in model.parameters()) <= 1.02


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"max_stretch": 0.0}, ValueError, r"Invalid max_stretch: 0.0. Must be in \(0.0, inf\]"),
        ({"max_stretch": math.nan}, ValueError, "Invalid max_stretch: nan"),
        ({"max_stretch": "0.1"}, TypeError, "Invalid max_stretch"),
        ({"max_stretch": 0.1, "estimator": "probe"}, ValueError, "needs estimator='gradient' and relative=True"),
        ({"max_stretch": 0.1, "relative": False}, ValueError, "relative=True: leave it out"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BackMatchSGD(net(), **settings)
