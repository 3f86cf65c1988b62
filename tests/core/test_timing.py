"""Times of phases, with a clock of the test's own."""

from collections.abc import Callable

import pytest
import torch

from energy_flow.core.timing import PhaseTimer

CPU = torch.device("cpu")


def clock(*readings: float) -> Callable[[], float]:
    values = iter(readings)
    return lambda: next(values)


def test_a_phase_entered_twice_adds_up() -> None:
    timer = PhaseTimer(CPU, clock(1.0, 3.0, 10.0, 14.0, 20.0, 21.0))
    with timer.phase("place"):
        pass
    with timer.phase("propagate"):
        pass
    with timer.phase("place"):
        pass
    assert timer.seconds() == {"place": 2.0 + 1.0, "propagate": 4.0}
    assert timer.seconds() == {"place": 3.0, "propagate": 4.0}, "reading changes nothing"


def test_phases_may_lie_inside_of_each_other() -> None:
    timer = PhaseTimer(CPU, clock(0.0, 1.0, 2.0, 5.0))
    timer.start("backward")
    with timer.phase("propagate"):
        pass
    assert timer.seconds() == {"propagate": 1.0}, "a phase that is still open is not there yet"
    timer.stop("backward")
    assert timer.seconds() == {"propagate": 1.0, "backward": 5.0}


def test_an_exception_ends_the_phase() -> None:
    timer = PhaseTimer(CPU, clock(1.0, 2.0))
    with pytest.raises(RuntimeError, match="inside"), timer.phase("collect"):
        raise RuntimeError("inside")
    assert timer.seconds() == {"collect": 1.0}


def test_a_phase_that_never_began() -> None:
    with pytest.raises(KeyError, match="backward"):
        PhaseTimer(CPU).stop("backward")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_are_read_when_the_device_is_done() -> None:
    timer = PhaseTimer(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timer.phase("propagate"):
            torch.cuda._sleep(2_000_000_000)  # about a second of cycles
        assert timer.seconds() is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = timer.seconds(wait=True)
    assert seconds is not None
    assert seconds["propagate"] > 0
