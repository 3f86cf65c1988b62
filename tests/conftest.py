"""Settings of all tests: one thread, a GPU only with `-m gpu`, fixed seeds, a fast hypothesis profile."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for programs that tests start

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite", max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
# Tiny tensors: more threads only add waiting, and the order of sums would depend on the machine.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all other tests: they compare bits and memory of a CPU, and run several processes at once."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_searched() -> None:
    """Keep the garbage collector to new objects: libraries bring millions, and tests collect often."""
    gc.collect()
    gc.freeze()
