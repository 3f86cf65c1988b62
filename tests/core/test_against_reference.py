"""The lattice against the flow-by-flow reference: outputs, landings, counts, paths and all gradients, in float64.

The heads are strong, so that flows reach planes, reflect, spawn and end at different steps; every case names the
events that must happen.
"""

import dataclasses

import pytest
import torch

from tests.helpers import Case, check_case

BOTH_PLANES = ("reached_z0", "reached_zdepth", "projected")
SPAWN = {"spawn.enabled": True, "spawn.threshold": 0.3, "max_steps": 4}
TWO_LAYERS = {"num_layers": 2, "energy_dim": 3}

CASES = {
    "plain": Case(expect=BOTH_PLANES),
    "weak heads, everything is projected": Case(
        displacement=0.05, expect=("projected",), absent=("reached_z0", "reached_zdepth")
    ),
    "two layers, three energies": Case(model=TWO_LAYERS, expect=BOTH_PLANES),
    "residual energy": Case(model={"residual_energy": True}, seed=8, expect=("projected", "reached_z0")),
    "residual energy, three of them": Case(model={"residual_energy": True, **TWO_LAYERS}, expect=("projected",)),
    "skip from the input": Case(model={"skip": True}, expect=BOTH_PLANES),
    "hidden layer in the maps": Case(model={"map_hidden": 4}, expect=("projected",)),
    "identity maps": Case(
        {"width": 5, "height": 1}, {"maps": "identity", "residual_energy": True}, expect=("projected",)
    ),
    "larger lattice": Case(
        {"width": 4, "height": 4, "depth": 8}, TWO_LAYERS, batch=2, expect=(*BOTH_PLANES, "reflected", "shared_cells")
    ),
    "nearest": Case({"deposit": "nearest"}, displacement=1.5, seed=8, expect=(*BOTH_PLANES, "shared_cells")),
    "nearest, square": Case({"deposit": "nearest", "width": 4, "height": 4}, TWO_LAYERS, batch=2, expect=BOTH_PLANES),
    "clamp": Case({"movement.max_displacement": 0.37}, seed=23, expect=("clamped", "projected")),
    "several reflections in one step": Case(
        {"movement.max_displacement": 9.0, "movement.scale": 3.0},
        displacement=2.0,
        expect=("reflected_twice", "reached_z0"),
    ),
    "several reflections, and flows that go on": Case(
        {"width": 4, "movement.max_displacement": 9.0, "movement.scale": 4.0, "max_steps": 2},
        displacement=1.5,
        seed=6,
        expect=("reflected_twice", "projected"),
    ),
    "spawn": Case(SPAWN, expect=("spawned", "reached_z0"), batch=2),
    "spawn with room for all": Case(
        {**SPAWN, "max_flows_per_sample": 200}, expect=("spawned", "parents_of_several", "projected"), batch=2
    ),
    "spawn, several children, two layers": Case(
        {**SPAWN, "spawn.max_spawn_per_step": 5, "max_flows_per_sample": 400},
        TWO_LAYERS,
        expect=("parents_of_several",),
        batch=2,
    ),
    "spawn limited per step": Case(
        {**SPAWN, "spawn.max_spawn_per_step": 1, "max_flows_per_sample": 200},
        expect=("spawn_limited", "spawned"),
        batch=2,
    ),
    "spawn with overflow": Case({**SPAWN, "max_flows_per_sample": 9}, expect=("spawned",), batch=2),
    "spawn without a free slot": Case(
        {**SPAWN, "max_flows_per_sample": 6}, expect=("parents",), absent=("spawned",), batch=2
    ),
    "spawn not at the last step": Case({**SPAWN, "max_steps": 1}, absent=("spawned", "parents"), expect=("projected",)),
    "filter": Case(
        {"filter.enabled": True, "filter.min_displacement": 0.45}, displacement=0.7, expect=("removed", "projected")
    ),
    "filter takes all": Case(
        {"filter.enabled": True, "filter.min_displacement": 50.0},
        displacement=0.1,
        expect=("removed",),
        absent=("projected", "reached_z0", "reached_zdepth"),
    ),
    "filter spares flows that reach a plane": Case(
        {"filter.enabled": True, "filter.min_displacement": 50.0},
        displacement=3.0,
        expect=("removed", "reached_z0", "reached_zdepth"),
        absent=("projected",),
    ),
    "filter and spawn": Case(
        {**SPAWN, "filter.enabled": True, "filter.min_displacement": 0.25},
        displacement=0.6,
        expect=("removed", "spawned"),
    ),
    "convergence by share": Case(
        {"convergence.enabled": True, "convergence.threshold": 0.45, "convergence.patience": 9, "max_steps": 6},
        expect=("converged_by_share",),
        absent=("converged_by_patience",),
    ),
    "convergence by patience": Case(
        {"convergence.enabled": True, "convergence.min_steps": 1, "convergence.patience": 1, "max_steps": 6},
        displacement=0.3,
        expect=("converged_by_patience",),
    ),
    "convergence by a longer patience": Case(
        {"convergence.enabled": True, "convergence.min_steps": 2, "convergence.patience": 2, "max_steps": 7},
        displacement=0.4,
        expect=("converged_by_patience", "projected"),
    ),
    "convergence with spawn and filter": Case(
        {
            **SPAWN,
            "filter.enabled": True,
            "filter.min_displacement": 0.2,
            "convergence.enabled": True,
            "convergence.threshold": 0.31,
            "max_steps": 6,
        },
        displacement=0.7,
        expect=("converged_by_share", "spawned", "removed"),
    ),
    "noise": Case({"noise.std": 0.2}, training=True, expect=("noise", "projected")),
    "noise on z too": Case(
        {"noise.std": 0.3, "noise.z": True}, training=True, optimizer_step=12, expect=("noise", "projected")
    ),
    "noise and spawn": Case({**SPAWN, "noise.std": 0.2}, training=True, expect=("noise", "spawned"), batch=2),
    "noise is for training only": Case({"noise.std": 0.3}, training=False, absent=("noise",)),
    "no steps": Case({"max_steps": 0}, expect=("projected",)),
    "no steps, nearest": Case({"max_steps": 0, "deposit": "nearest"}, TWO_LAYERS, expect=("projected",)),
    "depth 1 has no steps": Case({"depth": 1}, expect=("projected",)),
    "one step": Case({"max_steps": 1}, expect=("projected",)),
    "one column": Case({"width": 1, "height": 4, "depth": 4}, expect=("projected",)),
    "one row": Case({"width": 4, "height": 1, "depth": 4}, expect=("projected",)),
    "one row, nearest": Case({"width": 4, "height": 1, "depth": 4, "deposit": "nearest"}, expect=("projected",)),
    "one cell": Case({"width": 1, "height": 1}, TWO_LAYERS, seed=0, expect=("projected",)),
    "one cell, spawning": Case(
        {**SPAWN, "width": 1, "height": 1, "max_flows_per_sample": 5}, expect=("spawned", "shared_cells")
    ),
    "one sample": Case(batch=1, expect=("projected",)),
    "warm-up at step 0": Case({"movement.warmup_steps": 9}, optimizer_step=0, expect=("projected",)),
    "warm-up at step 4": Case({"movement.warmup_steps": 9}, optimizer_step=4, expect=("projected",)),
    "decay half way": Case(
        {"movement.warmup_steps": 2, "movement.decay_steps": 10, "movement.final_scale": 0.25},
        optimizer_step=7,
        expect=("projected",),
    ),
    "after the decay": Case(
        {"movement.warmup_steps": 2, "movement.decay_steps": 10, "movement.final_scale": 0.25},
        optimizer_step=99,
        expect=("projected",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    check_case(CASES[name])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_equals_the_reference_with_everything_on(seed: int) -> None:
    case = Case(
        {
            "width": 4,
            "spawn.enabled": True,
            "filter.enabled": True,
            "filter.min_displacement": 0.12,
            "convergence.enabled": True,
            "convergence.threshold": 0.71,
            "noise.std": 0.1,
            "noise.z": True,
            "movement.max_displacement": 0.83,
            "max_steps": 5,
        },
        TWO_LAYERS,
        training=True,
        seed=seed,
        batch=2,
        expect=("spawned", "noise"),
    )
    check_case(case)


def test_overflow_happens_where_it_is_claimed() -> None:
    _, few = check_case(CASES["spawn with overflow"])
    _, enough = check_case(CASES["spawn with room for all"])
    assert few.overflow > 0
    assert enough.overflow == 0


def test_the_schedule_changes_the_output() -> None:
    outputs = [check_case(CASES[name])[0].embedding for name in ("warm-up at step 0", "warm-up at step 4", "plain")]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_without_noise_training_mode_makes_no_difference() -> None:
    case = CASES["plain"]
    trained, _ = check_case(dataclasses.replace(case, training=True))
    evaluated, _ = check_case(case)
    assert torch.equal(trained.embedding, evaluated.embedding)
