"""Constant tensors that are made once."""

import functools
from collections.abc import Callable
from typing import TypeVarTuple

import torch
from torch import Tensor

Arguments = TypeVarTuple("Arguments")


def cached_tensor(make: Callable[[*Arguments], Tensor]) -> Callable[[*Arguments], Tensor]:
    """Decorate a function that makes a constant tensor: keep its results. Callers must not write to them.

    While `torch.export` traces a call, new tensors are stand-ins without values. They are not kept, or later calls
    would compute with them.
    """
    kept = functools.cache(make)

    @functools.wraps(make)
    def take(*args: *Arguments) -> Tensor:
        is_traced = type(torch.empty(0)) is not Tensor
        return make(*args) if is_traced else kept(*args)

    return take
