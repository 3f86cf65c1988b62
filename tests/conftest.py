"""Shared by all tests: one thread, fixed seeds, a fast hypothesis profile."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite", max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
# Tiny tensors: more threads only add waiting, and the order of sums would depend on the machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
