"""Compiled parts of a step."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from energy_flow.core.engine.compiled import _compile


def test_many_forms_compile_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, autograd runs the backward pass in a thread of its own, which has a limit of its own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def double(value: Tensor) -> Tensor:
        return 2 * value

    compiled = _compile(double)
    values = [torch.ones((1,) * rank) for rank in range(20)]  # dynamo stops at 8 of them by default
    for value in values:
        assert compiled(value) == 2
    torch.compiler.reset()
    with ThreadPoolExecutor(1) as thread:
        for value in values:
            assert thread.submit(compiled, value).result() == 2
