"""The best checkpoint of a run, also of one that goes on in another folder."""

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
    """Lightning's ModelCheckpoint, which forgets the best score so far when a run goes on in a new folder.

    Then the next epoch would count as the best, whatever it reached. Here the best checkpoint moves along. It is looked
    for beside the checkpoint that the run goes on from: a path in a file may be a stranger's. One that couldn't be
    written doesn't count as the best: the file that is there would be taken for it.
    """

    _folder = Path()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._folder = Path(trainer.ckpt_path or "").parent  # Lightning hands over the state after this

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before = copy.deepcopy(self.state_dict())
        super()._update_best_and_save(current, trainer, monitor_candidates)
        if self._is_lost(trainer):
            self.load_state_dict(before)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not self._is_lost(trainer):  # what it should have replaced stays
            super()._remove_checkpoint(trainer, filepath)

    def _is_lost(self, trainer: Trainer) -> bool:
        """Whether the checkpoint that was saved last could not be written."""
        written_by = trainer.strategy.checkpoint_io
        lost = isinstance(written_by, AtomicCheckpointIO) and last_saved_path(self) in written_by.failed
        decided: bool = trainer.strategy.broadcast(lost)
        return decided

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.current_score = state_dict["current_score"]  # which Lightning forgets
        best = self._folder / Path(state_dict["best_model_path"]).name
        if self.dirpath is None or state_dict["dirpath"] == self.dirpath or not state_dict["best_model_path"]:
            super().load_state_dict(state_dict)
            return
        if not best.is_file():
            log.warning("%s, the best checkpoint so far, isn't there any more: the best is sought anew", best)
            return
        copy = Path(self.dirpath) / best.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.resolve() != best.resolve():  # or it has moved already, and is being tested
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
