"""Hypothesis strategies that draw an optimizer of the package with its settings, and which refusals count as clear."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import backmatch
from backmatch import BackMatch, BackMatchSGD

KINDS = ("gradient", "probe", "rules", "loss", "ladder")
"""BackMatchSGD's estimators, and BackMatch."""

_REMEDIES = {
    "gradient": (),
    "probe": ("Invalid samples: 1.",),
    "rules": ("Invalid samples: 1.", "Use estimator='probe'"),
    "loss": ("Use estimator='probe'",),
    "ladder": (),
}
_PACKAGE = Path(backmatch.__file__).parent


@dataclass(frozen=True)
class Setup:
    """What to build an optimizer with."""

    kind: str
    settings: dict[str, Any]

    def build(self, model: nn.Module) -> BackMatchSGD:
        if self.kind == "ladder":
            return BackMatch(model, **self.settings)
        return BackMatchSGD(model, estimator=self.kind, **self.settings)  # type: ignore[arg-type]


@st.composite
def setups(draw: st.DrawFn, kind: str) -> Setup:
    """BackMatchSGD with this estimator, or BackMatch on any rung; half of the other settings are left at their defaults."""
    choices: dict[str, list[Any]] = {
        "lr": [0.0, 1e-3, 0.05, torch.tensor(1e-3), torch.tensor([1e-3])],
        "momentum": [0.0, 0.5, 0.95],
        "weight_decay": [0.0, 0.1],
        "maximize": [True],
        "power": [0.0, 0.3, 1.0],
        "interval": [1, 2],
        "beta": [0.0, 0.5],
    }
    if kind == "ladder":
        choices |= {"damping": [0.0, 1.0], "rows": [1, 3], "widest": [1, 2]}
    else:
        choices |= {"foreach": [True], "relative": [False], "bound": [1.0, 3.0], "max_change": [1e-3, float("inf")], "samples": [1]}
        choices["decay_floor"] = [0.0, 0.5]
    if kind in ("gradient", "probe"):
        choices["per"] = ["tensor"]
    if kind == "gradient":
        choices["max_stretch"] = [1e-3, 0.1]
    settings = {name: draw(st.sampled_from(values)) for name, values in choices.items() if draw(st.booleans())}
    if "relative" in settings:
        settings.pop("max_stretch", None)
    if settings.get("momentum") == 0.0 or draw(st.booleans()):
        settings["nesterov"] = False
    if kind == "ladder":
        settings["match"] = draw(st.sampled_from(["kron", "gram", "scalar"]))
        settings["step"] = draw(st.sampled_from(["spectral", "rms", "plain"]))
    return Setup(kind, settings)


@contextmanager
def clear_refusals(kind: str) -> Iterator[None]:
    """Ends the block quietly where an estimator says, in the package's own words, what it cannot measure and what to do."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        if not _is_own(error) or not any(remedy in str(error) for remedy in _REMEDIES[kind]):
            raise


def _is_own(error: Exception) -> bool:
    """Whether the package itself raised it, not what it called."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(_PACKAGE) and (frame.line or "").startswith("raise ")
