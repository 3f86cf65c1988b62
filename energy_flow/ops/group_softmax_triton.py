"""Triton kernels of `group_softmax`: one pass over members forward (two where a maximum is subtracted), one backward.

A row of the table of sums [G, P] has a power of two of columns, four for E = 1: what a member adds to a group is one
16-byte addition, and what it reads there one 16-byte load. The columns are those of `group_softmax`; the empty member
is not in the denominators. Nothing waits for the device or depends on its data: all of it is fit for CUDA graphs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads annotations of kernels itself.)

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUM_WARPS = 4
_ENTRIES = 2048  # numbers of the table that a program holds at once: four rows of four per thread


def sums(scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool) -> Tensor:
    """The table of sums, [G, P]."""
    num_members, energy_dim = values.shape
    table = values.new_zeros(num_groups, _num_columns(energy_dim, bounded))
    if num_members == 0:
        return table
    sizes = _sizes(keys, energy_dim, table)
    grid = (triton.cdiv(num_members, sizes["BLOCK"]),)
    with torch.cuda.device_of(table):
        if not bounded:
            table[:, energy_dim + 2].fill_(-torch.inf)
            _maximum_kernel[grid](table, scores, keys, weights, num_members, **sizes, num_warps=_NUM_WARPS)
        _sum_kernel[grid](
            table, scores, values, keys, weights, num_members, **sizes, BOUNDED=bounded, num_warps=_NUM_WARPS
        )
    return table


def padded(table: Tensor, energy_dim: int, bounded: bool) -> Tensor:
    """A table of sums made elsewhere, with as many columns as the kernels expect."""
    return torch.nn.functional.pad(table, (0, _num_columns(energy_dim, bounded) - table.shape[1]))


def normalise(table: Tensor, energy_dim: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """Averages [G, E] and mass [G]."""
    num_groups, num_columns = table.shape
    average, mass = table.new_empty(num_groups, energy_dim), table.new_empty(num_groups)
    block = max(1, _ENTRIES // num_columns)
    if num_groups > 0:
        with torch.cuda.device_of(table):
            _normalise_kernel[(triton.cdiv(num_groups, block),)](
                table, average, mass, num_groups, energy_dim, num_columns, bounded, block, num_warps=_NUM_WARPS
            )
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
    """Of scores, values and, if wanted, weights."""
    on_scores, on_values = torch.empty_like(scores), torch.empty_like(values)
    on_weights = torch.empty_like(weights) if for_weights else None
    num_members, energy_dim = values.shape
    if num_members > 0:
        sizes = _sizes(keys, energy_dim, table)
        with torch.cuda.device_of(table):
            _gradient_kernel[(triton.cdiv(num_members, sizes["BLOCK"]),)](
                grad,
                table,
                scores,
                values,
                keys,
                weights,
                on_scores,
                on_values,
                on_weights,
                num_members,
                **sizes,
                BOUNDED=bounded,
                FOR_WEIGHTS=for_weights,
                num_warps=_NUM_WARPS,
            )
    return on_scores, on_values, on_weights


def _num_columns(energy_dim: int, bounded: bool) -> int:
    return triton.next_power_of_2(energy_dim + (2 if bounded else 3))


def _sizes(keys: Tensor, energy_dim: int, table: Tensor) -> dict[str, int]:
    num_shares, num_columns = keys.shape[1], table.shape[1]
    shares_padded = triton.next_power_of_2(num_shares)
    block = max(1, _ENTRIES // (shares_padded * num_columns))
    return {"E": energy_dim, "K": num_shares, "P": num_columns, "K_PADDED": shares_padded, "BLOCK": block}


# Kernels. Tiles are [members], [members, K] or [members, K, P]; `where` rather than min and max, which lose NaN.


@triton.jit
def _entries(num_members, K: tl.constexpr, K_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Members of this program [BLOCK], which of them exist, their places in [N, K] and which of those exist."""
    members = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exist = members < num_members
    shares = tl.arange(0, K_PADDED)
    return members, exist, members[:, None] * K + shares[None, :], exist[:, None] & (shares < K)[None, :]


@triton.jit
def _column(rows, columns, which: tl.constexpr, axis: tl.constexpr):
    # A thread holds all that it loaded of a row: no more than picking a register.
    return tl.sum(tl.where(columns == which, rows, 0.0), axis=axis)


@triton.jit
def _shift(mass, maximum):
    return tl.where((mass < 1) & (maximum < 0), 0.0, maximum)


@triton.jit
def _exponential(scores, shift):
    exponent = scores - shift
    # Only members of weight 0 are above the maximum of their group; they add nothing, but exp must stay finite.
    return tl.exp(tl.where(exponent > 60.0, 60.0, exponent))


@triton.jit
def _denominator(total, mass, shift, BOUNDED: tl.constexpr):
    """With the empty member; and exp(0 - shift), which is 1 or less and only counts where there is one."""
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
    """The masses and the largest scores."""
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
    """The masses, unless a maximum was needed first, and all other sums."""
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
    # Slots that didn't land have weight 0 and mostly the same key: they would queue up for one row.
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
    on_scores,
    on_values,
    on_weights,
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
    tl.store(on_scores + members, tl.sum(share * along, axis=1), mask=exist)
    tl.store(on_values + value_places, tl.sum(share[:, :, None] * slopes, axis=1), mask=value_exist)
    if FOR_WEIGHTS:
        lost = tl.where(mass <= 1, tl.sum(slopes * average, axis=2) * empty / denominator, 0.0)
        tl.store(on_weights + entries, portion * along + lost, mask=present)
