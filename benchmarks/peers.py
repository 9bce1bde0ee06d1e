"""Who is compared: optimizers from torch and pytorch_optimizer at their authors' settings, two ablations, and ours.

None of the peers is written here. What their authors leave open is said beside each: which parameters a method takes, and the centre of
its grid of learning rates where the author's default is for something much larger than the panel's tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backmatch import BackMatch, BackMatchSGD

Kind = Literal["peer", "ablation", "ours"]


@dataclass(frozen=True)
class Peer:
    """One optimizer of the panel.

    Attributes:
        name: As in file names and on the command line.
        title: As in the report.
        kind: ``peer``; ``ablation``, what ours must beat to matter; ``ours``.
        build: From the model, the learning rate and the number of steps of the run.
        centre: Of its grid of learning rates.
        centres: The same, by tasks where another fits better.
        scheduled: Whether the panel's warm-up and cosine apply; a schedule-free method has its own.
    """

    name: str
    title: str
    kind: Kind
    build: Callable[[nn.Module, float, int], Optimizer]
    centre: float
    centres: Mapping[str, float] = field(default_factory=dict)
    scheduled: bool = True

    def centre_of(self, task: str) -> float:
        """Centre of the grid on the task of this name."""
        return self.centres.get(task, self.centre)


def _library(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} comes from pytorch_optimizer: pip install 'backmatch[bench]'.") from error
    return getattr(pytorch_optimizer, name)


def _of_library(name: str, **settings: Any) -> Callable[[nn.Module, float, int], Optimizer]:
    return lambda model, lr, steps: _library(name)(model.parameters(), lr=lr, **settings)


def _sgd(model: nn.Module, lr: float, steps: int) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def _nesterov(model: nn.Module, lr: float, steps: int) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def _adamw(model: nn.Module, lr: float, steps: int) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)


@cache
def _muon_in_float32() -> Any:
    """pytorch_optimizer's Muon, whose iteration takes a dtype that the class does not pass on.

    In its bfloat16, which most CPUs emulate, a step takes 15 to 25 times as long; the iteration is otherwise the library's own.
    """
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

    class MuonInFloat32(_library("Muon")):  # type: ignore[misc]
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
            settings = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
            return [zero_power_via_newton_schulz_5(update.reshape(len(update), -1), **settings) for update in updates]

    return MuonInFloat32


def _muon(model: nn.Module, lr: float, steps: int) -> Optimizer:
    """Muon for the weights of all linear and convolutional layers but the last, AdamW for the rest, at one rate (Moonlight's scaling)."""
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hidden = weights[:-1]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    shared = {"lr": lr, "weight_decay": 0.1}
    groups = [{"params": hidden, "use_muon": True, **shared}, {"params": rest, "use_muon": False, **shared}]
    if weights[0].is_cuda:
        return _library("Muon")(groups, use_adjusted_lr=True)
    # Batches of equal shapes would go to the library's own precision.
    return _muon_in_float32()(groups, use_adjusted_lr=True, foreach=False)


def _schedule_free(model: nn.Module, lr: float, steps: int) -> Optimizer:
    return _library("ScheduleFreeAdamW")(model.parameters(), lr=lr, weight_decay=0.05, warmup_steps=max(1, round(0.05 * steps)))


def _size_only(model: nn.Module, lr: float, steps: int) -> Optimizer:
    """SGD with Nesterov momentum, one group per tensor, its rate by size alone: ``1/√(fan-in)``, 1 in the geometric mean over matrices.

    Vectors take 1.
    """
    params = list(model.parameters())
    typical = math.exp(sum(math.log(p[0].numel()) for p in params if p.ndim > 1) / sum(p.ndim > 1 for p in params))
    groups = [{"params": [p], "lr": lr * math.sqrt(typical / p[0].numel()) if p.ndim > 1 else lr} for p in params]
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def _rms(model: nn.Module, lr: float, steps: int) -> Optimizer:
    """One pace per tensor, 1 over the root mean square of its averaged gradients, whatever the size of its weights.

    The weight decay is plain, and makes lr·decay at the grid's centre a thirtieth of :class:`BackMatchSGD`'s at its default.
    """
    return BackMatchSGD(model, lr, relative=False, per="tensor", weight_decay=0.4, decay_floor=0.0)


# Google's, grafted on SGD's lengths; its default of 1000 steps from one inverse root to the next is longer than most runs here.
_SHAMPOO = {"weight_decay": 5e-4, "preconditioning_compute_steps": 10, "block_size": 128}
# The loss of the autoencoder is a sum over 784 pixels, so its gradients are that much larger.
_SGD_CENTRES = {"mnist-autoencoder": 0.002, "gpt": 0.1, "gpt-short": 0.1}
_ADAM_CENTRES = {
    "digits-cnn": 6e-3,
    "friedman": 0.01,
    "mnist-mlp": 3e-3,
    "mnist-autoencoder": 9e-3,
    "cifar10-vgg13-bn": 2e-3,
    "gpt": 3e-3,
    "gpt-short": 3e-3,
}
_MUON_CENTRES = {"friedman": 0.01, "mnist-autoencoder": 3e-3, "gpt": 0.01, "gpt-short": 0.01}
_SOAP_CENTRES = {"friedman": 0.01, "mnist-mlp": 6e-3, "mnist-autoencoder": 2e-3, "gpt": 6e-3, "gpt-short": 6e-3}
_SAI_CENTRES = {"digits-cnn": 0.02, "friedman": 0.05, "mnist-mlp": 5e-3}

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("sgd", "SGD", "peer", _sgd, 0.05, _SGD_CENTRES),
        Peer("sgd-nesterov", "SGD, Nesterov", "peer", _nesterov, 0.05, _SGD_CENTRES),
        Peer("adamw", "AdamW", "peer", _adamw, 1e-3, _ADAM_CENTRES),
        Peer("muon", "Muon", "peer", _muon, 5e-3, _MUON_CENTRES),
        Peer("lars", "LARS", "peer", _of_library("LARS", weight_decay=5e-4, trust_coefficient=0.02), 0.5),
        Peer("lamb", "LAMB", "peer", _of_library("Lamb", weight_decay=0.05), 0.02),
        Peer("shampoo", "Shampoo", "peer", _of_library("ScalableShampoo", **_SHAMPOO), 0.05, _SGD_CENTRES),
        Peer("soap", "SOAP", "peer", _of_library("SOAP", max_precondition_dim=1024), 3e-3, _SOAP_CENTRES),
        Peer("prodigy", "Prodigy", "peer", _of_library("Prodigy", weight_decay=0.05, safeguard_warmup=True), 1.0),
        Peer("schedule-free", "Schedule-Free AdamW", "peer", _schedule_free, 0.01, {"friedman": 0.02}, scheduled=False),
        Peer("sgd-sai", "SGD-SaI", "peer", _of_library("SGDSaI"), 0.01, _SAI_CENTRES),
        Peer("size-only", "size only", "ablation", _size_only, 0.1, _SGD_CENTRES),
        Peer("rms", "RMS only", "ablation", _rms, 6e-4, {"friedman": 1e-3}),
        Peer("backmatch-sgd", "BackMatchSGD", "ours", lambda model, lr, steps: BackMatchSGD(model, lr, cuda_graph=True), 0.01),
        Peer("backmatch", "BackMatch", "ours", lambda model, lr, steps: BackMatch(model, lr, cuda_graph=True), 0.05),
    )
}
