"""However training is interrupted, between two steps or within one, it resumes as if nothing had happened."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from energy_flow import train
from energy_flow.training.optimizer import SkippingAdamW
from tests.cli.helpers import Outcome, Program
from tests.cli.test_resume import BUSY, checkpoint, differences

RUN = (*BUSY, "data.batch_size=8", "trainer.accumulate_grad_batches=2", "data.eval_batch_size=16")  # 4 steps an epoch


class At(Callback):
    """Do something once in a hook, after `step` optimiser steps, in their batch number `batch`."""

    def __init__(self, hook: str, step: int, do: Callable[[], Any], batch: int = 0) -> None:
        self.left = batch
        setattr(self, hook, lambda trainer, *args, **kwargs: self._look(trainer, step, do))

    def _look(self, trainer: Any, step: int, do: Callable[[], Any]) -> None:
        if trainer.global_step == step and not trainer.testing:
            self.left -= 1
            if self.left == -1:
                do()


def fail() -> None:
    raise RuntimeError("a stone in the way")


def signalled(signum: signal.Signals) -> Callable[[], None]:
    return lambda: signal.raise_signal(signum)


def broken_off(program: Program, *callbacks: Callback, overrides: tuple[str, ...] = ()) -> Outcome:
    """The run with callbacks that interrupt it; in the folder "broken"."""
    build = train.build_trainer

    def build_and_break(*args: Any, callbacks: list[Callback], own: Any = callbacks, **kwargs: Any) -> Any:
        return build(*args, callbacks=[*callbacks, *own], **kwargs)

    with program.patch.context() as patch:
        patch.setattr(train, "build_trainer", build_and_break)
        return program.train(*RUN, *overrides, f"hydra.run.dir={program.folder}/broken")


@pytest.fixture(scope="module")
def straight() -> dict[str, dict[str, Any]]:
    """The checkpoints of a run that was never interrupted, once it has run."""
    return {}


def resumes_exactly(program: Program, straight: dict[str, dict[str, Any]]) -> None:
    if not straight:
        outcome = program.train(*RUN)
        assert outcome.code == 0, outcome.err
        straight |= {name: checkpoint(outcome.folder, name) for name in ("last", "best")}
    folder = program.folder / "broken"
    torch.manual_seed(5)  # a resumed run must not depend on the state of the process
    outcome = program.train(*RUN, f"hydra.run.dir={folder}", f"ckpt_path={folder}/checkpoints/last.ckpt")
    assert (outcome.code, outcome.err) == (0, "")
    for name, expected in straight.items():
        found = differences(expected, checkpoint(folder, name))
        # The number of validation batches that were begun has no meaning.
        assert [path for path in found if "val_loop.batch_progress/total" not in path] == []


def saved_step(folder: Path) -> int:
    return torch.load(folder / "broken" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("hook", "step", "batch", "saved"),
    [
        ("on_before_backward", 5, 0, 6),  # finishes the step, also where it takes two batches
        ("on_before_backward", 5, 1, 6),
        ("on_before_backward", 7, 1, 8),  # the last one of an epoch: a validation comes next
        ("on_validation_batch_end", 4, 0, 4),  # the first epoch has no checkpoint yet
        ("on_validation_epoch_end", 8, 0, 8),
        ("on_before_backward", 15, 1, 16),  # no other batch comes
        ("on_validation_epoch_end", 16, 0, 16),
    ],
)
def test_a_signal(program: Program, straight: Any, hook: str, step: int, batch: int, saved: int) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    outcome = broken_off(program, At(hook, step, signalled(signal.SIGTERM), batch))
    assert outcome.code == 143
    assert "terminated: ending after this batch; send the signal again to end at once" in outcome.err
    assert f"terminated at step {saved}\nto resume from step {saved}:\npython -m energy_flow.train" in outcome.err
    assert saved_step(program.folder) == saved
    resumes_exactly(program, straight)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("hook", "step", "batch", "saved"),
    [
        ("on_before_backward", 5, 0, 5),
        ("on_before_backward", 5, 1, 5),  # gradients of half a step are lost: the step is done anew
        ("on_train_batch_start", 8, 0, 8),
        ("on_train_batch_end", 6, 0, 6),
        ("on_validation_epoch_end", 8, 0, 8),
    ],
)
def test_an_error(program: Program, straight: Any, hook: str, step: int, batch: int, saved: int) -> None:
    with pytest.raises(RuntimeError, match="stone") as caught:
        broken_off(program, At(hook, step, fail, batch))
    [note] = caught.value.__notes__
    assert f"to resume from step {saved}:\npython -m energy_flow.train" in note
    assert saved_step(program.folder) == saved
    resumes_exactly(program, straight)


def test_an_error_while_the_optimiser_writes(program: Program, straight: Any) -> None:
    """Half-written weights are worthless: the last checkpoint stays."""
    step = SkippingAdamW.step

    def broken(self: Any, closure: Any = None) -> Any:
        result = step(self, closure)
        if self.param_groups[0]["params"][0] in self.state and len(calls) == 6:
            fail()
        calls.append(0)
        return result

    calls: list[int] = []
    with program.patch.context() as patch:
        patch.setattr(SkippingAdamW, "step", broken)
        with pytest.raises(RuntimeError, match="stone") as caught:
            broken_off(program)
    assert "to resume from step 4:" in caught.value.__notes__[0]
    resumes_exactly(program, straight)


def test_a_second_signal_does_not_wait(program: Program, straight: Any) -> None:
    twice = At("on_before_backward", 5, lambda: [signalled(signal.SIGINT)() for _ in range(2)])
    outcome = broken_off(program, twice)
    assert outcome.code == 130
    assert "interrupted at step 5\nto resume from step 5:" in outcome.err
    resumes_exactly(program, straight)


def test_before_the_first_step(program: Program) -> None:
    outcome = broken_off(program, At("on_train_batch_start", 0, lambda: [signalled(signal.SIGINT)() for _ in range(2)]))
    assert outcome.code == 130
    assert "interrupted\nthere is no checkpoint yet to resume from" in outcome.err
