"""Single flows, followed by their slot."""

import dataclasses
from typing import Any

import pytest
import torch

from energy_flow.core.flow_processor import FlowOutput
from energy_flow.core.history import Trajectories
from tests.core.ways import ENGINES
from tests.helpers import FORWARD_TOLERANCE, Case, tensors_of

CASE = Case({"width": 4, "height": 3, "max_steps": 6}, {"energy_dim": 2}, displacement=0.8)


def run(case: Case, record: bool = True) -> tuple[FlowOutput, Trajectories]:
    with torch.no_grad():
        output = case.processor()(case.embedding(), case.rows(), record_trajectories=record)
    assert output.trajectories is not None
    return output, output.trajectories


def test_masks_are_bool_tensors() -> None:
    output, _ = run(CASE)
    masks = {name for name, tensor in tensors_of(output).items() if tensor.dtype == torch.bool}
    faults = {".faults.no_landing", ".faults.not_finite"}
    assert masks == {".landings.landed", ".landings.projected", ".trajectories.active"} | faults


def test_flows_start_at_their_cells() -> None:
    _, trajectories = run(CASE)
    for slot in range(12):
        x, y = slot % 4, slot // 4
        expected = torch.tensor([2 * x / 3 - 1, 2 * y / 2 - 1, 0.0], dtype=torch.float64)
        torch.testing.assert_close(trajectories.position[0, :, slot], expected.expand(3, -1), rtol=0, atol=1e-15)
    assert trajectories.active[0, :, :12].all()


def test_flows_stand_still_after_they_ended() -> None:
    output, trajectories = run(CASE)
    ended_early = 0
    for sample in range(3):
        for slot in range(12):
            active = trajectories.active[:, sample, slot]
            steps = int(active[:-1].sum())
            assert active[:steps].all(), "active from the first step until it ends"
            assert not active[steps + 1 :].any()
            landing = trajectories.position[steps, sample, slot]
            assert torch.equal(output.landings.xy[sample, slot], landing[:2])
            assert int(output.landings.steps[sample, slot]) == steps
            assert (trajectories.displacement[:steps, sample, slot] > 0).all()
            assert (trajectories.displacement[steps:, sample, slot] == 0).all()
            if steps < 6:
                ended_early += 1
                assert torch.equal(trajectories.position[steps:, sample, slot], landing.expand(7 - steps, -1))
                assert not output.landings.projected[sample, slot]
    assert 0 < ended_early < 36


@pytest.mark.parametrize("way", ENGINES.values(), ids=ENGINES.keys())
def test_a_changed_cell_changes_its_own_flow_only(way: dict[str, Any]) -> None:
    """Fails if a mask is used as an index."""
    case = dataclasses.replace(CASE, rollout=way)
    _, before = run(case)
    processor = case.processor()
    with torch.no_grad():
        processor.map_in.cell_value[5] += 0.3
        after = processor(case.embedding(), case.rows(), record_trajectories=True).trajectories
    assert after is not None
    change = (before.position - after.position).abs().amax((0, 3))
    # The changed flow ends at another step. Compaction then multiplies another number of rows, for which a processor
    # may sum in another order; everywhere else shapes, and so bits, are the same.
    rounding = FORWARD_TOLERANCE if way.get("compaction") else 0.0
    expected = torch.zeros_like(change, dtype=torch.bool)
    expected[:, 5] = True
    assert torch.equal(change > rounding, expected)


def test_children_begin_where_their_parents_were() -> None:
    case = Case({"spawn.enabled": True, "max_steps": 3, "max_flows_per_sample": 60}, seed=3)
    output, trajectories = run(case)
    children = torch.zeros(3, dtype=torch.int64)
    created = trajectories.active.any(0)
    for sample in range(3):
        for slot in torch.nonzero(created[sample]).flatten().tolist():
            active = trajectories.active[:, sample, slot]
            birth = int(active.nonzero()[0])
            if slot < 6:
                assert birth == 0
                continue
            children[sample] += 1
            assert birth in (1, 2)
            place = trajectories.position[birth, sample, slot]
            parents = (trajectories.position[birth - 1, sample, :slot] == place).all(-1)
            assert parents.any(), "no parent was there"
            assert int(output.landings.steps[sample, slot]) == birth + int(active[:-1].sum()), (
                "it has its parent's steps"
            )
        assert created[sample, : 6 + int(children[sample])].all(), "slots are given out without gaps"
    assert (children > 0).all()
    assert output.statistics["spawned"] == children.sum() / len(children)


def test_without_recording_there_are_no_paths() -> None:
    assert CASE.processor()(CASE.embedding()).trajectories is None
