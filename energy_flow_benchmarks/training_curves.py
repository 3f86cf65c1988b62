"""Training steps by both sides of `benchmark=report`: the same model, data and optimiser."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow_benchmarks import before
from energy_flow_benchmarks.flows import EMBEDDING_DIM, report_lattice
from energy_flow_benchmarks.workload import model_settings

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
    """Return a function that runs one training step (forward, backward, AdamW) and returns the loss.

    The batch has two samples. It and the first parameters depend on `seed` alone.

    Args:
        side: `before` or `now`.
        lattice, energy_dim, hidden_size: sizes of the model.
        device, dtype: of the parameters.
        seed: of data and parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_settings({"energy_dim": energy_dim, "hidden_size": hidden_size})
        processor = FlowProcessor(EMBEDDING_DIM, lattice, model, seed=seed)
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
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return losses [num_steps] and seconds of a tiny training, per side: 2 samples, 4 x 4 cells, 3 steps, float64."""
    lattice = report_lattice(4, 4, depth=6)
    lattice = lattice.model_copy(update={"movement": lattice.movement.model_copy(update={"warmup_steps": 0})})
    curves: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for side in sides:
        step = training_step(side, lattice, 1, 8, device, seed, torch.float64)
        begin = time.perf_counter()
        curves[side] = torch.stack([step() for _ in range(num_steps)]).cpu()
        seconds[side] = time.perf_counter() - begin
    return curves, seconds
