"""Exploration noise as a pure function of its arguments: the same bits on every device, in every order of computing."""

from statistics import NormalDist

import torch
from torch import Tensor

from energy_flow.ops.constants import cached_tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TABLE_BITS = 16


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors that broadcast together, each a word in [0, 2^32).
        key: two such tensors.

    Returns:
        Four int64 tensors of words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # The product wraps around in int64, which keeps its 64 bits. `>>` is arithmetic, so the mask clears the sign bits.
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


@cached_tensor
def normal_quantiles(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Midpoint quantiles of the standard normal distribution, [2^16], from -4.3 to 4.3, variance 1."""
    # This is a table because logarithms and cosines (Box-Muller) round differently on each device.
    count = 2**_TABLE_BITS
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / count) for i in range(count // 2)]
    scale = (2 * sum(value * value for value in upper) / count) ** -0.5
    with torch.inference_mode(False):  # the cached tensor may be used in training next
        half = torch.tensor(upper, dtype=torch.float64) * scale
        return torch.cat([-half.flip(0), half]).to(device=device, dtype=dtype)


def counter_noise(
    seed: int, optimizer_step: Tensor, rollout_step: int, rows: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    """Standard normal noise. Each element depends only on the arguments and its own index.

    Args:
        seed: any integer; 64 bits of it are used.
        optimizer_step: int64 scalar tensor on the device of `rows`; as a tensor it needs no host sync.
        rollout_step: 0 for the first step of the rollout.
        rows: [B] int64, index of each sample in its data set, in [0, 2^32).
        num_slots: M.
        dtype: of the result.

    Returns:
        [B, M, 3], one number per slot and axis.
    """
    return drawn(seed, optimizer_step, rollout_step, rows, num_slots, normal_quantiles(dtype, rows.device))


def drawn(
    seed: int, optimizer_step: Tensor, rollout_step: int, rows: Tensor, num_slots: int, quantiles: Tensor
) -> Tensor:
    """`counter_noise` from a given table of quantiles, for `torch.compile`."""
    device = rows.device
    slots = torch.arange(num_slots, device=device)
    counter = (
        (rows & _WORD)[:, None].expand(-1, num_slots),
        slots.expand(rows.shape[0], -1),
        torch.full((), rollout_step, dtype=torch.int64, device=device),
        optimizer_step & _WORD,
    )
    key = tuple(torch.full((), (seed >> shift) & _WORD, dtype=torch.int64, device=device) for shift in (0, 32))
    words = philox4x32(counter, (key[0], key[1]))
    draws = torch.stack(torch.broadcast_tensors(*words[:3]), dim=-1) >> (32 - _TABLE_BITS)
    return quantiles[draws]
