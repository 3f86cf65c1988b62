"""Shared by the tests of benchmarks."""

from collections.abc import Iterator

import pytest
import torch

from energy_flow.core.functions import step_functions


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.compile` takes seconds; here it gives the function back."""
    step_functions.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    step_functions.cache_clear()
