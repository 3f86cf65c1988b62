"""Save the best checkpoint of a run, and keep it when the run resumes in another folder."""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from energy_flow.checkpoints.io import AtomicCheckpointIO
from energy_flow.checkpoints.lightning_loops import last_saved_path

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with two corrections.

    - Lightning forgets the best score when a run resumes in a new folder, so the next epoch would always be the best.
      This class copies the best checkpoint to the new folder. It looks for it next to the checkpoint that the run
      resumes from, because a path in a file from somebody else can't be trusted.
    - If a new best checkpoint could not be written, the old score stays. Otherwise the old file would pass as the best.
    """

    _folder = Path()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._folder = Path(trainer.ckpt_path or "").parent  # Lightning calls `load_state_dict` after this

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before = copy.deepcopy(self.state_dict())
        super()._update_best_and_save(current, trainer, monitor_candidates)
        if self._is_lost(trainer):
            self.load_state_dict(before)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not self._is_lost(trainer):  # keep the file that it should have replaced
            super()._remove_checkpoint(trainer, filepath)

    def _is_lost(self, trainer: Trainer) -> bool:
        """Whether the last checkpoint could not be written."""
        written_by = trainer.strategy.checkpoint_io
        lost = isinstance(written_by, AtomicCheckpointIO) and last_saved_path(self) in written_by.failed
        decided: bool = trainer.strategy.broadcast(lost)
        return decided

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.current_score = state_dict["current_score"]  # Lightning doesn't restore it
        best = self._folder / Path(state_dict["best_model_path"]).name
        if self.dirpath is None or state_dict["dirpath"] == self.dirpath or not state_dict["best_model_path"]:
            super().load_state_dict(state_dict)
            return
        if not best.is_file():
            log.warning(
                "%s, the best checkpoint so far, is missing: the next validation counts as the best so far", best
            )
            return
        copy = Path(self.dirpath) / best.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.resolve() != best.resolve():  # the same file if the best checkpoint of this folder is tested
            shutil.copyfile(best, copy)
        score = state_dict["best_model_score"]
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": str(copy),
                "best_k_models": {str(copy): score},
                "kth_best_model_path": str(copy),
                "last_model_path": "",
            }
        )
