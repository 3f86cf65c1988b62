"""Deterministic algorithms, and flows that end early."""

import pytest
import torch
from torch import Tensor, nn

from energy_flow_benchmarks import step_modes
from energy_flow_benchmarks.workload import Step
from tests.benchmarks.test_measure import ONCE
from tests.benchmarks.test_step import workload


def test_every_comparison_has_its_rows() -> None:
    of = workload(max_steps=8)
    rows = step_modes.rows_of_modes(of, "tiny", 2, "float32", ONCE)
    assert [row.variant for row in rows] == [
        step_modes.DEFAULT,
        step_modes.DETERMINISTIC,
        step_modes.ALL,
        step_modes.COMPACTED,
    ]
    assert [row.ratio for row in rows][::2] == [1, 1]
    assert all(row.seconds and row.size == 2 * 4 * 3 for row in rows)


def test_flows_end_after_a_quarter_of_the_steps() -> None:
    of = workload(max_steps=8)
    found = []
    for compaction in (False, True):
        processor = step_modes.where_flows_end(of, compaction=compaction)
        output = processor(of.batch(2)[0])
        assert output.by_step["active"].tolist() == [24, 24, *[0] * 7]
        found.append(output.embedding)
    torch.testing.assert_close(*found)


def test_different_bits_are_found() -> None:
    parameter = nn.Parameter(torch.ones(3))
    for differs in ("output", "gradient", ""):
        runs = 0

        def run(differs: str = differs) -> Tensor:
            nonlocal runs
            runs += 1
            assert torch.are_deterministic_algorithms_enabled()
            last = runs == step_modes.RUNS
            parameter.grad = torch.full((3,), 2.0 if last and differs == "gradient" else 1.0)
            return torch.full((3,), 2.0 if last and differs == "output" else 1.0)

        if differs:
            with pytest.raises(RuntimeError, match="different bits"):
                step_modes.require_same_bits(Step(run, {"parameter": parameter}))
        else:
            step_modes.require_same_bits(Step(run, {"parameter": parameter}))
        assert runs == step_modes.RUNS
    assert not torch.are_deterministic_algorithms_enabled()
