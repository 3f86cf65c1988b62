"""Whether something runs the code with stand-ins for tensors."""

import torch
from torch import Tensor


def is_traced(value: Tensor) -> bool:
    """Whether torch.export, torch.compile, torch.func or the meta device runs the code with stand-ins for tensors."""
    return (
        type(value) is not Tensor
        or value.is_meta
        or torch.compiler.is_exporting()
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
