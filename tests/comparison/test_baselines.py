"""Baselines recover known maps, accept tiny and missing data, and keep the global random state."""

from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.comparison import trained_baselines
from energy_flow.comparison.baselines import BaselineResults, BaselineSettings, run_baselines
from energy_flow.comparison.trained_baselines import Pairs, TrainedBaseline, linear, mlp, residual_mlp
from energy_flow.metrics.retrieval import AllTargets, rank_metrics, ranks, retrieval_metrics
from energy_flow.metrics.task import REGRESSION, RETRIEVAL
from energy_flow.settings import read
from energy_flow.training.losses import LossSettings

LOSS = LossSettings(
    cosine=0.0, mse=0.0, surface=0.0, contrastive=1.0, candidates="batch", temperature=0.05, learn_temperature=False
)
MSE = LOSS.model_copy(update={"contrastive": 0.0, "mse": 1.0})


TRAINED = ("linear", "mlp", "residual_mlp", "mlp_cosine")


def epochs(number: int, large: int = 3, **grid: Any) -> BaselineSettings:
    """Settings with `number` epochs for all trained baselines."""
    training = {"epochs": number, "learning_rates": [1e-2], "weight_decays": [0.0], **grid}
    return read(BaselineSettings, {"enabled": True, "training": training, "large": large}, "baselines")


SETTINGS: dict[str, Any] = {
    "task": RETRIEVAL,
    "settings": epochs(2),
    "num_parameters": 500,
    "loss": LOSS,
    "seed": 3,
}
ERRORS = {**SETTINGS, "task": REGRESSION, "loss": MSE}


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mapped(matrix: Tensor, num_samples: int, seed: int, noise: float = 0.0) -> Pairs:
    source = numbers(num_samples, len(matrix), seed=seed)
    target = source @ matrix
    return source, target + noise * numbers(*target.shape, seed=seed + 100)


def three_splits(matrix: Tensor, noise: float = 0.0) -> tuple[Pairs, Pairs, Pairs]:
    return mapped(matrix, 300, 1, noise), mapped(matrix, 40, 2, noise), mapped(matrix, 50, 4, noise)


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(numbers(dim, dim, seed=5)).Q


def test_procrustes_recovers_a_rotation() -> None:
    results = run_baselines(*three_splits(rotation(8)), **SETTINGS)
    assert results.metrics["procrustes"]["mrr"] == 1
    assert results.metrics["procrustes"]["cosine"] == pytest.approx(1, abs=1e-6)  # float32 data
    assert results.metrics["identity"]["cosine"] < 0.5


def test_ridge_recovers_a_linear_map() -> None:
    # The map stretches strongly, so no rotation is near it.
    matrix = numbers(8, 8, seed=6) * torch.logspace(-1, 1, 8)
    results = run_baselines(*three_splits(matrix, noise=1e-3), **SETTINGS)
    assert results.metrics["ridge"]["mrr"] == 1
    assert results.metrics["ridge"]["cosine"] > 0.99999
    assert results.metrics["procrustes"]["cosine"] < 0.99


def test_ridge_is_the_closed_form_of_the_best_penalty() -> None:
    """With few noisy samples the penalty matters: ridge selects the best one on val."""
    splits = mapped(rotation(12), 15, 7, 1.0), mapped(rotation(12), 60, 8, 1.0), mapped(rotation(12), 60, 9, 1.0)
    results = run_baselines(*splits, **SETTINGS)
    (x, y), (val_x, val_y), (test_x, test_y) = (tuple(t.double() for t in pairs) for pairs in splits)
    scale = x.square().sum() / 12  # the mean eigenvalue of XᵀX is its trace / D

    def solved(penalty: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(12, dtype=torch.float64), x.T @ y)

    found = {}
    for exponent in range(-10, 7):
        weights = solved(scale * 10 ** (exponent / 2))
        found[exponent] = retrieval_metrics(val_x @ weights, val_y)["mrr"]
    best = max(found, key=lambda exponent: found[exponent])
    assert -10 < best < 6
    assert results.metrics["ridge"] == pytest.approx(
        retrieval_metrics(test_x @ solved(scale * 10 ** (best / 2)), test_y), rel=1e-9
    )
    assert results.details["ridge"].startswith(f"λ = {scale * 10 ** (best / 2):.3g} of 17 ")


