"""Triton kernels of `group_softmax`: one pass over members forward (two if a maximum is subtracted), one backward.

The table of sums is [G, P] with the columns of `group_softmax`; the denominators don't include the empty member. P is
a power of two, 4 for E = 1, so a member adds to a group with one 16-byte addition and reads it with one 16-byte load.
The kernels neither wait for the device nor depend on its data, so CUDA graphs can capture them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of kernels itself.

import torch
import triton
import triton.language as tl
from torch import Tensor

from energy_flow.ops.launch import launch

_NUM_WARPS = 4
_ENTRIES = 2048  # numbers of the table in the registers of a program: four rows of four per thread


def sums(scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool) -> Tensor:
    """The table of sums, [G, P]."""
    num_members, energy_dim = values.shape
    table = values.new_zeros(num_groups, _num_columns(energy_dim, bounded))
    if num_members == 0:
        return table
    sizes = _sizes(keys, energy_dim, table)
    programs = triton.cdiv(num_members, sizes["BLOCK"])
    options = {**sizes, "num_warps": _NUM_WARPS}
    if not bounded:
        table[:, energy_dim + 2].fill_(-torch.inf)
        launch(_maximum_kernel, programs, table, scores, keys, weights, num_members, **options)
    launch(_sum_kernel, programs, table, scores, values, keys, weights, num_members, BOUNDED=bounded, **options)
    return table


def padded(table: Tensor, energy_dim: int, bounded: bool) -> Tensor:
    """Pad a table of sums to the number of columns that the kernels expect."""
    return torch.nn.functional.pad(table, (0, _num_columns(energy_dim, bounded) - table.shape[1]))


def normalise(table: Tensor, energy_dim: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """Averages [G, E] and mass [G]."""
    num_groups, num_columns = table.shape
    average, mass = table.new_empty(num_groups, energy_dim), table.new_empty(num_groups)
    block = max(1, _ENTRIES // num_columns)
    programs, sizes = triton.cdiv(num_groups, block), (energy_dim, num_columns, bounded, block)
    launch(_normalise_kernel, programs, table, average, mass, num_groups, *sizes, num_warps=_NUM_WARPS)
    return average, mass


def gradients(
    grad: Tensor,
    scores: Tensor,
    values: Tensor,
    keys: Tensor,
    weights: Tensor,
    table: Tensor,
    bounded: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of scores, values and, with `for_weights`, weights."""
    grad_scores, grad_values = torch.empty_like(scores), torch.empty_like(values)
    grad_weights = torch.empty_like(weights) if for_weights else None
    num_members, energy_dim = values.shape
    sizes = _sizes(keys, energy_dim, table)
    launch(
        _gradient_kernel,
        triton.cdiv(num_members, sizes["BLOCK"]),
        grad,
        table,
        scores,
        values,
        keys,
        weights,
        grad_scores,
        grad_values,
        grad_weights,
        num_members,
        **sizes,
        BOUNDED=bounded,
        FOR_WEIGHTS=for_weights,
        num_warps=_NUM_WARPS,
    )
    return grad_scores, grad_values, grad_weights


def _num_columns(energy_dim: int, bounded: bool) -> int:
    return triton.next_power_of_2(energy_dim + (2 if bounded else 3))


