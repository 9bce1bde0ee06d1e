"""What the rules of one layer are held against: the mean squares of its Jacobians by autodiff."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call


def batch_gain(module: nn.Module, x: Tensor) -> Tensor:
    """tr(JᵀJ) / numel(x) with J that of the whole batch; the mean over samples where samples do not meet."""
    jacobian = torch.autograd.functional.jacobian(copy.deepcopy(module), x)
    return jacobian.square().sum() / x.numel()


def sample_curvature(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """(1/N) Σ_i tr(J_WᵀJ_W) / dim(W); rows of one batch Jacobian, so that batch statistics are those of the batch."""
    names, parameters = zip(*((name, p.detach()) for name, p in module.named_parameters()), strict=True)
    jacobians = torch.autograd.functional.jacobian(
        lambda *p: functional_call(copy.deepcopy(module), dict(zip(names, p, strict=True)), (x,)), parameters
    )
    return {name: j.square().sum() / (x.shape[0] * p.numel()) for name, j, p in zip(names, jacobians, parameters, strict=True)}
