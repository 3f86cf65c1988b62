"""Every way of computing a rollout agrees with plain autograd: tape, chunks, compaction, recompute, compiled."""

import dataclasses
import functools
import itertools
import shutil
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from energy_flow.ops import gru_gates
from tests.core.test_invariants import cases
from tests.core.ways import ENGINES, PLAIN, assert_identical, assert_same, everything, tape
from tests.helpers import SMALLEST_MARGIN, Case, reference_of

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
MARGIN_OF_FLOAT32 = 1e-4  # from the nearest threshold: a hundred times the rounding of a few steps in float32
NO_COMPILER = shutil.which("g++") is None

SPAWN = {"spawn.enabled": True, "spawn.threshold": 0.3, "max_steps": 4}
CASES = {
    "everything": Case(
        {
            **SPAWN,
            "width": 4,
            "filter.enabled": True,
            "filter.min_displacement": 0.12,
            "convergence.enabled": True,
            "convergence.threshold": 0.6,
            "noise.std": 0.1,
            "noise.z": True,
            "movement.max_displacement": 0.83,
            "max_steps": 5,
        },
        {"num_layers": 2, "energy_dim": 3},
        training=True,
        batch=5,
        expect=("spawned", "noise", "removed", "converged_by_share", "clamped", "reflected", "projected"),
    ),
    "residual energy, three layers, features past a multiple of eight": Case(
        {**SPAWN, "max_flows_per_sample": 11},
        {"residual_energy": True, "num_layers": 3, "features": 13, "energy_dim": 2},
        seed=2,
        batch=5,
        expect=("spawned", "projected", "reached_z0", "spawn_limited"),
    ),
    "features and energy a multiple of eight": Case(
        {"deposit": "nearest"}, {"features": 7}, batch=5, expect=("reached_z0", "reached_zdepth", "projected")
    ),
    "one step, and unused slots": Case(
        {**SPAWN, "max_steps": 1},
        {"num_layers": 2},
        seed=8,
        batch=5,
        expect=("projected", "reached_z0"),
        absent=("spawned",),
    ),
    "all flows end early": Case(
        {"movement.max_displacement": 9.0, "max_steps": 6},
        {"num_layers": 2},
        displacement=3.0,
        seed=1,
        batch=5,
        expect=("reached_z0", "reached_zdepth"),
        absent=("projected",),
    ),
    "a sample ends early": Case(
        {
            "convergence.enabled": True,
            "convergence.threshold": 0.45,
            "convergence.patience": 9,
            "noise.std": 0.2,
            "max_steps": 6,
        },
        {"num_layers": 2},
        seed=9,
        training=True,
        batch=5,
        expect=("converged_by_share", "noise", "projected"),
    ),
}
WAYS = {
    f"chunk {chunk}{', recompute' * recompute}{', compaction' * compaction}": tape(
        recompute=recompute, chunk=chunk, compaction=compaction
    )
    for chunk, recompute, compaction in itertools.product((None, 1, 2, 3), (False, True), (False, True))
}


@functools.cache
def expected_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return everything(CASES[name], PLAIN, dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_have_their_events(name: str) -> None:
    case = CASES[name]
    reference = reference_of(case, case.processor(), case.embedding(), case.rows())
    for event in case.expect:
        assert reference.events[event] > 0, f"{event} did not happen: {dict(reference.events)}"
    for event in case.absent:
        assert reference.events[event] == 0, f"{event} happened"
    margins = reference.margins
    assert margins.smallest > MARGIN_OF_FLOAT32 > SMALLEST_MARGIN, (margins.name, margins.smallest)


def test_all_flows_end_before_the_last_step() -> None:
    active = expected_of("all flows end early", torch.float64)[".by_step.active"].tolist()
    assert 0 in active[:-2]
    assert 0 < active[1] < active[0], "they end one after the other"


def test_some_samples_end_before_others() -> None:
    active = expected_of("a sample ends early", torch.float64)[".trajectories.active"].any(-1)  # [T + 1, B]
    assert (active.any(1) & ~active.all(1)).any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_the_tape_is_plain_autograd(name: str, way: str, dtype: torch.dtype) -> None:
    assert_same(everything(CASES[name], WAYS[way], dtype), expected_of(name, dtype), TOLERANCES[dtype])


def test_the_automatic_choice_is_plain_autograd() -> None:
    for name in CASES:
        assert_same(everything(CASES[name], {}), expected_of(name, torch.float64), TOLERANCES[torch.float64])


@pytest.mark.parametrize("compaction", [False, True])
def test_gate_gradients_in_many_blocks(compaction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gru_gates, "_BLOCK_BYTES", 256)
    for name in CASES:
        way = tape(recompute=True, compaction=compaction)
        assert_same(everything(CASES[name], way), expected_of(name, torch.float64), TOLERANCES[torch.float64])


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [
        # The last chunk is smaller, and with compaction sizes differ from step to step.
        ("everything", torch.float64, tape(compile=True, chunk=3, recompute=True, compaction=True)),
        ("residual energy, three layers, features past a multiple of eight", torch.float32, tape(compile=True)),
    ],
)
def test_compiled(name: str, dtype: torch.dtype, way: dict[str, Any]) -> None:
    assert_same(everything(CASES[name], way, dtype), expected_of(name, dtype), TOLERANCES[dtype])


@pytest.mark.parametrize("way", ["chunk None", "chunk 3, recompute, compaction"])
def test_products_in_bf16(way: str) -> None:
    """Under autocast the engines round at different places: outputs and gradients agree to bf16's three digits."""
    # Weak heads: no flow comes near a decision.
    case = Case({"width": 4}, {"num_layers": 2, "energy_dim": 3, "hidden_size": 16}, displacement=0.02, batch=5)
    found = []
    for settings_ in (PLAIN, WAYS[way]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(everything(case, settings_, torch.float32))
    compared = [name for name in found[0] if name.startswith(("gradient", ".embedding", ".surface"))]
    assert len(compared) > 15
    for name in compared:
        assert_same({name: found[1][name]}, {name: found[0][name]}, 0.05)
    assert all(value.dtype != torch.bfloat16 for name, value in found[1].items() if name.startswith(".landings"))
    exact = everything(case, PLAIN, torch.float32)
    assert not torch.equal(found[1][".landings.xy"], exact[".landings.xy"]), "products were in bf16"


@pytest.mark.parametrize("way", ENGINES)
def test_two_runs_are_the_same_bit_for_bit(way: str) -> None:
    case = CASES["everything"]
    processor = dataclasses.replace(case, rollout=ENGINES[way]).processor()
    first, second = (everything(case, ENGINES[way], processor=processor) for _ in range(2))
    assert_identical(second, first)
    assert_identical(everything(case, ENGINES[way]), first)


@st.composite
def ways(draw: st.DrawFn) -> dict[str, Any]:
    chunk = draw(st.sampled_from([None, 1, 2, 3, "auto"]))
    return tape(recompute=draw(st.booleans()), chunk=chunk, compaction=draw(st.booleans()))


@given(cases(), ways(), st.integers(1, 3), st.integers(1, 5))
@example(CASES["everything"], tape(compaction=True), 2, 3)
@settings(max_examples=60)
def test_any_lattice_in_any_way(case: Case, way: dict[str, Any], num_layers: int, batch: int) -> None:
    case = dataclasses.replace(case, model={**case.model, "num_layers": num_layers}, batch=batch)
    assert_same(everything(case, way), everything(case, PLAIN), TOLERANCES[torch.float64])
