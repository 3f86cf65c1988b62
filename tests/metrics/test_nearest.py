"""Nearest candidates: compared with a sort in Python, ties in gallery order, blocks of any size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from energy_flow.errors import EnergyFlowError
from energy_flow.metrics import retrieval
from energy_flow.metrics.retrieval import nearest, ranks
from tests.metrics.test_retrieval import numbers, whole_numbers


def sorted_by_hand(prediction: Tensor, gallery: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Scores and indices for rows of norm 2, whose products are exact. Python's sort keeps the order of ties."""
    scores = (prediction @ gallery.T / 4).tolist()
    order = [sorted(range(len(gallery)), key=lambda j: -row[j])[:k] for row in scores]
    return [[row[j] for j in found] for row, found in zip(scores, order, strict=True)], order


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000), st.data())
def test_sorted_by_hand(num_candidates: int, num_rows: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, num_candidates))
    prediction, gallery = whole_numbers(num_rows, seed), whole_numbers(num_candidates, seed + 1)
    scores, rows = nearest(prediction, gallery, k)
    assert (scores.tolist(), rows.tolist()) == sorted_by_hand(prediction, gallery, k)


def test_more_ties_than_room() -> None:
    gallery = whole_numbers(3, seed=0)[[0, 1, 0, 2, 0, 1, 0]]
    scores, rows = nearest(gallery[:1], gallery, 3)
    assert rows.tolist() == [[0, 2, 4]]
    assert scores.tolist() == [[1.0, 1.0, 1.0]]


def test_duplicates_tie() -> None:
    gallery = numbers(40, 7, seed=1)
    doubled = torch.cat([gallery, gallery])
    _, rows = nearest(numbers(9, 7, seed=2), doubled, 80)
    first, second = rows[:, 0::2], rows[:, 1::2]
    assert torch.equal(first + 40, second)


@pytest.mark.parametrize("block_bytes", [1, 8 * 30 * 4, 2**20])
def test_results_do_not_depend_on_blocks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, gallery = numbers(15, 5, seed=5), numbers(30, 5, seed=6)
    expected = nearest(prediction, gallery, 4)
    monkeypatch.setattr(retrieval, "SCORE_BLOCK_BYTES", block_bytes)
    scores, rows = nearest(prediction, gallery, 4)
    assert torch.equal(rows, expected[1])
    torch.testing.assert_close(scores, expected[0])


def test_places_are_ranks() -> None:
    prediction, gallery = numbers(20, 5, seed=3), numbers(30, 5, seed=4)
    _, rows = nearest(prediction, gallery, 30)
    for place in range(30):
        assert ranks(prediction, gallery, rows[:, place]).tolist() == [place + 1] * 20


def test_refused() -> None:
    with pytest.raises(ValueError, match="k = 4: must be between 1 and the 3 candidates"):
        nearest(torch.ones(2, 5), torch.ones(3, 5), 4)
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        nearest(torch.ones(2, 5), torch.ones(3, 6), 1)
    with pytest.raises(EnergyFlowError, match="1 of 2 predictions are not finite"):
        nearest(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]), torch.ones(3, 2), 1)