def _sizes(keys: Tensor, energy_dim: int, table: Tensor) -> dict[str, int]:
    num_shares, num_columns = keys.shape[1], table.shape[1]
    shares_padded = triton.next_power_of_2(num_shares)
    block = max(1, _ENTRIES // (shares_padded * num_columns))
    return {"E": energy_dim, "K": num_shares, "P": num_columns, "K_PADDED": shares_padded, "BLOCK": block}


# Kernels. Tiles are [members], [members, K] or [members, K, P]. They use `where`, because min and max lose NaN.


@triton.jit
def _entries(num_members, K: tl.constexpr, K_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Members of this program [BLOCK], a mask of those that exist, their indices in [N, K], and the mask of these."""
    members = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exist = members < num_members
    shares = tl.arange(0, K_PADDED)
    return members, exist, members[:, None] * K + shares[None, :], exist[:, None] & (shares < K)[None, :]


@triton.jit
def _column(rows, columns, which: tl.constexpr, axis: tl.constexpr):
    # A thread holds the whole row, so this only picks a register.
    return tl.sum(tl.where(columns == which, rows, 0.0), axis=axis)


@triton.jit
def _shift(mass, maximum):
    return tl.where((mass < 1) & (maximum < 0), 0.0, maximum)


@triton.jit
def _exponential(scores, shift):
    exponent = scores - shift
    # Only members of weight 0 exceed the maximum of their group. They add nothing, but exp must stay finite.
    return tl.exp(tl.where(exponent > 60.0, 60.0, exponent))


@triton.jit
def _denominator(total, mass, shift, BOUNDED: tl.constexpr):
    """The denominator with the empty member, and exp(0 - shift) <= 1, which only counts if there is an empty member."""
    empty = tl.full(mass.shape, 1.0, mass.dtype)
    if not BOUNDED:
        empty = tl.exp(tl.where(shift < 0, 0.0, -shift))
    return total + tl.where(mass < 1, 1 - mass, 0.0) * empty, empty


@triton.jit(do_not_specialize=["num_members"])
def _maximum_kernel(
    table,
    scores,
    keys,
    weights,
    num_members,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the masses and find the largest scores."""
    members, exist, entries, present = _entries(num_members, K, K_PADDED, BLOCK)
    groups = table + tl.load(keys + entries, mask=present, other=0) * P
    weight = tl.load(weights + entries, mask=present, other=0.0)
    score = tl.load(scores + members, mask=exist, other=0.0)[:, None] + tl.zeros_like(weight)
    tl.atomic_add(groups + E, weight, mask=present & (weight != 0), sem="relaxed")
    tl.atomic_max(groups + E + 2, score, mask=present & (weight > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_members"])
def _sum_kernel(
    table,
    scores,
    values,
    keys,
    weights,
    num_members,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Compute all sums; the masses only if `_maximum_kernel` didn't."""
    members, exist, entries, present = _entries(num_members, K, K_PADDED, BLOCK)
    columns = tl.arange(0, P)
    groups = table + tl.load(keys + entries, mask=present, other=0) * P
    weight = tl.load(weights + entries, mask=present, other=0.0)
    score = tl.load(scores + members, mask=exist, other=0.0)[:, None]
    value = tl.load(
        values + members[:, None] * E + columns[None, :], mask=exist[:, None] & (columns < E)[None, :], other=0.0
    )
    if BOUNDED:
        share = weight * tl.exp(score)
        masses = weight
    else:
        mass = tl.load(groups + E, mask=present, other=0.0)
        share = weight * _exponential(score, _shift(mass, tl.load(groups + E + 2, mask=present, other=0.0)))
        masses = tl.zeros_like(weight)
    columns = columns[None, None, :]
    added = share[:, :, None] * value[:, None, :]
    added = tl.where(columns == E, masses[:, :, None], tl.where(columns == E + 1, share[:, :, None], added))
    # Slots without a landing have weight 0 and mostly the same key. Their additions would wait for the same row.
    tl.atomic_add(groups[:, :, None] + columns, added, mask=(present & (share != 0))[:, :, None], sem="relaxed")


@triton.jit(do_not_specialize=["num_groups"])
def _normalise_kernel(
    table,
    average,
    masses,
    num_groups,
    E: tl.constexpr,
    P: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exist = groups < num_groups
    columns = tl.arange(0, P)[None, :]
    rows = tl.load(table + groups[:, None] * P + columns, mask=exist[:, None], other=0.0)
    mass = _column(rows, columns, E, 1)
    shift = mass if BOUNDED else _shift(mass, _column(rows, columns, E + 2, 1))
    denominator, _ = _denominator(_column(rows, columns, E + 1, 1), mass, shift, BOUNDED)
    tl.store(average + groups[:, None] * E + columns, rows / denominator[:, None], mask=exist[:, None] & (columns < E))
    tl.store(masses + groups, mass, mask=exist)


@triton.jit(do_not_specialize=["num_members"])
def _gradient_kernel(
    grad,
    table,
    scores,
    values,
    keys,
    weights,
    grad_scores,
    grad_values,
    grad_weights,
    num_members,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    FOR_WEIGHTS: tl.constexpr,
):
    members, exist, entries, present = _entries(num_members, K, K_PADDED, BLOCK)
    columns = tl.arange(0, P)
    value_places = members[:, None] * E + columns[None, :]
    value_exist = exist[:, None] & (columns < E)[None, :]
    columns = columns[None, None, :]
    groups = tl.load(keys + entries, mask=present, other=0)
    weight = tl.load(weights + entries, mask=present, other=0.0)
    score = tl.load(scores + members, mask=exist, other=0.0)[:, None]
    value = tl.load(values + value_places, mask=value_exist, other=0.0)
    rows = tl.load(table + groups[:, :, None] * P + columns, mask=present[:, :, None], other=0.0)
    slopes = tl.load(grad + groups[:, :, None] * E + columns, mask=present[:, :, None] & (columns < E), other=0.0)
    mass = _column(rows, columns, E, 2)
    shift = mass if BOUNDED else _shift(mass, _column(rows, columns, E + 2, 2))
    denominator, empty = _denominator(_column(rows, columns, E + 1, 2), mass, shift, BOUNDED)
    portion = (tl.exp(score) if BOUNDED else _exponential(score, shift)) / denominator
    share = weight * portion
    average = tl.where(columns < E, rows, 0.0) / denominator[:, :, None]
    along = tl.sum(slopes * (value[:, None, :] - average), axis=2)
    tl.store(grad_scores + members, tl.sum(share * along, axis=1), mask=exist)
    tl.store(grad_values + value_places, tl.sum(share[:, :, None] * slopes, axis=1), mask=value_exist)
    if FOR_WEIGHTS:
        lost = tl.where(mass <= 1, tl.sum(slopes * average, axis=2) * empty / denominator, 0.0)
        tl.store(grad_weights + entries, portion * along + lost, mask=present)
