"""Fixtures and settings for every test."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# A slow example says nothing on a busy machine; how long a test may take is pytest-timeout's business.
settings.register_profile("flashcp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flashcp")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` skip themselves where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
