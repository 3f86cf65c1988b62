"""Metrics of an evaluation epoch, without Lightning."""

import pytest
import torch
from torch import Tensor

from energy_flow.config import compose
from energy_flow.errors import EnergyFlowError
from energy_flow.metrics.retrieval import ranks, retrieval_metrics
from energy_flow.settings import read
from energy_flow.training import epoch_scores
from energy_flow.training.epoch_scores import EpochScores, split_losses
from energy_flow.training.losses import LossSettings, embedding_losses, surface_loss

N, DIM, CELLS = 23, 6, 5
TEMPERATURE = 0.2


@pytest.fixture
def split() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"prediction": (DIM,), "target": (DIM,), "surface": (CELLS, 2), "target_surface": (CELLS, 2)}
    return {name: torch.randn(N, *shape, generator=generator) for name, shape in shapes.items()}


def make_scores(split: dict[str, Tensor], batches: list[list[int]], with_rows: bool = True) -> EpochScores:
    scores = EpochScores(read(LossSettings, compose("loss=combined")["loss"], "loss"), TEMPERATURE)
    for rows in batches:
        values = {name: value[rows] for name, value in split.items()}
        scores.add(**values, rows=torch.tensor(rows) if with_rows else None)
    scores.gather(lambda value: value)
    return scores


def test_metrics_are_those_of_the_whole_split(split: dict[str, Tensor]) -> None:
    found = make_scores(split, [list(range(10)), list(range(10, N))]).metrics()
    losses = embedding_losses(split["prediction"], split["target"], TEMPERATURE)
    surface = surface_loss(split["surface"], split["target_surface"])
    expected = retrieval_metrics(split["prediction"], split["target"])
    expected |= {"cosine_loss": losses["cosine"].item(), "mse": losses["mse"].item()}
    expected |= {"contrastive": losses["contrastive"].item(), "surface": surface.item()}
    weights = read(LossSettings, compose("loss=combined")["loss"], "loss").weights()
    expected["loss"] = sum(
        weight * expected["cosine_loss" if name == "cosine" else name] for name, weight in weights.items()
    )
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-5)


def test_rows_are_sorted_and_count_once(split: dict[str, Tensor]) -> None:
    """Rows have the order and the padding of a distributed sampler."""
    scores = make_scores(split, [[*range(0, N, 2), 0], [*range(1, N, 2), 1]])
    assert torch.equal(scores.prediction, split["prediction"])
    assert torch.equal(scores.target, split["target"])
    in_order = make_scores(split, [list(range(N))])
    assert scores.metrics() == in_order.metrics()
    assert torch.equal(scores.row_scores("rank"), ranks(split["prediction"], split["target"]))


def test_without_rows_batches_keep_their_order(split: dict[str, Tensor]) -> None:
    scores = make_scores(split, [[3, 1], [1]], with_rows=False)
    assert torch.equal(scores.prediction, split["prediction"][[3, 1, 1]])


def test_values_of_other_processes_are_joined(split: dict[str, Tensor]) -> None:
    """This process has the even rows, and `gather` adds the odd rows of the other process."""
    scores = EpochScores(read(LossSettings, compose("loss=combined")["loss"], "loss"), TEMPERATURE)
    scores.add(**{name: value[::2] for name, value in split.items()}, rows=torch.arange(0, N, 2))
    error = (split["surface"] - split["target_surface"]).square().mean((1, 2))
    others = iter((split["prediction"][1::2], split["target"][1::2], error[1::2], torch.arange(1, N, 2)))
    scores.gather(lambda value: torch.cat([value, next(others)]))
    expected = make_scores(split, [list(range(N))])
    assert scores.metrics() == expected.metrics()


def test_row_scores(split: dict[str, Tensor]) -> None:
    scores = make_scores(split, [list(range(N))])
    errors = scores.row_scores("mse")
    assert errors.dtype == torch.float64
    assert errors.mean().item() == pytest.approx(scores.metrics()["mse"], rel=1e-6)
    with pytest.raises(ValueError, match="measure = 'mrr': must be rank or mse"):
        scores.row_scores("mrr")


def test_predictions_that_are_not_finite_are_refused(split: dict[str, Tensor]) -> None:
    split["prediction"][3, 2] = torch.nan
    with pytest.raises(EnergyFlowError, match=rf"1 of {N} predictions are not finite \(rows 3\)"):
        make_scores(split, [list(range(N))]).metrics()


def test_chunks_give_the_losses_of_the_whole(split: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embedding_losses(split["prediction"], split["target"], TEMPERATURE)
    monkeypatch.setattr(epoch_scores, "_CHUNK", 7)
    chunked = split_losses(split["prediction"], split["target"], TEMPERATURE)
    for name, loss in whole.items():
        assert chunked[name].item() == pytest.approx(loss.item(), rel=1e-6), name
