"""What simpler methods reach on the same data: a flow lattice has to be seen beside them.

N samples, D embedding dimension, h hidden size of the MLP
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from energy_flow.training.losses import LossSettings, embedding_losses, weighted
from energy_flow.training.retrieval import retrieval_metrics

Pairs = tuple[Tensor, Tensor]  # source [N, D], target [N, D]
Report = Callable[[str], None]
Predict = Callable[[Tensor], Tensor]  # source [N, D] -> prediction [N, D]
Fit = Callable[[dict[str, Pairs]], tuple[Predict, str]]  # splits -> how to predict, what was chosen

NEEDS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "mean": ("train",),
    "ridge": ("train", "val"),
    "procrustes": ("train",),
    "mlp": ("train", "val"),
    "mlp_cosine": ("train", "val"),
}
USED_FOR = {"train": "data.train to be fitted", "val": "data.val to choose {choice} by MRR"}
CHOICE = {"ridge": "λ", "mlp": "the best epoch", "mlp_cosine": "the best epoch"}

# λ of the ridge regression relative to the mean eigenvalue of XᵀX, so that one grid fits any number of samples.
RIDGE_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 7))
GRAM_ROWS = 65536
MLP_BATCH = 512
MLP_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class BaselineResults:
    """Metrics of the baselines that ran, why the others didn't, and what was chosen for those that have a choice."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)


