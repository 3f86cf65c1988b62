"""End a run after several bad steps in a row, and save everything that is needed to find the cause."""

from pathlib import Path
from typing import Annotated, Any

from lightning.pytorch import Callback, Trainer
from pydantic import Field

from energy_flow.core.faults import REMEDY
from energy_flow.errors import NotFiniteError
from energy_flow.settings import Remedy, checked_arguments
from energy_flow.training.callbacks.scalars import log_scalars
from energy_flow.training.step_guard import StepGuard


class StopOnBadSteps(Callback):
    """End training after `max_bad_steps` skipped steps in a row.

    It saves the state before the first of them as `checkpoints/before_fault.ckpt`, and the batch of the first of them
    as `bad_batch.safetensors`. With several processes, each saves its own batch with its rank in the file name.

    Args:
        dirpath: the folder of both files.
        max_bad_steps: at least 1.

    Raises:
        ConfigError: a value is out of range; names its key.
    """

    @checked_arguments("callbacks.bad_steps")
    def __init__(
        self,
        dirpath: str | Path,
        max_bad_steps: Annotated[int, Field(ge=1), Remedy("null instead of the section removes the callback")],
    ) -> None:
        self.dirpath = Path(dirpath)
        self.max_bad_steps = max_bad_steps
        self._guard: StepGuard | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._guard = pl_module.guard
            self._guard.limit = self.max_bad_steps

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.guard.limit = None  # nobody else would end the run at the limit

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stop_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop_if_due(trainer)

    def state_dict(self) -> dict[str, Any]:
        if self._guard is None:
            return {}
        self._guard.read()
        return {"skipped": self._guard.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._guard is not None:  # a spawned process that tests has none, and counts no steps
            self._guard.skipped = state_dict["skipped"]

    def _stop_if_due(self, trainer: Trainer) -> None:
        guard = self._guard
        if guard is None or guard.first is None or guard.in_row < self.max_bad_steps:
            return
        log_scalars(trainer, {"train/skipped": float(guard.skipped)}, trainer.global_step)
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        bad, batch = guard.first, self.dirpath / f"bad_batch{rank}.safetensors"
        bad.save(batch)
        checkpoint = self.dirpath / "checkpoints" / "before_fault.ckpt"
        trainer.save_checkpoint(checkpoint, weights_only=False)
        raise NotFiniteError(
            f"{self.max_bad_steps} steps in a row were skipped (callbacks.bad_steps.max_bad_steps). The first was step "
            f"{bad.step}: {bad.reason} ({bad.where}).\n"
            f"weights and optimiser from before it: {checkpoint}\n"
            f"its batch: {batch}\n"
            f"{REMEDY}. The same command with debug=anomaly names the operation"
        )
