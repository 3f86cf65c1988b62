"""Constant tensors that are made once."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def cached_tensor(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a function that makes a constant tensor: keep its results. Callers must not write to them.

    While `torch.export` traces a call, new tensors are stand-ins without values. They are not kept, or later calls
    would compute with them.
    """
    kept: Callable[P, Tensor] = functools.cache(make)  # type: ignore[assignment]

    @functools.wraps(make)
    def take(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        is_traced = type(torch.empty(0)) is not Tensor
        return make(*args, **kwargs) if is_traced else kept(*args, **kwargs)

    return take
