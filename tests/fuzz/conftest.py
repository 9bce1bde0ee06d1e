"""How many examples: few and the same ones every time, or, with ``HYPOTHESIS_PROFILE=nightly``, many and new ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

_shared = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
# Shrinking may take minutes: a failure in CI is told at once, and made small where there is time.
settings.register_profile("ci", _shared, max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate])
settings.register_profile("nightly", _shared, max_examples=150, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module", autouse=True)
def _torch_without_onednn() -> Iterator[None]:
    """That of torch 2.13 crashes in some bfloat16 convolutions on CPUs with AVX10."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield
