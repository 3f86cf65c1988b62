"""Ranks against counts in Python: ties, duplicates, blocks, and changes without effect."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from energy_flow.errors import EnergyFlowError
from energy_flow.metrics import retrieval
from energy_flow.metrics.retrieval import AllTargets, rank_metrics, ranks, retrieval_metrics


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def whole_numbers(num_rows: int, seed: int) -> Tensor:
    """Rows of norm 2, either ±1 four times or ±2 once: directions and products are exact, ties are frequent."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (num_rows, 4), generator=generator) * 2.0 - 1
    single = torch.eye(4)[torch.randint(0, 4, (num_rows,), generator=generator)] * 2
    is_single = torch.rand(num_rows, 1, generator=generator) < 0.5
    return torch.where(is_single, signs * single, signs).double()


def counted(prediction: Tensor, gallery: Tensor, gold: list[int]) -> list[float]:
    """Ranks by counting in integers. For rows of equal norm, cosines compare like dot products."""
    result = []
    for row, own in zip(prediction.tolist(), gold, strict=True):
        scores = [sum(int(a) * int(b) for a, b in zip(row, other, strict=True)) for other in gallery.tolist()]
        better = sum(score > scores[own] for score in scores)
        ties = sum(score == scores[own] for j, score in enumerate(scores) if j != own)
        result.append(1 + better + ties / 2)
    return result


@given(st.integers(1, 12), st.integers(0, 1000), st.data())
def test_ranks_are_counts(num_candidates: int, seed: int, data: st.DataObject) -> None:
    gallery = whole_numbers(num_candidates, seed)
    gold = data.draw(st.lists(st.integers(0, num_candidates - 1), min_size=1, max_size=8))
    prediction = whole_numbers(len(gold), seed + 1)
    assert ranks(prediction, gallery, torch.tensor(gold)).tolist() == counted(prediction, gallery, gold)


def test_ranks_without_ties() -> None:
    prediction, gallery = numbers(40, 7, seed=1), numbers(40, 7, seed=2)
    cosine = torch.nn.functional.cosine_similarity(prediction.unsqueeze(1), gallery, dim=-1)
    order = cosine.argsort(dim=-1, descending=True).tolist()
    assert ranks(prediction, gallery).tolist() == [1.0 + row.index(i) for i, row in enumerate(order)]
    assert len(set(ranks(prediction, gallery).tolist())) > 10


def test_lengths_do_not_matter() -> None:
    prediction, gallery = numbers(20, 5, seed=3), numbers(20, 5, seed=4)
    scaled = ranks(prediction * torch.rand(20, 1) * 100, gallery * (0.01 + torch.rand(20, 1)))
    assert torch.equal(scaled, ranks(prediction, gallery))


@pytest.mark.parametrize("block_bytes", [1, 8 * 15 * 4, 2**20])
def test_results_do_not_depend_on_chunks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, gallery = numbers(15, 5, seed=5), numbers(15, 5, seed=6)
    expected = ranks(prediction, gallery)
    sizes = []
    original = retrieval._block_ranks

    def spy(block: Tensor, candidates: Tensor, gold: Tensor, counts: Tensor) -> Tensor:
        sizes.append(len(block))
        return original(block, candidates, gold, counts)

    monkeypatch.setattr(retrieval, "SCORE_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(retrieval, "_block_ranks", spy)
    assert torch.equal(ranks(prediction, gallery), expected)
    assert sizes == {1: [1] * 15, 8 * 15 * 4: [4, 4, 4, 3], 2**20: [15]}[block_bytes]


def test_duplicates_of_a_target_tie() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    prediction = torch.tensor([[1.0, 0.1]]).expand(4, 2)
    assert ranks(prediction, gallery).tolist() == [2.0, 4.0, 2.0, 2.0]


def test_duplicates_tie_despite_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal columns of a product may differ in the last bit. Here they do differ."""
    gallery = numbers(5, 8, seed=7)[[0, 1, 1, 2, 0, 3, 1, 4]]
    prediction = numbers(8, 8, seed=8)
    expected = ranks(prediction, gallery)
    assert any(rank % 1 for rank in expected.tolist())
    original = retrieval._block_ranks

    def rounded(block: Tensor, candidates: Tensor, gold: Tensor, counts: Tensor) -> Tensor:
        uneven = 1 + 1e-15 * torch.arange(candidates.shape[1], dtype=torch.float64)
        return original(block, candidates * uneven, gold, counts)

    monkeypatch.setattr(retrieval, "_block_ranks", rounded)
    assert torch.equal(ranks(prediction, gallery), expected)


def test_the_gold_score_comes_from_the_same_product() -> None:
    """Candidates differ in the last bit of float32. A gold score from another product would give random ranks."""
    base = torch.nn.functional.normalize(numbers(1, 768, seed=9, dtype=torch.float32), dim=-1)
    gallery = base.repeat(200, 1)
    gallery[torch.arange(200), torch.arange(200)] *= 1 + 1e-6
    prediction = gallery + 1e-3 * numbers(200, 768, seed=10, dtype=torch.float32)
    rank = ranks(prediction, gallery)
    exact = torch.nn.functional.normalize(prediction.double(), dim=-1) @ (
        torch.nn.functional.normalize(gallery.double(), dim=-1).T
    )
    gold = exact.diagonal().unsqueeze(-1)
    assert torch.equal(rank, 1 + (exact > gold).sum(-1) + ((exact == gold).sum(-1) - 1) / 2)
    assert rank.min() >= 1
    assert rank.max() <= 200
    apart = torch.nn.functional.cosine_similarity(prediction, gallery, dim=-1).unsqueeze(-1)
    assert not torch.equal(rank, 1.0 + (exact > apart).sum(-1))  # the other product does differ


def test_autocast_does_not_matter() -> None:
    prediction, gallery = (numbers(50, 64, seed=seed, dtype=torch.float32) for seed in (11, 12))
    expected = retrieval_metrics(prediction, gallery)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(prediction, gallery) == expected


@given(st.integers(2, 30), st.integers(0, 1000))
def test_order_of_samples_does_not_matter(num_samples: int, seed: int) -> None:
    prediction, target = numbers(num_samples, 6, seed=seed), numbers(num_samples, 6, seed=seed + 1)
    shuffled = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ranks(prediction[shuffled], target[shuffled]), ranks(prediction, target)[shuffled])
    expected = retrieval_metrics(prediction, target)
    assert retrieval_metrics(prediction[shuffled], target[shuffled]) == pytest.approx(expected, rel=1e-12)


def test_metrics_are_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "ranks", lambda *_: torch.tensor([1.0, 1.5, 10.0, 10.5, 100.0, 400.0]).double())
    prediction = torch.eye(6)
    target = torch.eye(6)[[0, 1, 2, 3, 4, 0]]
    assert retrieval_metrics(prediction, target) == pytest.approx(
        {
            "mrr": (1 + 2 / 3 + 1 / 10 + 2 / 21 + 1 / 100 + 1 / 400) / 6,
            "recall@1": 1 / 6,
            "recall@10": 3 / 6,
            "recall@100": 5 / 6,
            "median_rank": 10.25,
            "cosine": 5 / 6,
        }
    )


def test_zero_predictions_tie_with_all() -> None:
    metrics = retrieval_metrics(torch.zeros(9, 3), numbers(9, 3, seed=15, dtype=torch.float32))
    assert metrics["cosine"] == 0
    assert metrics["median_rank"] == 5
    assert metrics["mrr"] == pytest.approx(0.2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value: float) -> None:
    good, bad = numbers(8, 3, seed=16), numbers(8, 3, seed=17)
    bad[[2, 5], 1] = value
    with pytest.raises(EnergyFlowError, match=r"2 of 8 predictions are not finite \(rows 2, 5\).*lower the learning"):
        retrieval_metrics(bad, good)
    with pytest.raises(EnergyFlowError, match=r"2 of 8 candidates are not finite"):
        retrieval_metrics(good, bad)
    bad[:] = value
    with pytest.raises(EnergyFlowError, match=r"8 of 8 .*rows 0, 1, 2, 3, 4, \.\.\."):
        ranks(bad, good)


def test_mismatched_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        ranks(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match="give `gold`"):
        ranks(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="gold"):
        ranks(torch.ones(3, 4), torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="N > 0"):
        retrieval_metrics(torch.ones(0, 4), torch.ones(0, 4))


def test_more_candidates_never_raise_a_rank() -> None:
    prediction, target, more = numbers(30, 6, seed=1), numbers(30, 6, seed=2), numbers(70, 6, seed=3)
    near, wide = ranks(prediction, target), AllTargets(torch.cat([more, target]), 70).ranks(prediction)
    assert (wide >= near).all()
    assert torch.equal(wide, ranks(prediction, torch.cat([target, more])))
    assert torch.equal(AllTargets(torch.cat([more, target]), 70).ranks(prediction[:9]), wide[:9])


def test_duplicates_of_the_own_target_in_other_splits_tie() -> None:
    target = numbers(5, 4, seed=4)
    assert AllTargets(torch.cat([target[:2], target]), 2).ranks(target).tolist() == [1.5, 1.5, 1, 1, 1]


def test_ranks_alone_decide_all_but_the_cosine() -> None:
    prediction, target = numbers(30, 6, seed=5), numbers(30, 6, seed=6)
    whole = retrieval_metrics(prediction, target)
    assert rank_metrics(ranks(prediction, target)) == {name: v for name, v in whole.items() if name != "cosine"}
