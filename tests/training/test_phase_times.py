from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow.core.timing import PhaseTimer
from energy_flow.training.callbacks import phase_times
from energy_flow.training.callbacks.phase_times import PhaseTimes
from tests.training.runs import NO_WARNINGS, TinyModule, loader, scalars, trainer

pytestmark = NO_WARNINGS

TAGS = {"time/place", "time/propagate", "time/collect", "time/aggregate", "time/backward"}


class Watched(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.timed: list[bool] = []

    def training_step(self, *args: Any) -> Any:
        self.timed.append(self.phase_timer is not None)
        return super().training_step(*args)


class LateTimer(PhaseTimer):
    """A timer with a result at the second query, like a device that is one batch behind."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.asked = 0

    def seconds(self, *, wait: bool = False) -> dict[str, float] | None:
        self.asked += 1
        return super().seconds() if wait or self.asked > 1 else None


def test_times_one_batch_of_every_n(tmp_path: Path) -> None:
    module = Watched()
    trainer(tmp_path, PhaseTimes(), log_every_n_steps=3).fit(module, loader(7))
    assert module.timed == [False, False, True, False, False, True, False]
    assert module.phase_timer is None
    logged = scalars(tmp_path)
    assert {tag for tag in logged if tag.startswith("time/")} == TAGS
    for tag in TAGS:
        assert [step for step, _ in logged[tag]] == [2, 5]
        assert all(value > 0 for _, value in logged[tag])


@pytest.mark.parametrize("every", [1, 2])
def test_late_times_are_logged_at_their_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(phase_times, "PhaseTimer", LateTimer)
    trainer(tmp_path, PhaseTimes(), log_every_n_steps=every).fit(TinyModule(), loader(4))
    assert [step for step, _ in scalars(tmp_path)["time/backward"]] == list(range(every - 1, 4, every))


def test_switched_off_with_the_logging(tmp_path: Path) -> None:
    module = Watched()
    trainer(tmp_path, PhaseTimes(), log_every_n_steps=0).fit(module, loader(2))
    assert module.timed == [False, False]


def test_accumulated_batches_are_timed_too(tmp_path: Path) -> None:
    module = Watched()
    trainer(tmp_path, PhaseTimes(), log_every_n_steps=2, accumulate_grad_batches=4).fit(module, loader(8))
    assert module.timed == [False, True] * 4
    assert [step for step, _ in scalars(tmp_path)["time/place"]] == [0, 0, 1, 1]


def test_an_exception_leaves_no_timer_behind(tmp_path: Path) -> None:
    class Failing(TinyModule):
        def training_step(self, *args: Any) -> Any:
            raise RuntimeError("out of luck")

    module = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path, PhaseTimes()).fit(module, loader(2))
    assert module.phase_timer is None
