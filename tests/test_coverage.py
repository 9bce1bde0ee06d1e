"""Coverage and responses of what people train: every parameter has a rule, and every response is the Jacobian's mean square."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import backmatch
from backmatch import BackMatchSGD
from backmatch.estimators import EstimatorName
from backmatch.outputs import predictions
from backmatch.probe import Inputs, squared_response_gradients


class Attends(nn.Module):
    """Token and position embedding (used functionally), multi-head attention, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Parameter(torch.randn(5, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions
        return self.head(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Adapted(nn.Module):
    """LoRA: a frozen layer and two small factors, the second of which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.factors = nn.ParameterList([nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(4, 2))])

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.factors[0].T @ self.factors[1].T


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def tokens() -> Tensor:
    return torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0))


def reals(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(12, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "attention, tied head, bare positions": (Attends, tokens()),
    "TransformerEncoder": (encoder, reals(6, 3, 4)),
    "LSTM": (lambda: Recurrent(nn.LSTM), reals(6, 5, 3)),
    "GRU": (lambda: Recurrent(nn.GRU), reals(6, 5, 3)),
    "LoRA in a ParameterList": (Adapted, reals(6, 4)),
    "called twice": (Twice, reals(6, 3)),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), reals(6, 3)),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), reals(6, 3)),
}


def build(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = CASES[case]
    return make().double(), x


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_measured_and_stepped(case: str, estimator: EstimatorName) -> None:
    net, x = build(case)
    optimizer = BackMatchSGD(net, interval=2, estimator=estimator)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert set(optimizer.responses()) == set(optimizer.paces()) == trainable
    for name, p in net.named_parameters():
        assert p.isfinite().all()
        assert torch.equal(p, before[name]) != p.requires_grad
    assert {name for rule in backmatch.coverage(net, x, estimator=estimator, quiet=True) for name in rule.names if rule.paces} >= trainable


@pytest.mark.parametrize("case", [case for case in CASES if case != "spectral_norm"])  # whose power iteration moves with every forward
def test_responses_are_the_mean_square_of_the_jacobian(case: str) -> None:
    net, x = build(case)
    draws = 400
    mean = {name: torch.zeros_like(p) for name, p in net.named_parameters() if p.requires_grad}
    for seed in range(draws):
        for name, square in squared_response_gradients(net, Inputs((x,), {}), seed=seed).items():
            mean[name] += square / draws
    for name, p in net.named_parameters():
        if p.requires_grad:
            held = {other: q.detach() for other, q in net.named_parameters()}
            jacobian = jacrev(lambda value, name=name, held=held: functional_call(net, held | {name: value}, (x,)))(p.detach())
            # Over all elements of a tensor, so that the spread of the draws averages out too.
            assert_close(mean[name].sum(), jacobian.square().sum() / predictions([net(x)]), rtol=6 * (2 / draws) ** 0.5, atol=1e-12)


@pytest.mark.parametrize("estimator", ["gradient", "probe"])
def test_rows_of_an_embedding_have_their_own_pace_and_rare_ones_are_bounded(estimator: EstimatorName) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(4 * 8, 3))
    optimizer = BackMatchSGD(net, interval=1, estimator=estimator)
    for seed in range(5):
        x = torch.randint(0, 40, (64, 4), generator=torch.Generator().manual_seed(seed)) // 4  # rows 10 to 49 never come
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    pace = optimizer.paces()["0.weight"].flatten()
    assert pace.shape == (50,)
    assert pace.isfinite().all()
    # A response counts for at least a hundredth of the tensor's mean, so a pace is at most ten times that of an average row.
    sizes, response = net[0].weight.detach().square().mean(1), optimizer.responses()["0.weight"].flatten()  # type: ignore[operator]
    typical = 1 / (sizes * response).mean().sqrt()
    assert (pace / sizes <= 10.5 * typical).all()
    assert pace[10:].min() >= pace[:10].max() > pace[:10].min()


@pytest.mark.parametrize(("estimator", "measured_at"), [("gradient", 9), ("probe", 10)])
def test_a_layer_unfrozen_later_is_measured_once_it_is_added(estimator: EstimatorName, measured_at: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    optimizer = BackMatchSGD(net, interval=2, estimator=estimator)
    for step in range(12):
        if step == 9:
            net[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(net[0].named_parameters()), "lr": 0.05})
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        assert ("0.weight" in optimizer.responses()) == (step >= measured_at)


def test_the_table_names_what_deserves_a_look(capsys: pytest.CaptureFixture[str]) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3).requires_grad_(False)
            self.up = nn.ConvTranspose1d(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.used(self.frozen(x))[..., None])

    rules = {rule.names: (rule.rule, rule.paces) for rule in backmatch.coverage(Partly(), torch.randn(4, 3))}
    assert rules["used.weight",] == ("a pace per output unit, dimension 0", 2)
    assert rules["used.bias",] == ("one pace; size of the median matrix", 1)
    assert rules["up.weight",] == ("a pace per output unit, dimension 1", 4)
    assert rules["frozen.weight",] == ("frozen: left alone", 0)
    assert rules["unused.weight",] == ("unused: the output does not depend on it, so it gets no gradient", 0)
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 8 parameters optimized, 2 unused, on the fallback rule or refused."
    probed = {rule.names: (rule.rule, rule.paces) for rule in backmatch.coverage(Partly(), torch.randn(4, 3), estimator="probe")}
    assert probed["unused.weight",] == ("fallback: the output does not depend on it", 1)
    assert {names: rule for names, rule in probed.items() if names[0].partition(".")[0] != "unused"}.items() <= rules.items()
    assert capsys.readouterr().out.splitlines()[-1] == "6 of 8 parameters optimized, 2 unused, on the fallback rule or refused."
    assert backmatch.coverage(nn.Linear(3, 0), quiet=True)[0].rule == "empty: nothing to train"
    attends = Attends()
    assert any(rule.names == ("tokens.weight", "head.weight") for rule in backmatch.coverage(attends, quiet=True))
    refused = backmatch.coverage(Recurrent(nn.LSTM), estimator="loss", quiet=True)[0]
    assert refused.rule == "refused: LSTM has no rule; use estimator='probe'"


def test_parameters_that_no_measurement_reaches_are_told_of_once() -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 2)
    optimizer = BackMatchSGD([*body.parameters(), *head.parameters()], model=body, estimator="probe", interval=1)

    def step() -> None:
        optimizer.zero_grad()
        head(body(torch.randn(8, 4))).square().mean().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"measured no response for param_groups\[0\]\['params'\]\[2\]"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert all(math.isfinite(pace.mean()) for pace in optimizer.paces().values())