def run_baselines(
    train: Pairs | None,
    val: Pairs | None,
    test: Pairs,
    *,
    num_parameters: int,
    loss: LossSettings,
    epochs: int,
    seed: int,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> BaselineResults:
    """Fit the baselines on `train`, choose on `val` by MRR, measure on `test`.

    - `identity`: the source embedding itself.
    - `mean`: the mean target of `train` for every sample, the floor: all samples see the candidates in the same order,
      so their ranks are 1 to N.
    - `ridge`: the linear map (XᵀX + λ)⁻¹XᵀY, without intercept (it is common to all predictions and says nothing about
      which is which); λ chosen on `val`.
    - `procrustes`: the orthogonal map UVᵀ with UΣVᵀ = XᵀY (Schönemann 1966, Psychometrika 31).
    - `mlp`: Linear(D, h), GELU, Linear(h, D) with as many parameters as the model and the model's loss of embeddings
      (an MLP has no surface); the best epoch chosen on `val`.
    - `mlp_cosine`: the same MLP with the cosine loss.

    The global random state is neither read nor changed; on one device, the same arguments give the same results.

    Args:
        train, val, test: (source [N, D], target [N, D]) float32. Without `train` only the identity can be measured;
            without `val` neither λ nor the best epoch can be chosen. What is left out for that stands in `skipped`.
        num_parameters: how many the model has beside which the baselines stand.
        loss: that model's loss.
        epochs: of the MLPs.
        seed: of the MLPs' initial weights and order of samples.
        device: where to compute.
        report: is told what is being done, e.g. "mlp epoch 3/20".

    Raises:
        ValueError: the shapes of source and target, or of two splits, don't fit; or `epochs` < 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs = {epochs}: must be at least 1")
    given = {"train": train, "val": val, "test": test}
    splits = {name: (pairs[0].to(device), pairs[1].to(device)) for name, pairs in given.items() if pairs is not None}
    _check_shapes(splits)
    report = report or _say_nothing
    mlp = _MlpTraining(_hidden_size(test[0].shape[1], num_parameters), loss, epochs, seed, "mlp", report)
    cosine = loss.model_copy(update={"cosine": 1.0, "mse": 0.0, "contrastive": 0.0})
    fits: dict[str, Fit] = {
        "identity": _fit_identity,
        "mean": _fit_mean,
        "ridge": _fit_ridge,
        "procrustes": _fit_procrustes,
        "mlp": mlp.fit,
        "mlp_cosine": replace(mlp, loss=cosine, name="mlp_cosine").fit,
    }
    results = BaselineResults()
    for name, needs in NEEDS.items():
        missing = [USED_FOR[split].format(choice=CHOICE.get(name)) for split in needs if split not in splits]
        if missing:
            results.skipped[name] = "needs " + " and ".join(missing)
            continue
        report(name)
        _measure(name, fits[name], splits, results)
    return results


def _measure(name: str, fit: Fit, splits: dict[str, Pairs], results: BaselineResults) -> None:
    # The caller may be in Lightning's inference mode, in which an MLP couldn't be trained.
    with torch.inference_mode(False), torch.enable_grad():
        predict, detail = fit(splits)
    source, target = splits["test"]
    with torch.no_grad():
        results.metrics[name] = retrieval_metrics(predict(source), target)
    if detail:
        results.details[name] = detail


def _fit_identity(splits: dict[str, Pairs]) -> tuple[Predict, str]:
    return lambda source: source, ""


def _fit_mean(splits: dict[str, Pairs]) -> tuple[Predict, str]:
    mean = splits["train"][1].double().mean(0)
    return lambda source: mean.expand(len(source), -1), ""


def _fit_ridge(splits: dict[str, Pairs]) -> tuple[Predict, str]:
    source, target = splits["train"]
    # One eigendecomposition XᵀX = Q diag(e) Qᵀ serves every λ: (XᵀX + λ)⁻¹XᵀY = Q diag(1 / (e + λ)) QᵀXᵀY.
    eigenvalues, vectors = torch.linalg.eigh(_gram(source, source))
    projected = vectors.T @ _gram(source, target)
    scale = eigenvalues.mean().clamp(min=torch.finfo(torch.float32).tiny)

    def linear_map(grid_value: float) -> Tensor:
        return vectors @ (projected / (eigenvalues.clamp(min=0) + grid_value * scale).unsqueeze(-1))

    val_source, val_target = splits["val"]
    mrr = [retrieval_metrics(val_source.double() @ linear_map(g), val_target)["mrr"] for g in RIDGE_GRID]
    best = max(range(len(RIDGE_GRID)), key=mrr.__getitem__)
    chosen = linear_map(RIDGE_GRID[best])
    low, high, value = (g * scale.item() for g in (RIDGE_GRID[0], RIDGE_GRID[-1], RIDGE_GRID[best]))
    detail = f"λ = {value:.3g} of {len(RIDGE_GRID)} from {low:.3g} to {high:.3g} (val MRR {mrr[best]:.3f})"
    return lambda x: x.double() @ chosen, detail


def _fit_procrustes(splits: dict[str, Pairs]) -> tuple[Predict, str]:
    u, _, vt = torch.linalg.svd(_gram(*splits["train"]))
    rotation = u @ vt
    return lambda source: source.double() @ rotation, ""


def _gram(x: Tensor, y: Tensor) -> Tensor:
    # In chunks, so that a large data set isn't held in float64 as a whole.
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for rows_x, rows_y in zip(x.split(GRAM_ROWS), y.split(GRAM_ROWS), strict=True):
        total += rows_x.double().T @ rows_y.double()
    return total


def _hidden_size(dim: int, num_parameters: int) -> int:
    """h for which Linear(D, h), Linear(h, D) come nearest to `num_parameters` = h (2D + 1) + D."""
    return max(1, round((num_parameters - dim) / (2 * dim + 1)))


@dataclass(frozen=True)
class _MlpTraining:
    hidden: int
    loss: LossSettings
    epochs: int
    seed: int
    name: str
    report: Report

    def fit(self, splits: dict[str, Pairs]) -> tuple[Predict, str]:
        """Train for all epochs and keep the weights of the one with the best MRR on val (of equals the first)."""
        (source, target), (val_source, val_target) = splits["train"], splits["val"]
        network = self._network(source.shape[1]).to(source.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=MLP_LEARNING_RATE)
        order = torch.Generator().manual_seed(self.seed)
        best_mrr, best_epoch, best_weights = -1.0, 0, {}
        for epoch in range(1, self.epochs + 1):
            self.report(f"{self.name} epoch {epoch}/{self.epochs}")
            for rows in self._batches(len(source), order):
                self._step(network, optimizer, source[rows.to(source.device)], target[rows.to(source.device)])
            with torch.no_grad():
                mrr = retrieval_metrics(network(val_source), val_target)["mrr"]
            if mrr > best_mrr:
                best_mrr, best_epoch = mrr, epoch
                best_weights = {key: value.clone() for key, value in network.state_dict().items()}
        network.load_state_dict(best_weights)
        num_parameters = sum(p.numel() for p in network.parameters())
        return network, (
            f"hidden size {self.hidden}, {num_parameters:,} parameters, "
            f"epoch {best_epoch} of {self.epochs} (val MRR {best_mrr:.3f})"
        )

    def _network(self, dim: int) -> nn.Module:
        # On the CPU: the same weights for every device, and only the CPU's generator to seed and restore.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return nn.Sequential(nn.Linear(dim, self.hidden), nn.GELU(), nn.Linear(self.hidden, dim))

    @staticmethod
    def _batches(num_samples: int, order: torch.Generator) -> list[Tensor]:
        batch = min(MLP_BATCH, num_samples)
        # The rest that doesn't fill a batch is dropped (another one every epoch): it would have fewer negatives.
        shuffled = torch.randperm(num_samples, generator=order)[: num_samples // batch * batch]
        return list(shuffled.split(batch))

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, source: Tensor, target: Tensor) -> None:
        losses = embedding_losses(network(source), target, self.loss.temperature)
        optimizer.zero_grad()
        weighted(losses, self.loss.model_copy(update={"surface": 0.0})).backward()
        optimizer.step()


def _check_shapes(splits: dict[str, Pairs]) -> None:
    dim = splits["test"][0].shape[1:]
    for name, (source, target) in splits.items():
        if source.shape != target.shape or source.shape[1:] != dim or source.dim() != 2 or len(source) < 2:
            raise ValueError(
                f"{name}: source {list(source.shape)} and target {list(target.shape)} must both be [N >= 2, D], "
                f"with the D = {list(dim)} of the test split"
            )


def _say_nothing(_: str) -> None:
    pass
