"""On a GPU: the values of a CPU, no waiting for the device, and what only it has."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from backmatch import BackMatch, BackMatchSGD
from backmatch.newton_schulz import coarse_products, inverse_roots, orthogonalised

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Make = Callable[[nn.Module], BackMatchSGD]

MAKERS: dict[str, Make] = {
    "gradient": BackMatchSGD,
    "probe": lambda net: BackMatchSGD(net, estimator="probe", interval=4),
    "rules": lambda net: BackMatchSGD(net, estimator="rules", interval=4),
    "loss": lambda net: BackMatchSGD(net, estimator="loss", interval=4),
    "scalar": lambda net: BackMatch(net, match="scalar", step="rms", interval=4),
    "kron-rms": lambda net: BackMatch(net, step="rms", interval=4),
    "kron": lambda net: BackMatch(net, interval=4),
    "kron-whole": lambda net: BackMatch(net, power=1.0, interval=4),
    "kron-plain": lambda net: BackMatch(net, 1e-3, step="plain", interval=4),
    "gradient-graph": lambda net: BackMatchSGD(net, cuda_graph=True),
    "free": lambda net: BackMatchSGD(net, 0.005, max_stretch=math.inf),
    "probe-graph": lambda net: BackMatchSGD(net, estimator="probe", interval=4, cuda_graph=True),
    "kron-graph": lambda net: BackMatch(net, interval=4, cuda_graph=True),
}
every = pytest.mark.parametrize("name", list(MAKERS))
usual = pytest.mark.parametrize("name", ["gradient", "probe", "kron", "gradient-graph", "probe-graph", "kron-graph"])


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 2, 7, 7, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    return x.to(dtype), y


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, forward: Any = None) -> list[float]:
    losses = []
    p = next(net.parameters())
    for step in steps:
        x, y = (tensor.to(p.device) for tensor in batch(step, p.dtype))
        optimizer.zero_grad()
        loss = cross_entropy((forward or net)(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every
def test_values_are_those_of_a_cpu(name: str) -> None:
    if name.startswith("probe"):
        pytest.skip("its noise is drawn on the device")
    runs = []
    for device in ("cpu", "cuda"):
        net = network(torch.float64).to(device)
        optimizer = MAKERS[name](net)
        runs.append((train(net, optimizer, range(12)), [p.detach().cpu() for p in net.parameters()]))
    assert_close(runs[1], runs[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("asked", ["highest", "high"])
def test_roots_by_products_are_exact_whatever_precision_is_asked_for(asked: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 60, 300, dtype=torch.float64)
    moments = rows.mT @ rows / 60 + 0.1 * torch.eye(300, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moments)
    expected = vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        found = inverse_roots(moments.float().cuda()).cpu().double()
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("asked", ["highest", "high"])
def test_coarse_products_are_tf32_and_leave_what_was_asked_for(asked: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256, 256, dtype=torch.float64), torch.randn(256, 256, dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        with coarse_products():
            found = (x.float().cuda() @ y.float().cuda()).cpu().double()
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
    assert 1e-5 < (found - x @ y).norm() / (x @ y).norm() < 1e-3


@pytest.mark.parametrize("shape", [(64, 64), (300, 1100), (1100, 300)], ids=str)
def test_levelling_in_bfloat16_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, sigma, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = u * torch.logspace(0, -2, len(sigma), dtype=torch.float64) @ vh
    found = orthogonalised([matrix.float().cuda()[None]])[0][0]
    assert found.dtype == torch.bfloat16
    found = found.float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.88
    assert values.max() < 1.1
    assert (found.cpu() * (u @ vh)).sum() > 0.997 * found.norm().cpu() * len(sigma) ** 0.5


def test_float32_follows_float64() -> None:
    """Products in place of eigenvalues, and no levelling: rounding alone."""
    losses = []
    for dtype in (torch.float32, torch.float64):
        net = network(dtype).cuda()
        losses.append(train(net, MAKERS["kron-rms"](net), range(8)))
    assert_close(losses[0], losses[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["gradient", "scalar", "kron-rms", "kron", "gradient-graph", "kron-graph"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    """Nor do the passes before it while they are watched: at measurements and between them."""
    net = network().cuda()
    optimizer = MAKERS[name](net)
    batches = [tuple(tensor.cuda() for tensor in batch(step)) for step in range(24)]
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        if step < 2:  # what is set up once
            cross_entropy(net(x), y).backward()
            optimizer.step()
            continue
        with no_waiting():
            cross_entropy(net(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("name", ["gradient", "probe", "kron"])
def test_a_graph_takes_the_steps_that_kernels_take(name: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for made in (name, f"{name}-graph"):
            net = network().cuda()
            optimizer = MAKERS[made](net)
            for step in range(30):
                optimizer.param_groups[0]["lr"] = 0.01 / (step + 1) if made != name else torch.tensor(0.01 / (step + 1), device="cuda")
                train(net, optimizer, range(step, step + 1))
            runs.append([p.detach() for p in net.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(runs[1], runs[0], rtol=0, atol=0)


@usual
@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_is_equal_bit_for_bit(name: str, stop: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        net = network().cuda()
        optimizer = MAKERS[name](net)
        train(net, optimizer, range(stop))
        saved = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        whole = train(net, optimizer, range(stop, 14))
        saved.seek(0)
        state = torch.load(saved, weights_only=True, map_location="cpu")
        other = network().cuda()
        resumed = MAKERS[name](other)
        other.load_state_dict(state["net"])
        resumed.load_state_dict(state["optimizer"])
        assert all(value.is_cuda for entry in resumed.state.values() for value in entry.values() if isinstance(value, Tensor))
        assert train(other, resumed, range(stop, 14)) == whole
    finally:
        torch.use_deterministic_algorithms(False)


@usual
@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaled_loss_in_float16_is_the_plain_loss_and_its_overflow_no_step(name: str, overflows: bool) -> None:
    runs = []
    for scaled in (False, True):
        net = network().cuda()
        optimizer = MAKERS[name](net)
        scaler = torch.amp.GradScaler(init_scale=2.0**40 if overflows else 2.0**10, enabled=scaled)
        taken = 0
        while taken < 8:
            x, y = (tensor.cuda() for tensor in batch(taken))
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16, enabled=scaled):
                loss = cross_entropy(net(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            taken = optimizer.param_groups[0]["step"]
        assert (scaler.get_scale() < 2.0**40) or not overflows
        runs.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    start = torch.cat([p.detach().flatten() for p in network().cuda().parameters()])
    way = [run - start for run in runs]
    assert way[0] @ way[1] > 0.9 * way[0].norm() * way[1].norm()


@usual
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    net = network().cuda()
    optimizer = MAKERS[name](net)
    train(net, optimizer, range(9))
    before = copy.deepcopy(([p.detach() for p in net.parameters()], optimizer.state_dict()["state"]))
    next(net.parameters()).grad[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    optimizer.step()
    assert_close([p.detach() for p in net.parameters()], before[0], rtol=0.0, atol=0.0)
    after = optimizer.state_dict()["state"]
    for key, entry in before[1].items():
        for part in ("momentum_buffer", "response", "input_moment", "output_moment"):
            if part in entry:
                assert_close(after[key][part], entry[part], rtol=0.0, atol=0.0)
    assert optimizer.skipped_steps == 1


def test_skipped_steps_are_told_of_without_waiting() -> None:
    net = network().cuda()
    optimizer = BackMatchSGD(net, interval=4)
    with pytest.warns(UserWarning, match="skipped 1 steps"):  # noqa: PT031
        for step in range(16):
            x, y = (tensor.cuda() for tensor in batch(step))
            optimizer.zero_grad()
            (cross_entropy(net(x), y) * (float("nan") if step == 2 else 1.0)).backward()
            optimizer.step()
            torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["gradient", "kron", "kron-graph"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_the_plain_one(name: str, mode: str) -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = nn.Sequential(nn.Flatten(), nn.Linear(98, 16), nn.ReLU(), nn.Linear(16, 3)).cuda()
        torch.manual_seed(0)
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
        optimizer = MAKERS[name](net)
        losses.append(train(net, optimizer, range(10), forward=torch.compile(net, mode=mode) if compiled else None))
    assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-3)


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_nccl_available():
        pytest.skip("torch has no NCCL")
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["gradient", "kron", "kron-graph"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.usefixtures("nccl")
def test_one_rank_of_nccl_is_the_plain_run(name: str, sharded: bool) -> None:
    plain = network().cuda()
    expected = train(plain, MAKERS[name](plain), range(10))
    net = network().cuda()
    wrapped: Any = fully_shard(net) if sharded else DistributedDataParallel(net, device_ids=[0])
    assert_close(train(wrapped, MAKERS[name](wrapped), range(10)), expected, rtol=1e-3, atol=1e-4)
