"""One step of a gated recurrent unit."""

import torch
from torch import Tensor
from torch.nn import functional


def gru_cell(
    inputs: Tensor, hidden: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """GRU cell with the gate order and equations of `torch.nn.GRUCell` (Cho et al., 2014).

    Args:
        inputs: [N, X].
        hidden: [N, H].
        weight_ih, weight_hh: [3H, X] and [3H, H]; gates in the order reset, update, new.
        bias_ih, bias_hh: [3H].

    Returns:
        The next hidden state, [N, H].
    """
    input_reset, input_update, input_new = functional.linear(inputs, weight_ih, bias_ih).chunk(3, dim=-1)
    hidden_reset, hidden_update, hidden_new = functional.linear(hidden, weight_hh, bias_hh).chunk(3, dim=-1)
    reset = torch.sigmoid(input_reset + hidden_reset)
    update = torch.sigmoid(input_update + hidden_update)
    new = torch.tanh(input_new + reset * hidden_new)
    return torch.lerp(new, hidden.to(new.dtype), update)
