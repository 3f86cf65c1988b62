"""Training steps of both sides of `benchmark=report`: the same model, data and optimiser."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow_benchmarks import before
from energy_flow_benchmarks.flows import EMBEDDING_DIM, lattice_settings, model_settings

BATCH = 2
LEARNING_RATE = 1e-3


def training_step(
    side: str,
    lattice: LatticeSettings,
    energy_dim: int,
    hidden_size: int,
    device: torch.device,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], Tensor]:
    """A function that makes one training step (forward, backward, AdamW) and returns its loss before the step.

    Two samples with targets of their own; which numbers they and the parameters start with depends on `seed` alone.

    Args:
        side: `before` or `now`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor = FlowProcessor(EMBEDDING_DIM, lattice, model_settings(energy_dim, hidden_size), seed=seed)
        source, target = (functional.normalize(torch.randn(BATCH, EMBEDDING_DIM), dim=-1) for _ in range(2))
    processor = processor.to(device=device, dtype=dtype)
    source, target = source.to(device, dtype), target.to(device, dtype)
    optimizer = torch.optim.AdamW(processor.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad()
        output = before.forward(processor, source) if side == "before" else processor(source).embedding
        loss = functional.mse_loss(output, target) + (1 - functional.cosine_similarity(output, target)).mean()
        loss.backward()
        optimizer.step()
        processor.optimizer_step.add_(1)
        return loss.detach()

    return step


def loss_curves(
    sides: Iterable[str], num_steps: int, device: torch.device, seed: int
) -> tuple[dict[str, Tensor], dict[str, float | None]]:
    """Losses [num_steps] of a tiny training (2 samples, 4 x 4 cells, 3 steps, float64), and its seconds, per side."""
    lattice = lattice_settings(4, 4, depth=6)
    lattice = lattice.model_copy(update={"movement": lattice.movement.model_copy(update={"warmup_steps": 0})})
    curves: dict[str, Tensor] = {}
    seconds: dict[str, float | None] = {}
    for side in sides:
        step = training_step(side, lattice, 1, 8, device, seed, torch.float64)
        begin = time.perf_counter()
        curves[side] = torch.stack([step() for _ in range(num_steps)]).cpu()
        seconds[side] = time.perf_counter() - begin
    return curves, seconds
