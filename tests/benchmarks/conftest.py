"""Shared by the tests of benchmarks."""

from collections.abc import Iterator

import pytest
import torch

from energy_flow.core.engine.compiled import step_kernels


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace `torch.compile`, which takes seconds, by the identity."""
    step_kernels.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    step_kernels.cache_clear()
