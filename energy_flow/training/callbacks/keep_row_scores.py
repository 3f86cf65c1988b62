"""Keep the score of every test row in the run folder."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from energy_flow.metrics.row_scores import MODEL, RowScores, write_row_scores
from energy_flow.training.module import EnergyFlowModule


class KeepRowScores(Callback):
    """Writes the rows of the model at the end of its test, in the process that has them.

    Processes that a strategy spawns for a test hand nothing but metrics back, so it is done in there. A test that was
    limited to some rows leaves no file: its ranks are among other candidates.

    Args:
        path: of the file.
        measure: which of the module's `test_rows`.
    """

    def __init__(self, path: Path, measure: str) -> None:
        self.path, self.measure = path, measure

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, EnergyFlowModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows = pl_module.test_rows[self.measure]
        if len(rows) == len(data.test):
            write_row_scores(self.path, RowScores(self.measure, data.fingerprint["test"], {MODEL: rows}))
        else:
            self.path.unlink(missing_ok=True)  # of an earlier test in this folder