def test_identity_and_mean() -> None:
    train, val, test = three_splits(rotation(8))
    results = run_baselines(train, val, test, **SETTINGS)
    assert results.metrics["identity"] == retrieval_metrics(*test)
    mean = results.metrics["mean"]
    # Every sample sees the same order of the 50 candidates: ranks 1 to 50.
    assert mean["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 51)) / 50)
    assert mean["recall@10"] == pytest.approx(10 / 50)
    assert mean["median_rank"] == 25.5
    expected = torch.nn.functional.cosine_similarity(train[1].mean(0, keepdim=True), test[1]).mean()
    assert mean["cosine"] == pytest.approx(expected.item(), abs=1e-6)


def test_mean_of_zero_ties_with_all() -> None:
    train = numbers(4, 3, seed=10)
    results = run_baselines((train, torch.cat([train[:2], -train[:2]])), None, mapped(rotation(3), 7, 11), **SETTINGS)
    assert results.metrics["mean"]["median_rank"] == 4
    assert results.metrics["mean"]["mrr"] == pytest.approx(1 / 4)
    assert results.metrics["mean"]["cosine"] == 0


def test_the_mlp_learns_with_the_loss_of_the_model() -> None:
    splits = three_splits(rotation(8))
    results = run_baselines(*splits, **{**SETTINGS, "num_parameters": 2000, "settings": epochs(60)})
    assert results.metrics["mlp"]["mrr"] > 0.5  # untrained: 0.09, as by chance
    assert results.metrics["mlp_cosine"]["cosine"] > 0.8
    assert results.metrics["mlp_cosine"]["cosine"] > results.metrics["mlp"]["cosine"]
    weight = LOSS.model_copy(update={"contrastive": 0.0, "cosine": 1.0, "surface": 5.0})
    same = run_baselines(*splits, **{**SETTINGS, "num_parameters": 2000, "settings": epochs(240), "loss": weight})
    assert same.metrics["mlp"] == results.metrics["mlp_cosine"]  # a baseline has no surface, so only the cosine counts


def test_mlp_keeps_the_best_epoch() -> None:
    """With random targets the best epoch is not the last one. The reported metric belongs to the kept weights."""
    splits = [(numbers(n, 6, seed=n), numbers(n, 6, seed=n + 1)) for n in (40, 30)]
    results = run_baselines(*splits, splits[1], **{**SETTINGS, "settings": epochs(12)})  # measured on val itself
    for name in ("linear", "mlp", "residual_mlp"):
        assert f"(val MRR {results.metrics[name]['mrr']:.3f})" in results.details[name]
    assert "epoch 12 of 12" not in results.details["mlp"]


def test_the_linear_map_and_the_skip_start_as_the_identity() -> None:
    source = numbers(5, 8, seed=1)
    assert torch.equal(linear(8)(source), source)
    assert torch.equal(residual_mlp(300)(8)(source), source)
    assert not torch.allclose(mlp(300)(8)(source), source)


def test_the_linear_map_learns_a_rotation() -> None:
    results = run_baselines(*three_splits(rotation(8)), **{**SETTINGS, "settings": epochs(40, learning_rates=[0.05])})
    assert results.metrics["linear"]["mrr"] > 0.9
    assert results.metrics["identity"]["mrr"] < 0.3


@pytest.mark.parametrize(("dim", "num_parameters", "hidden"), [(8, 500, 29), (8, 1, 1), (3, 100, 14), (8, 1708, 100)])
def test_mlp_has_as_many_parameters(dim: int, num_parameters: int, hidden: int) -> None:
    splits = three_splits(rotation(dim))
    results = run_baselines(*splits, **{**SETTINGS, "num_parameters": num_parameters, "settings": epochs(1)})
    count = hidden * dim + hidden + dim * hidden + dim
    assert results.details["mlp"].startswith(f"{count:,} parameters")
    assert results.details["residual_mlp"].startswith(f"{count:,} parameters")
    assert results.details["linear"].startswith(f"{dim * dim + dim} parameters")
    assert abs(count - num_parameters) <= (2 * dim + 1) / 2 or hidden == 1


def test_the_random_state_is_left_alone() -> None:
    splits = three_splits(rotation(5))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = run_baselines(*splits, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    second = run_baselines(*splits, **SETTINGS)
    assert second == first
    other = run_baselines(*splits, **{**SETTINGS, "seed": 4})
    assert other.metrics["mlp"] != first.metrics["mlp"]
    assert other.metrics["ridge"] == first.metrics["ridge"]


def test_baselines_train_in_inference_mode() -> None:
    """Lightning tests in inference mode, where autograd can't save tensors for backward."""
    expected = run_baselines(*three_splits(rotation(5)), **SETTINGS)
    with torch.inference_mode():
        assert run_baselines(*three_splits(rotation(5)), **SETTINGS) == expected


def test_without_train() -> None:
    _, val, test = three_splits(rotation(5))
    results = run_baselines(None, val, test, **SETTINGS)
    assert list(results.metrics) == ["identity"]
    assert results.skipped == dict.fromkeys(RETRIEVAL.baselines[1:], "needs data.train to fit")


def test_without_val() -> None:
    train, _, test = three_splits(rotation(5))
    results = run_baselines(train, None, test, **SETTINGS)
    assert list(results.metrics) == ["identity", "mean", "procrustes"]
    assert results.skipped == {
        "ridge": "needs data.val to select λ by MRR",
        **dict.fromkeys(TRAINED, "needs data.val to select the best epoch by MRR"),
    }


def test_without_train_and_val() -> None:
    results = run_baselines(None, None, three_splits(rotation(5))[2], **SETTINGS)
    assert results.skipped["ridge"] == "needs data.train to fit and data.val to select λ by MRR"


@pytest.mark.parametrize("dim", [1, 3])
def test_tiny_data(dim: int) -> None:
    pairs = (numbers(2, dim, seed=13), numbers(2, dim, seed=14))
    results = run_baselines(pairs, pairs, pairs, **SETTINGS)
    check_complete(results)


def test_constant_data() -> None:
    zero = torch.zeros(4, 3)
    check_complete(run_baselines((zero, zero), (zero, zero), (zero, zero), **SETTINGS))


def check_complete(results: BaselineResults) -> None:
    assert list(results.metrics) == ["identity", "mean", "ridge", "procrustes", *TRAINED]
    keys = {"mrr", "recall@1", "recall@10", "recall@100", "median_rank", "cosine"}
    assert all(metrics.keys() == keys for metrics in results.metrics.values())
    assert results.details.keys() == {"ridge", *TRAINED}
    assert results.skipped == {}


def test_report() -> None:
    reported: list[str] = []
    run_baselines(*three_splits(rotation(5)), **SETTINGS, report=reported.append)
    assert reported[:4] == ["identity", "mean", "ridge", "procrustes"]
    assert reported[4:8] == ["linear", "linear epoch 1/2", "linear epoch 2/2", "mlp"]


def test_mismatched_shapes() -> None:
    train, val, test = three_splits(rotation(5))
    with pytest.raises(ValueError, match=r"val: source \[40, 5\] and target \[39, 5\]"):
        run_baselines(train, (val[0], val[1][:-1]), test, **SETTINGS)
    with pytest.raises(ValueError, match=r"train: .*test split"):
        run_baselines(three_splits(rotation(4))[0], val, test, **SETTINGS)


def curve(loss: LossSettings, splits: tuple[Pairs, ...], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every training step of the linear map."""
    losses: list[float] = []
    backward = Tensor.backward
    monkeypatch.setattr(Tensor, "backward", lambda self: (losses.append(self.item()), backward(self))[0])
    baseline = TrainedBaseline("linear", linear, RETRIEVAL, loss, epochs(30).training, 1, lambda _: None)
    baseline.fit(splits[0], splits[1])
    monkeypatch.undo()
    return losses


def test_the_linear_map_has_the_loss_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate bank holds all training targets, also for small batches; the temperature can be learned."""
    monkeypatch.setattr(trained_baselines, "BATCH", 50)
    splits = three_splits(rotation(8))
    batch = curve(LOSS, splits, monkeypatch)
    monkeypatch.setattr(trained_baselines, "BATCH", 50)
    bank = curve(LOSS.model_copy(update={"candidates": "bank"}), splits, monkeypatch)
    (source, target), rows = splits[0], torch.randperm(300, generator=torch.Generator().manual_seed(1))[:50]
    functional = torch.nn.functional
    logits = functional.normalize(source[rows]) @ functional.normalize(target).T / 0.05
    assert len(batch) == len(bank) == 180
    # The map is initialised as the identity.
    assert bank[0] == pytest.approx(functional.cross_entropy(logits, rows).item(), rel=1e-5)
    assert batch[0] < bank[0] - 0.5
    monkeypatch.setattr(trained_baselines, "BATCH", 50)
    learned = curve(LOSS.model_copy(update={"learn_temperature": True}), splits, monkeypatch)
    # A learned temperature is exp(log(0.05)): float32 rounds log(0.05) by up to 1.2e-7, and each processor rounds exp.
    assert learned[0] == pytest.approx(batch[0], rel=1e-6)
    assert learned[-1] != batch[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    splits = three_splits(rotation(8))
    state = torch.cuda.get_rng_state()
    results = run_baselines(*splits, **SETTINGS, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    expected = run_baselines(*splits, **SETTINGS)
    for name in ("identity", "mean", "ridge", "procrustes"):
        assert results.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-6), name
    check_complete(results)


def test_ranks_among_all_targets() -> None:
    train, val, test = three_splits(rotation(6), noise=0.5)
    targets = torch.cat([train[1], val[1], test[1]])
    found = run_baselines(train, val, test, **SETTINGS, all_targets=AllTargets(targets, 340))
    assert list(found.all_row_scores) == list(found.row_scores) == list(RETRIEVAL.baselines)
    assert torch.equal(found.all_row_scores["identity"], ranks(test[0], targets, torch.arange(340, 390)))
    for name, rank in found.all_row_scores.items():
        assert rank_metrics(rank)["mrr"] < found.metrics[name]["mrr"], name
    assert run_baselines(None, None, test, **SETTINGS).all_row_scores == {}
