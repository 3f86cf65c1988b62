"""Shared by the tests of benchmarks."""

from collections.abc import Iterator

import pytest
import torch

from energy_flow.core.engine.compiled import step_kernels


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.compile` takes seconds; here it gives the function back."""
    step_kernels.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    step_kernels.cache_clear()
