"""Exploration noise: Philox against Python integers and published vectors, the arguments, the distribution."""

import random
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from energy_flow.ops.counter_noise import counter_noise, philox4x32

WORD = 0xFFFFFFFF
STEP = torch.tensor(5)


def philox_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python integers, from the paper (Salmon et al., SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & WORD, (product0 >> 32) ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def philox(counter: list[int], key: list[int]) -> list[int]:
    words = philox4x32(*(tuple(torch.tensor(word) for word in words) for words in (counter, key)))
    return [int(word) for word in words]


# Random123, tests/kat_vectors, "philox4x32 10".
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox_integers(counter, key) == expected
    assert philox(counter, key) == expected


def test_philox_equals_integers() -> None:
    rng = random.Random(0)
    counters = [[rng.getrandbits(32) for _ in range(4)] for _ in range(200)]
    key = [rng.getrandbits(32), rng.getrandbits(32)]
    words = philox4x32(
        tuple(torch.tensor(column) for column in zip(*counters, strict=True)), tuple(torch.tensor(word) for word in key)
    )
    actual = torch.stack(words, dim=1).tolist()
    assert actual == [philox_integers(counter, key) for counter in counters]


def noise(
    seed: int = 1, step: int = 5, rollout_step: int = 2, rows: tuple[int, ...] = (0, 4, 9), num_slots: int = 6
) -> Tensor:
    return counter_noise(seed, torch.tensor(step), rollout_step, torch.tensor(rows), num_slots, torch.float64)


def test_numbers_are_quantiles_of_philox_words() -> None:
    """The bits are part of the contract, so that a later version can repeat a stored run."""
    seed, step, rollout_step, rows, num_slots = 2**40 + 77, 11, 3, (2, 2**31), 4
    actual = noise(seed, step, rollout_step, rows, num_slots)
    for b, row in enumerate(rows):
        for slot in range(num_slots):
            words = philox_integers([row, slot, rollout_step, step], [seed & WORD, seed >> 32])
            for axis in range(3):
                quantile = NormalDist().inv_cdf(((words[axis] >> 16) + 0.5) / 2**16)
                assert float(actual[b, slot, axis]) == pytest.approx(quantile, rel=1e-4, abs=1e-12)


def test_shape_and_dtype() -> None:
    actual = counter_noise(1, STEP, 0, torch.tensor([3, 1]), 5, torch.float32)
    assert actual.shape == (2, 5, 3)
    assert actual.dtype == torch.float32


@given(st.permutations([0, 3, 4, 17, 2**20]), st.integers(1, 9))
def test_noise_does_not_depend_on_batch_or_slots(rows: list[int], num_slots: int) -> None:
    actual = noise(rows=tuple(rows), num_slots=num_slots)
    for b, row in enumerate(rows):
        assert torch.equal(actual[b], noise(rows=(row,), num_slots=12)[0, :num_slots])


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"seed": 1 + 2**32}, {"seed": -1}, {"step": 6}, {"rollout_step": 3}, {"rows": (1, 5, 10)}],
    ids=str,
)
def test_every_input_matters(change: dict[str, int]) -> None:
    same = noise() == noise(**change)
    assert same.double().mean() < 0.05  # a table of 2^16 values sometimes repeats a value


def test_slots_and_axes_differ() -> None:
    values = noise(num_slots=50)
    assert (values[:, 1:] == values[:, :-1]).double().mean() < 0.05
    assert (values[..., 1:] == values[..., :-1]).double().mean() < 0.05


def test_moments_of_a_standard_normal() -> None:
    values = noise(rows=tuple(range(100)), num_slots=1000)  # 300,000 numbers, standard error of the mean 0.002
    assert abs(values.mean()) < 0.008
    assert abs(values.var() - 1) < 0.012
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.08
    flat = values.reshape(-1, 3)
    correlation = torch.corrcoef(flat.T)
    assert (correlation - torch.eye(3)).abs().max() < 0.015
    for shift in (values[:, 1:] * values[:, :-1], values[1:] * values[:-1]):
        assert abs(shift.mean()) < 0.01
    inside = (values.abs() < 1).double().mean()
    assert abs(inside - 0.6827) < 0.005
