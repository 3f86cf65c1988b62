"""Runs that end or validate within an epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.helpers import Program, read_metrics
from tests.cli.test_resume import BUSY, StopAt, checkpoint, differences
from tests.training.runs import scalars

# One epoch has 4 batches.
OFTEN = [
    ("trainer.val_check_interval=0.25",),
    ("trainer.val_check_interval=3",),
    ("trainer.check_val_every_n_epoch=2",),
    ("trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=6"),
]


def load(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("overrides", "steps", "batches"),
    [
        (("trainer.max_steps=2",), 2, 2),
        (("trainer.max_steps=2", "trainer.max_epochs=-1"), 2, 2),
        (("trainer.max_steps=2", "trainer.val_check_interval=3"), 2, 2),
        (("trainer.max_steps=1", "trainer.accumulate_grad_batches=2"), 1, 2),
        # Steps of 3 batches, and of the 1 batch that remains of an epoch.
        (("trainer.max_steps=3", "trainer.accumulate_grad_batches=3", "trainer.check_val_every_n_epoch=5"), 3, 7),
        (("trainer.max_steps=6", "trainer.check_val_every_n_epoch=5"), 6, 6),
        (("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=5"), 12, 12),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_ending_before_the_first_validation(
    program: Program, overrides: tuple[str, ...], steps: int, batches: int
) -> None:
    """Then a validation follows the last batch."""
    outcome = program.train("trainer.max_epochs=4", *overrides)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"training ends after {batches}: validating at its end" in (outcome.folder / "train.log").read_text()
    assert [step for step, _ in scalars(outcome.folder / "tensorboard")["val/mrr"]] == [steps - 1]
    for name in ("best", "last"):
        assert load(outcome.folder, name)["global_step"] == steps
    assert outcome.metrics()["test/mrr"] > 0


def test_resuming_within_an_epoch(program: Program) -> None:
    folder, here = program.folder / "run", f"hydra.run.dir={program.folder}/run"
    run = ("trainer.max_epochs=2", here)
    program.train(*run, "trainer.max_steps=2")
    outcome = program.train(*run, "trainer.max_steps=3", f"ckpt_path={folder}/checkpoints/last.ckpt")
    assert (outcome.code, outcome.err) == (0, "")
    assert load(folder, "last")["global_step"] == 3
    assert [step for step, _ in scalars(folder / "tensorboard")["val/mrr"]] == [1, 2]


@pytest.mark.parametrize("overrides", OFTEN, ids=" ".join)
def test_the_best_checkpoint_holds_the_validated_weights(program: Program, overrides: tuple[str, ...]) -> None:
    outcome = program.train(*BUSY, "optimizer.lr=0.01", *overrides)
    assert (outcome.code, outcome.err) == (0, "")
    curve = dict(scalars(outcome.folder / "tensorboard")["val/mrr"])
    assert curve[load(outcome.folder, "best")["global_step"] - 1] == max(curve.values())
    assert load(outcome.folder, "last")["global_step"] == 16
    best, val = outcome.folder / "checkpoints" / "best.ckpt", program.folder / "val.safetensors"
    program.evaluate(f"ckpt_path={best}", f"data.test={val}", f"hydra.run.dir={program.folder}/again")
    assert read_metrics(program.folder / "again")["test/mrr"] == pytest.approx(max(curve.values()))


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("overrides", [(), *OFTEN], ids=" ".join)
def test_resuming_from_either_checkpoint(program: Program, overrides: tuple[str, ...], name: str) -> None:
    """The best checkpoint may come from the middle of an epoch."""
    run = (*BUSY, "optimizer.lr=0.0001", *overrides)
    uninterrupted = program.train(*run).folder
    interrupted, here = program.folder / "interrupted", f"hydra.run.dir={program.folder}/interrupted"
    with pytest.raises(RuntimeError, match="power cut"):
        program.train(*run, here, more_callbacks=[StopAt(9, RuntimeError("power cut"))])
    outcome = program.train(*run, here, f"ckpt_path={interrupted}/checkpoints/{name}.ckpt")
    assert (outcome.code, outcome.err) == (0, "")
    for other in ("last", "best"):
        assert differences(checkpoint(uninterrupted, other), checkpoint(interrupted, other)) == []
