"""Trained baselines: a linear map and MLPs with one hidden layer, with the model's own loss.

N samples, D embedding dimension, h hidden size
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from energy_flow.metrics.task import Task
from energy_flow.settings import Settings
from energy_flow.training.losses import Candidates, LossSettings, Temperature, directions, embedding_losses, weighted

Pairs = tuple[Tensor, Tensor]  # source [N, D], target [N, D]
Report = Callable[[str], None]
Build = Callable[[int], nn.Module]  # D -> network [B, D] -> [B, D]

BATCH = 512

PositiveRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TrainingSettings(Settings):
    """Training of a baseline: every pair of learning rate and weight decay is tried, the best on validation is kept."""

    epochs: Annotated[int, Field(ge=1)]
    learning_rates: Annotated[list[PositiveRate], Field(min_length=1)]
    weight_decays: Annotated[list[Decay], Field(min_length=1)]


@dataclass(frozen=True)
class Fitted:
    """The network of the best epoch, with its hyperparameters in words."""

    network: nn.Module
    primary: float  # the primary metric on val
    detail: str


@dataclass(frozen=True)
class TrainedBaseline:
    """A network to train with AdamW and a cosine schedule down to 0; the epoch that is best on validation is kept.

    Training neither reads nor changes the global random state.
    """

    name: str
    build: Build
    task: Task
    loss: LossSettings
    settings: TrainingSettings
    seed: int
    report: Report

    def fit(self, train: Pairs, val: Pairs) -> Fitted:
        """Train with every pair of learning rate and weight decay; return the (first) best on validation."""
        grid = list(itertools.product(self.settings.learning_rates, self.settings.weight_decays))
        best: Fitted | None = None
        for rate, decay in grid:
            found = self._fit(train, val, rate, decay, f" lr {rate:g} decay {decay:g}" if len(grid) > 1 else "")
            best = found if best is None or self.task.improves(found.primary, best.primary) else best
        assert best is not None
        return best

    def _fit(self, train: Pairs, val: Pairs, rate: float, decay: float, note: str) -> Fitted:
        num_samples, device = len(train[0]), train[0].device
        network, temperature, loss = self._learner(train)
        optimizer = torch.optim.AdamW(_groups([*network.parameters(), *temperature.parameters()], decay), lr=rate)
        epochs, order = self.settings.epochs, torch.Generator().manual_seed(self.seed)
        total = epochs * len(_batches(num_samples, torch.Generator()))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        best, best_epoch, best_weights = None, 0, {}
        for epoch in range(1, epochs + 1):
            self.report(f"{self.name}{note} epoch {epoch}/{epochs}")
            for rows in _batches(num_samples, order):
                optimizer.zero_grad()
                loss(rows.to(device)).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                primary = self.task.measure(network(val[0]), val[1])[self.task.primary]
            if best is None or self.task.improves(primary, best):
                best, best_epoch = primary, epoch
                best_weights = {key: value.clone() for key, value in network.state_dict().items()}
        assert best is not None
        network.load_state_dict(best_weights)
        count = sum(p.numel() for p in network.parameters())
        chosen = f"epoch {best_epoch} of {epochs}, lr {rate:g}, weight decay {decay:g}"
        return Fitted(network, best, f"{count:,} parameters, {chosen} (val {self.task.named(best)})")

    def _learner(self, train: Pairs) -> tuple[nn.Module, Temperature, Callable[[Tensor], Tensor]]:
        """The network, the temperature and the loss of rows, without terms that need a flow lattice's output."""
        source, target = train
        # On the CPU: every device gets the same weights, and only the CPU generator is seeded and restored.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            network = self.build(source.shape[1]).to(source.device)
        settings = self.loss.model_copy(update={"surface": 0.0, "terms": None})
        temperature = Temperature(settings).to(source.device)
        bank = directions(target) if settings.candidates == "bank" and settings.contrastive > 0 else None

        def loss(rows: Tensor) -> Tensor:
            candidates = None if bank is None else Candidates(bank, rows)
            return weighted(embedding_losses(network(source[rows]), target[rows], temperature(), candidates), settings)

        return network, temperature, loss


def _groups(parameters: Sequence[nn.Parameter], decay: float) -> list[dict[str, object]]:
    """Parameter groups for AdamW; as in the model's training, biases and the temperature don't decay."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Residual(nn.Module):
    """x + network(x); the last layer of the network is initialised to 0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, source: Tensor) -> Tensor:
        return source + self.network(source)


def linear(dim: int) -> nn.Module:
    """A linear map initialised as the identity; weight decay pulls towards the identity."""
    return Residual(nn.Linear(dim, dim))


def mlp(num_parameters: int) -> Build:
    """Linear(D, h), GELU, Linear(h, D), with h from `hidden_size`."""

    def build(dim: int) -> nn.Module:
        hidden = hidden_size(dim, num_parameters)
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    return build


def residual_mlp(num_parameters: int) -> Build:
    """The same MLP plus a skip connection."""
    return lambda dim: Residual(mlp(num_parameters)(dim))


def hidden_size(dim: int, num_parameters: int) -> int:
    """The h >= 1 whose number of parameters h (2D + 1) + D is nearest to `num_parameters`."""
    return max(1, round((num_parameters - dim) / (2 * dim + 1)))


def _batches(num_samples: int, order: torch.Generator) -> list[Tensor]:
    batch = min(BATCH, num_samples)
    # An incomplete batch is dropped: it would have fewer negatives. Each epoch drops other samples.
    shuffled = torch.randperm(num_samples, generator=order)[: num_samples // batch * batch]
    return list(shuffled.split(batch))
