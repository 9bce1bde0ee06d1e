"""Warnings that point at the user's line."""

from __future__ import annotations

import inspect
import warnings

_INSIDE = tuple(f"{name}." for name in (__package__, "torch", "accelerate", "lightning", "pytorch_lightning", "skorch", "transformers"))
"""Beginnings of the names of modules that a warning should not point at: of ours, torch's, and loops that call ``step`` for their users."""


def warn_user(text: str) -> None:
    """A UserWarning that points at the innermost line that is not :data:`_INSIDE`."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
