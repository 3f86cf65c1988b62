"""The best checkpoint of a run, also of one that goes on in another folder."""

import logging
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which forgets the best score so far when a run goes on in a new folder.

    Then the next epoch would count as the best, whatever it reached. Here the best checkpoint moves along.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.current_score = state_dict["current_score"]  # which Lightning forgets
        best = Path(state_dict["best_model_path"])
        if self.dirpath is None or state_dict["dirpath"] == self.dirpath or not best.name:
            super().load_state_dict(state_dict)
            return
        if not best.is_file():
            log.warning("%s, the best checkpoint so far, isn't there any more: the best is sought anew", best)
            return
        copy = Path(self.dirpath) / best.name
        copy.parent.mkdir(parents=True, exist_ok=True)
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
