"""An interruption at any point, between two steps or within one, does not change the result of a resumed run."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from energy_flow.training.optimizer import SkippingAdamW
from tests.cli.helpers import Outcome, Program
from tests.cli.test_resume import BUSY, checkpoint, differences

RUN = (*BUSY, "data.batch_size=8", "trainer.accumulate_grad_batches=2", "data.eval_batch_size=16")  # 4 steps an epoch


class ActAt(Callback):
    """Act once in a hook, after `step` optimiser steps, at their batch number `batch`."""

    def __init__(self, hook: str, step: int, do: Callable[[], Any], batch: int = 0) -> None:
        self.left = batch
        setattr(self, hook, lambda trainer, *args, **kwargs: self._look(trainer, step, do))

    def _look(self, trainer: Any, step: int, do: Callable[[], Any]) -> None:
        if trainer.global_step == step and not trainer.testing:
            self.left -= 1
            if self.left == -1:
                do()


def fail() -> None:
    raise RuntimeError("an injected error")


def sender(signum: signal.Signals) -> Callable[[], None]:
    """A function that sends a signal to this process."""
    return lambda: signal.raise_signal(signum)


def interrupted(program: Program, *callbacks: Callback, overrides: tuple[str, ...] = ()) -> Outcome:
    """Run into the folder "interrupted", with callbacks that interrupt the run."""
    folder = f"hydra.run.dir={program.folder}/interrupted"
    return program.train(*RUN, *overrides, folder, more_callbacks=callbacks)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, Any]]:
    """The checkpoints of the uninterrupted run; `check_resume` fills it once."""
    return {}


def check_resume(program: Program, uninterrupted: dict[str, dict[str, Any]]) -> None:
    """Resume the run in the folder "interrupted", and compare it with the uninterrupted run."""
    if not uninterrupted:
        outcome = program.train(*RUN)
        assert outcome.code == 0, outcome.err
        uninterrupted |= {name: checkpoint(outcome.folder, name) for name in ("last", "best")}
    folder = program.folder / "interrupted"
    torch.manual_seed(5)  # a resumed run must not depend on the state of the process
    outcome = program.train(*RUN, f"hydra.run.dir={folder}", f"ckpt_path={folder}/checkpoints/last.ckpt")
    assert (outcome.code, outcome.err) == (0, "")
    for name, expected in uninterrupted.items():
        found = differences(expected, checkpoint(folder, name))
        # An interruption changes the number of validation batches that were begun. Nothing reads it.
        assert [path for path in found if "val_loop.batch_progress/total" not in path] == []


def saved_step(folder: Path) -> int:
    return torch.load(folder / "interrupted" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("hook", "step", "batch", "saved"),
    [
        ("on_before_backward", 5, 0, 6),  # the run finishes the step, even if that takes one more batch
        ("on_before_backward", 5, 1, 6),
        ("on_before_backward", 7, 1, 8),  # the last step of an epoch; validation comes next
        ("on_validation_batch_end", 4, 0, 4),  # the first epoch has no checkpoint yet
        ("on_validation_epoch_end", 8, 0, 8),
        ("on_before_backward", 15, 1, 16),  # the last batch of the run
        ("on_validation_epoch_end", 16, 0, 16),
    ],
)
def test_a_signal(program: Program, uninterrupted: Any, hook: str, step: int, batch: int, saved: int) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    outcome = interrupted(program, ActAt(hook, step, sender(signal.SIGTERM), batch))
    assert outcome.code == 143
    assert "terminated: ending after this batch; send the signal again to end at once" in outcome.err
    assert f"terminated at step {saved}\nto resume from step {saved}:\npython -m energy_flow.train" in outcome.err
    assert saved_step(program.folder) == saved
    check_resume(program, uninterrupted)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("hook", "step", "batch", "saved"),
    [
        ("on_before_backward", 5, 0, 5),
        ("on_before_backward", 5, 1, 5),  # gradients of half a step are lost, so the step is repeated
        ("on_train_batch_start", 8, 0, 8),
        ("on_train_batch_end", 6, 0, 6),
        ("on_validation_epoch_end", 8, 0, 8),
    ],
)
def test_an_error(program: Program, uninterrupted: Any, hook: str, step: int, batch: int, saved: int) -> None:
    with pytest.raises(RuntimeError, match="injected") as caught:
        interrupted(program, ActAt(hook, step, fail, batch))
    [note] = caught.value.__notes__
    assert f"to resume from step {saved}:\npython -m energy_flow.train" in note
    assert saved_step(program.folder) == saved
    check_resume(program, uninterrupted)


def test_an_error_during_an_optimiser_step(program: Program, uninterrupted: Any) -> None:
    """Half-updated weights are not saved: the last checkpoint stays."""
    step = SkippingAdamW.step

    def step_and_fail(self: Any, closure: Any = None) -> Any:
        result = step(self, closure)
        if self.param_groups[0]["params"][0] in self.state and len(calls) == 6:
            fail()
        calls.append(0)
        return result

    calls: list[int] = []
    with program.patch.context() as patch:
        patch.setattr(SkippingAdamW, "step", step_and_fail)
        with pytest.raises(RuntimeError, match="injected") as caught:
            interrupted(program)
    assert "to resume from step 4:" in caught.value.__notes__[0]
    check_resume(program, uninterrupted)


def test_a_second_signal_does_not_wait(program: Program, uninterrupted: Any) -> None:
    twice = ActAt("on_before_backward", 5, lambda: [sender(signal.SIGINT)() for _ in range(2)])
    outcome = interrupted(program, twice)
    assert outcome.code == 130
    assert "interrupted at step 5\nto resume from step 5:" in outcome.err
    check_resume(program, uninterrupted)


def test_before_the_first_step(program: Program) -> None:
    outcome = interrupted(
        program, ActAt("on_train_batch_start", 0, lambda: [sender(signal.SIGINT)() for _ in range(2)])
    )
    assert outcome.code == 130
    assert "interrupted\nthere is no checkpoint yet to resume from" in outcome.err
