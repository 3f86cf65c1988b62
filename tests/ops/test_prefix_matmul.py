"""Products of the leading rows, whose number is in a tensor."""

import pytest
import torch
from torch import Tensor

from energy_flow.ops.backend import use_triton
from energy_flow.ops.prefix_matmul import prefix_addmm, prefix_mm
from tests.ops.kernels import DEVICES, HALVES, INTERPRETED
from tests.ops.test_gru_gates import strided

SIZES = [(300, 64, 96), (129, 40, 257), (1, 16, 8), (260, 100, 1)]  # N, K, M
OTHER = 7  # value of `out` in rows that are not in use


def close(actual: Tensor, expected: Tensor) -> None:
    bound = 2 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("share", [0, 0.5, 0.99, 1])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_in_use_equal_the_whole_product(
    device: str, size: tuple[int, int, int], share: float, dtype: torch.dtype, transposed: bool
) -> None:
    if INTERPRETED and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter reads bfloat16 operands of a product as integers")
    num, inner, columns = size
    used = int(share * num)
    left, right, before = (torch.randn(shape) for shape in ((num, inner), (inner, columns), (num, columns)))
    left[used:] = 0  # as `prefix_addmm` requires
    left, right, before = (tensor.to(device, dtype) for tensor in (left, right, before))
    if transposed:
        right = right.t().contiguous().t()
    count, product = torch.tensor(used, device=device), left.double() @ right.double()

    out, total = strided(torch.full_like(before, OTHER)), strided(before)
    if use_triton(left):  # on a CPU, torch's bfloat16 products read beyond the operand
        left = strided(left)
    prefix_mm(left, right, out, count)
    prefix_addmm(left, right, total, count)
    close(out[:used], product[:used])
    close(total[:used], before[:used].double() + product[:used])
    assert ((out[used:] == OTHER) | (out[used:] == 0)).all()
    assert torch.equal(total[used:], before[used:])
    for result in (out, total):
        around = result._base
        assert around is not None
        assert around[:, :3].isnan().all()
        assert around[:, -3:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_count_all_rows_are_in_use(device: str) -> None:
    left, right, total = (torch.randn(9, 9, device=device) for _ in range(3))
    out, before = torch.empty_like(left), total.clone()
    prefix_mm(left, right, out, None)
    prefix_addmm(left, right, total, None)
    assert torch.equal(out, left @ right)
    torch.testing.assert_close(total, before + left @ right)
