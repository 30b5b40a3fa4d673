"""Profiles, and the `gpu` marker."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

common = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("ci", max_examples=60, derandomize=True, **common)
settings.register_profile("thorough", max_examples=1000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Processes that tests start find the package compiled, as a user's do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure(config):
    # With several test workers, each with a thread a core would be slower than one each.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def one_thread():
    """CPU time of one thread hardly depends on other work on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
