"""Compaction with counts that only the device knows. On a CPU, the other slots are computed for nothing."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from energy_flow.core.engine import engine as tape_engine
from energy_flow.core.engine import tape as tapes
from energy_flow.core.engine.compaction import Activity
from energy_flow.core.engine.engine import TapeEngine
from energy_flow.core.history import Counts
from tests.core.test_invariants import cases
from tests.core.test_ways_of_running import CASES, TOLERANCES, expected_of
from tests.core.ways import PLAIN, assert_same, everything, processor_of, tape

CHOSEN = TapeEngine._compaction


@pytest.fixture(autouse=True)
def by_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TapeEngine, "_compaction", lambda *_: "active_first")


@pytest.fixture(params=[1, 2, 3, 9], autouse=True)
def period(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after which flows that have ended drop out."""
    monkeypatch.setattr(tapes, "_PERIOD", request.param)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_it_is_plain_autograd(name: str, chunk: int | None, recompute: bool, dtype: torch.dtype) -> None:
    way = tape(chunk=chunk, recompute=recompute)
    assert_same(everything(CASES[name], way, dtype), expected_of(name, dtype), TOLERANCES[dtype])


@given(cases(), st.booleans(), st.integers(1, 3))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lattice(case: Any, recompute: bool, num_layers: int) -> None:
    case = dataclasses.replace(case, model={**case.model, "num_layers": num_layers})
    way = tape(recompute=recompute)
    assert_same(everything(case, way), everything(case, PLAIN), TOLERANCES[torch.float64])


def slots_in_use(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[int, int]]:
    """Slots counted and flows active in every step of a case."""
    seen = []
    step = tapes.Tape.step

    def watched(self: tapes.Tape, state: Any, active: Any, noise: Any) -> Any:
        result = step(self, state, active, noise)
        assert self._count is not None
        assert self._slots is not None
        assert self._slots.sort().values.equal(torch.arange(active.numel())), "every slot is in the list once"
        used = self._slots[: self._count]
        assert active.flatten()[self._slots[self._count :]].sum() == 0, "an active flow isn't counted"
        seen.append((len(used), int(active.sum())))
        return result

    monkeypatch.setattr(tapes.Tape, "step", watched)
    everything(CASES[name], tape())
    return seen


@pytest.mark.parametrize("name", ["everything", "all flows end early"])
def test_flows_that_have_ended_drop_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = slots_in_use(monkeypatch, name)
    assert len(steps) >= 5
    for number, (used, active) in enumerate(steps):
        assert used == active if number % tapes._PERIOD == 0 else used >= active
    assert any(active < before for (_, active), (_, before) in zip(steps[1:], steps, strict=False))


def activity(*shares: float) -> list[bool]:
    """Whether activity is low after each of some batches with these shares; 2 steps, 100 slots."""
    watched, found = Activity(), []
    for share in shares:
        moves = int(200 * share)
        by_step = {"active": torch.tensor([moves - moves // 2, moves // 2, 0])}
        zero = torch.tensor(0)
        watched.put(Counts(by_step=by_step, lost=zero, distance=zero, num_moves=torch.tensor(moves)), 100)
        found.append(watched.is_low())
    return found


def test_a_low_activity_must_rise_above_the_higher_limit() -> None:
    assert not Activity().is_low()
    assert activity(1.0, 0.55, 0.49, 0.55, 0.61, 0.55, 0.1) == [False, False, True, True, False, False, True]


def test_the_choice_of_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "auto" on a GPU: only with low activity, in two-byte products, and without deterministic algorithms."""
    on_gpu, on_cpu = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(device=torch.device("cpu"))
    half, single = torch.bfloat16, torch.float32
    monkeypatch.setattr(tape_engine, "use_triton", lambda tensor: True)
    chosen = {
        setting: functools.partial(CHOSEN, processor_of(CASES["everything"], {"compaction": setting})._engines.tape)
        for setting in ("auto", True, False)
    }
    assert [chosen[False](on_gpu, half), chosen[False](on_cpu, half)] == ["none", "none"]
    assert [chosen[True](on_gpu, single), chosen[True](on_cpu, single)] == ["active_first", "active_only"]
    assert [chosen["auto"](on_gpu, half), chosen["auto"](on_cpu, half)] == ["none", "active_only"]
    monkeypatch.setattr(Activity, "is_low", lambda _: True)
    assert [chosen["auto"](on_gpu, half), chosen["auto"](on_gpu, single)] == ["active_first", "none"]
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen["auto"](on_gpu, half) == "none"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tape_engine, "use_triton", lambda tensor: False)
    assert chosen["auto"](on_gpu, half) == "none"
