"""The loss curve of a run with known numbers, in which all rules of the lattice act."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn import functional
from torch.utils.data import DataLoader

from energy_flow.config import compose
from energy_flow.training.module import EnergyFlowModule
from tests.helpers import FORWARD_TOLERANCE, SMALLEST_MARGIN, assert_near, reference_of_training
from tests.reference_flows import Margins, ReferenceOutput
from tests.training.test_module import DIM, LIVELY, TINY, LossCurve, make_trainer

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
# So small that no decision of the run comes near its threshold.
GOLDEN_CASE = (
    "lattice.width=4",
    "lattice.height=3",
    "lattice.spawn.threshold=0.15",
    "data.batch_size=4",
    "loss=combined",
    "optimizer.lr=1.0e-2",
)


def float64_module() -> EnergyFlowModule:
    """A module with float64 initial weights. In float32, orthogonal initialisation differs between LAPACK versions."""
    config = compose(*TINY, *LIVELY, *GOLDEN_CASE)
    torch.set_default_dtype(torch.float64)
    try:
        seed_everything(20, verbose=False)
        return EnergyFlowModule.from_config(config, DIM)
    finally:
        torch.set_default_dtype(torch.float32)


def float64_loader(num_rows: int, batch_size: int) -> DataLoader:
    """Random directions and a rotation in float64. In float32, processors would differ by 1e-7."""
    generator = torch.Generator().manual_seed(0)
    source = functional.normalize(torch.randn(num_rows, DIM, generator=generator, dtype=torch.float64), dim=-1)
    rows = [{"source": row, "target": -row.flip(-1), "row": torch.tensor(i)} for i, row in enumerate(source)]
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


class Decisions(Callback):
    """Run the slow reference on every training batch. It counts events and measures distances to thresholds."""

    expected: ReferenceOutput

    def __init__(self) -> None:
        self.margins = Margins()
        self.events: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.expected = reference_of_training(pl_module.processor, batch["source"], batch["row"])
        self.margins.note(self.expected.margins.name, self.expected.margins.smallest)
        self.events.update(self.expected.events)
        self.events["overflow"] += self.expected.overflow

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        actual = pl_module.processor.last_output.embedding
        assert_near(actual, self.expected.embedding, FORWARD_TOLERANCE, f"embeddings of batch {batch_idx}")


def test_the_loss_curve_is_the_golden_one() -> None:
    curve, decisions = LossCurve(), Decisions()
    trainer = make_trainer(curve, decisions, max_epochs=5, precision="64-true", gradient_clip_val=1.0)
    trainer.fit(float64_module(), float64_loader(20, batch_size=4))
    for event in ("spawned", "parents_of_several", "spawn_limited", "overflow", "reflected", "reached_z0", "projected"):
        assert decisions.events[event] > 0, f"{event} did not happen"
    margins = decisions.margins
    assert margins.smallest > SMALLEST_MARGIN, f"{margins.name} came within {margins.smallest:.2g} of its threshold"
    assert curve.losses[-1] < 0.8 * curve.losses[0]
    # Only rounding differs: kernels of torch and MKL without AVX, with AVX2 and with AVX-512 differ by up to 2.4e-15.
    # The bound leaves room for other libraries; an early difference of 1e-10 would be a change of the computation.
    assert curve.losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-10)
