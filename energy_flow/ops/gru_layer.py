"""One GRU layer over the rows of a tape: matrix products into a gate buffer, and their gradients.

A row of the tape holds [x | h], the input and the hidden state of a layer, so that products of both have one operand.
A row of a gate buffer holds [n | r | z | hn] (see `gru_gates`). The gradient of x needs its first three parts, the
gradient of h its last three.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from energy_flow.ops.prefix_matmul import prefix_addmm, prefix_mm


@dataclass(frozen=True)
class PackedLayer:
    """The weights of a GRU cell in the dtype and order of the products."""

    weight_ih: Tensor  # [3H, X], rows n, r, z; columns are padded with zeros to the X of the tape
    weight_hh: Tensor  # [3H, H], rows r, z, n
    reset_update: Tensor  # [2H, X + H], rows r, z
    bias: Tensor  # [4H] of [n | r | z | hn], never less than float32

    @classmethod
    def pack(cls, cell: nn.GRUCell, input_size: int, dtype: torch.dtype) -> Self:
        """Pack the weights of a cell.

        Args:
            cell: its `input_size` is at most X.
            input_size: X of the tape.
            dtype: of the products.
        """
        size = cell.hidden_size
        reset, update, new = cell.weight_ih.split(size)
        weight_ih = torch.cat([new, reset, update]).to(dtype)
        if input_size > cell.input_size:
            weight_ih = nn.functional.pad(weight_ih, (0, input_size - cell.input_size))
        weight_hh = cell.weight_hh.to(dtype, copy=True)  # never the parameter itself, which may change
        bias_ir, bias_iz, bias_in = cell.bias_ih.split(size)
        bias_hr, bias_hz, bias_hn = cell.bias_hh.split(size)
        bias = torch.cat([bias_in, bias_ir + bias_hr, bias_iz + bias_hz, bias_hn])
        reset_update = torch.cat([weight_ih[size:], weight_hh[: 2 * size]], dim=1)
        return cls(weight_ih, weight_hh, reset_update, bias.to(torch.promote_types(bias.dtype, torch.float32)))

    @property
    def hidden_size(self) -> int:
        return self.weight_hh.shape[1]

    @property
    def input_size(self) -> int:
        return self.weight_ih.shape[1]

    def products(self, xh: Tensor, gates: Tensor, empty: bool, count: Tensor | None = None) -> None:
        """Fill `gates` [N, 4H] with the products of `xh` = [x | h] [N, X + H], without biases.

        Args:
            empty: whether h is 0.
            count: int64 scalar: only so many leading rows are in use (see `prefix_matmul`). None: all.
        """
        size = self.hidden_size
        inputs, hidden = _safe_operand(xh[:, : self.input_size]), _safe_operand(xh[:, self.input_size :])
        if empty:
            prefix_mm(inputs, self.weight_ih.T, gates[:, : 3 * size], count)
            gates[:, 3 * size :].zero_()
            return
        prefix_mm(_safe_operand(xh), self.reset_update.T, gates[:, size : 3 * size], count)
        prefix_mm(inputs, self.weight_ih[:size].T, gates[:, :size], count)
        prefix_mm(hidden, self.weight_hh[2 * size :].T, gates[:, 3 * size :], count)

    def add_hidden_gradient(self, grad_gates: Tensor, grad_hidden: Tensor, count: Tensor | None = None) -> None:
        """Add the part through the gates to `grad_hidden`, the gradient of h, [N, H]."""
        prefix_addmm(_safe_operand(grad_gates[:, self.hidden_size :]), self.weight_hh, grad_hidden, count)

    def input_gradient(self, grad_gates: Tensor, count: Tensor | None = None) -> Tensor:
        """The gradient of x, [N, X]."""
        gradients = _safe_operand(grad_gates[:, : 3 * self.hidden_size])
        if count is None:
            return torch.mm(gradients, self.weight_ih)
        grad_input = gradients.new_zeros(len(gradients), self.input_size)
        prefix_mm(gradients, self.weight_ih, grad_input, count)
        return grad_input

    def add_input_gradient(self, grad_gates: Tensor, grad_input: Tensor, count: Tensor | None = None) -> None:
        """Add the gradient of x to `grad_input` [N, X]."""
        prefix_addmm(_safe_operand(grad_gates[:, : 3 * self.hidden_size]), self.weight_ih, grad_input, count)


class LayerGradients:
    """Sums of the weight gradients of a layer, in the order of `PackedLayer`, in float32 at least.

    The matrices are transposed, because products of that shape are faster on CPUs and as fast on GPUs.

    Args:
        layer: whose gradients.
        trained: whether to compute the weights' gradients; if not, they stay 0.
    """

    def __init__(self, layer: PackedLayer, trained: bool = True) -> None:
        self._trained = trained
        self.weight_ih = layer.bias.new_zeros(layer.input_size, 3 * layer.hidden_size)
        self.weight_hh = layer.bias.new_zeros(layer.hidden_size, 3 * layer.hidden_size)
        self.bias = torch.zeros_like(layer.bias)

    def add(self, grad_gates: Tensor, xh: Tensor, num_empty: int) -> None:
        """Add the weight gradients of N rows: of one step, or of all steps together.

        Args:
            grad_gates: [N, 4H].
            xh: [N, X + H], a view of the tape.
            num_empty: h is 0 in so many leading rows.
        """
        if not self._trained:
            return
        width, size = self.weight_ih.shape[0], self.weight_hh.shape[0]
        _add_product(self.weight_ih, xh[:, :width], grad_gates[:, : 3 * size])
        if num_empty < len(xh):
            _add_product(self.weight_hh, xh[num_empty:, width:], grad_gates[num_empty:, size:])

    def unpack(self, input_size: int | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The gradients of weight_ih, weight_hh, bias_ih and bias_hh of the cell.

        Args:
            input_size: of the cell, without padding; None: there is no padding.
            dtype: of the cell's parameters.
        """
        size = self.weight_hh.shape[0]
        new, reset, update = self.weight_ih[:input_size].T.split(size)
        bias_in, bias_r, bias_z, bias_hn = self.bias.split(size)
        gradients = (
            torch.cat([reset, update, new]),
            self.weight_hh.T.contiguous(),
            torch.cat([bias_r, bias_z, bias_in]),
            torch.cat([bias_r, bias_z, bias_hn]),
        )
        return tuple(gradient.to(dtype) for gradient in gradients)


def _safe_operand(matrix: Tensor) -> Tensor:
    """Make a left operand safe to multiply.

    On a CPU, bfloat16 products (torch 2.13) read up to a multiple of 32 columns and multiply the extra ones by 0. The
    extra columns are other columns of the tape. A NaN in them, perhaps of another sample, would reach the result.
    """
    reads_beyond = matrix.device.type == "cpu" and matrix.dtype == torch.bfloat16 and matrix.shape[1] % 32 != 0
    return matrix.contiguous() if reads_beyond else matrix


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, summed in the dtype of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda and _CUDA_MM_WIDENS:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
    else:
        total += torch.mm(left.T, right)


# On CUDA, torch >= 2.8 has `mm` with bf16 operands and a float32 result.
_CUDA_MM_WIDENS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
