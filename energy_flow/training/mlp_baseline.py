"""An MLP of one hidden layer, trained as a baseline.

N samples, D embedding dimension, h hidden size
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from energy_flow.settings import Settings
from energy_flow.training.losses import LossSettings, embedding_losses, weighted
from energy_flow.training.task import Task

Pairs = tuple[Tensor, Tensor]  # source [N, D], target [N, D]
Report = Callable[[str], None]

BATCH = 512
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2  # of an MLP that isn't tuned

PositiveRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LargeMlpSettings(Settings):
    """Config section `baselines.large`: an MLP tuned on validation, over all pairs of the two lists."""

    times: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)]
    learning_rates: Annotated[list[PositiveRate], Field(min_length=1)]
    weight_decays: Annotated[list[Decay], Field(min_length=1)]


@dataclass(frozen=True)
class FittedMlp:
    """The network of the best epoch, and how it was found."""

    network: nn.Module
    headline: float  # of the task, on val
    detail: str


@dataclass(frozen=True)
class MlpTraining:
    """Linear(D, h), GELU, Linear(h, D), trained with AdamW; the epoch that is best on validation counts.

    The global random state is neither read nor changed.
    """

    num_parameters: int  # as near as a hidden size can come
    task: Task
    loss: LossSettings
    epochs: int
    seed: int
    name: str
    report: Report
    learning_rate: float = LEARNING_RATE
    weight_decay: float = WEIGHT_DECAY
    decays: bool = False  # the learning rate follows a half cosine down to 0

    def fit(self, train: Pairs, val: Pairs) -> FittedMlp:
        """Train for all epochs and keep the weights of the best one (of equals the first)."""
        source, target = train
        hidden = hidden_size(source.shape[1], self.num_parameters)
        network = self._network(source.shape[1], hidden).to(source.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        total = self.epochs * len(self._batches(len(source), torch.Generator()))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total) if self.decays else None
        order = torch.Generator().manual_seed(self.seed)
        best, best_epoch, best_weights = None, 0, {}
        for epoch in range(1, self.epochs + 1):
            self.report(f"{self.name} epoch {epoch}/{self.epochs}")
            for rows in self._batches(len(source), order):
                self._step(network, optimizer, source[rows.to(source.device)], target[rows.to(source.device)])
                if schedule is not None:
                    schedule.step()
            headline = self._headline(network, val)
            if best is None or self.task.improves(headline, best):
                best, best_epoch = headline, epoch
                best_weights = {key: value.clone() for key, value in network.state_dict().items()}
        assert best is not None
        network.load_state_dict(best_weights)
        size = f"hidden size {hidden}, {sum(p.numel() for p in network.parameters()):,} parameters"
        chosen = f"epoch {best_epoch} of {self.epochs} (val {self.task.named(best)})"
        return FittedMlp(network, best, f"{size}, {chosen}")

    def _headline(self, network: nn.Module, val: Pairs) -> float:
        with torch.no_grad():
            return self.task.measure(network(val[0]), val[1])[self.task.headline]

    def _network(self, dim: int, hidden: int) -> nn.Module:
        # On the CPU: the same weights for every device, and only the CPU's generator to seed and restore.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    @staticmethod
    def _batches(num_samples: int, order: torch.Generator) -> list[Tensor]:
        batch = min(BATCH, num_samples)
        # The rest that doesn't fill a batch is dropped (another one every epoch): it would have fewer negatives.
        shuffled = torch.randperm(num_samples, generator=order)[: num_samples // batch * batch]
        return list(shuffled.split(batch))

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, source: Tensor, target: Tensor) -> None:
        losses = embedding_losses(network(source), target, self.loss.temperature)
        optimizer.zero_grad()
        weighted(losses, self.loss.model_copy(update={"surface": 0.0})).backward()
        optimizer.step()


def fit_tuned(mlp: MlpTraining, settings: LargeMlpSettings, train: Pairs, val: Pairs) -> FittedMlp:
    """The best on validation of `mlp`, made larger, over all pairs of learning rate and weight decay.

    The learning rate decays to 0 over the epochs: the larger network shall be as good as it can be.
    """
    grid = list(itertools.product(settings.learning_rates, settings.weight_decays))
    best: FittedMlp | None = None
    for rate, weight_decay in grid:
        tried = replace(
            mlp,
            num_parameters=settings.times * mlp.num_parameters,
            epochs=settings.epochs,
            name=f"{mlp.name} lr {rate:g} decay {weight_decay:g}",
            learning_rate=rate,
            weight_decay=weight_decay,
            decays=True,
        ).fit(train, val)
        if best is None or mlp.task.improves(tried.headline, best.headline):
            chosen = f"lr {rate:g}, weight decay {weight_decay:g}, the best of {len(grid)} pairs"
            best = replace(tried, detail=f"{tried.detail}, {chosen}")
    assert best is not None
    return best


def hidden_size(dim: int, num_parameters: int) -> int:
    """h for which Linear(D, h), Linear(h, D) come nearest to `num_parameters` = h (2D + 1) + D."""
    return max(1, round((num_parameters - dim) / (2 * dim + 1)))
