"""Save the score of every test row in the run folder."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from energy_flow.metrics.retrieval import AllTargets
from energy_flow.metrics.row_scores import MODEL, RowScores, write_row_scores
from energy_flow.training.module import EnergyFlowModule


class KeepRowScores(Callback):
    """Write the model's score of every test row at the end of a test.

    A strategy may spawn processes for a test. They return metrics only, so the first of them writes the file. If the
    test was limited to some rows, no file is written: the ranks would be among other candidates.

    Args:
        path: of the file.
        measure: rank or mse; any name with `candidates`.
        candidates: the file gets the ranks among these targets. None: among the targets of the test split.
    """

    def __init__(self, path: Path, measure: str, candidates: AllTargets | None = None) -> None:
        self.path, self.measure, self.candidates = path, measure, candidates

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, EnergyFlowModule)
        assert pl_module.scores is not None
        data, scores = trainer.datamodule, pl_module.scores  # type: ignore[attr-defined]
        if len(scores.prediction) != len(data.test):
            self.path.unlink(missing_ok=True)  # of an earlier test in this folder
            return
        if self.candidates is None:
            values = scores.row_scores(self.measure)
        else:
            values = self.candidates.ranks(scores.prediction).cpu()
        write_row_scores(self.path, RowScores(self.measure, data.fingerprint["test"], {MODEL: values}))
