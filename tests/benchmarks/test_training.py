"""The benchmarks of training steps: memory, stability, scaling."""

from typing import Any

import pytest
import torch

from energy_flow.errors import ConfigError
from energy_flow.settings import read
from energy_flow.viz.style import render
from energy_flow_benchmarks import memory, scaling, stability, workload
from energy_flow_benchmarks.findings import Row, find
from energy_flow_benchmarks.memory import MemorySettings, SweepSettings, chunked
from energy_flow_benchmarks.scaling import ScalingSettings
from energy_flow_benchmarks.stability import StabilitySettings, Training, reported_steps, steps_around
from energy_flow_benchmarks.workload import Workload
from tests.benchmarks.training import tiny_size

CPU = torch.device("cpu")
TINY = {"lattice": {"width": 4, "height": 3}, "model": {"hidden_size": 8}}


def silent(_: str) -> None:
    pass


class TestMemory:
    def settings(self) -> MemorySettings:
        own = {
            "sweeps": [{**tiny_size(**TINY), "batches": [3, 1], "chunk": 1}],
            "dtype": "float32",
            "product": 16,
            "repeats": 1,
            "min_seconds": 0.0,
        }
        return read(MemorySettings, {"name": "memory", "dim": 6, "cpu": own, "cuda": own}, "benchmark")

    def test_findings(self) -> None:
        findings = memory.run(self.settings(), CPU, 1, silent)
        always = ["fast, whole batch", "lean, whole batch", chunked("fast"), chunked("lean")]
        for size, more in ((12, []), (36, ["fast, chunk auto"])):
            rows = [row for row in findings.rows if row.size == size]
            assert [row.variant for row in rows] == [*always, *more, memory.NO_STEPS]
            for row in rows:
                assert row.ratio == pytest.approx(rows[0].seconds / row.seconds)
                assert (row.share is None) == (row.variant == memory.NO_STEPS)
        (grid,) = findings.grids
        assert grid.columns == ("variant", "12 flows", "36 flows")
        assert len(grid.lines) == 2

    def test_variants_have_the_settings_of_their_names(self) -> None:
        sweep = SweepSettings(size="debug", batches=[1, 8], chunk=2)
        assert memory.variants(sweep, 8) == {
            "fast, whole batch": {"recompute": False, "chunk": None},
            "lean, whole batch": {"recompute": True, "chunk": None},
            "fast, in chunks": {"recompute": False, "chunk": 2},
            "lean, in chunks": {"recompute": True, "chunk": 2},
            "fast, chunk auto": {"recompute": False, "chunk": "auto"},
        }

    def test_a_batch_that_does_not_fit_has_a_row_and_a_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = workload.step_of

        def limited(processor: Any, embedding: torch.Tensor, *rest: Any) -> Any:
            if processor.rollout_settings.chunk is None and len(embedding) == 3:
                raise torch.OutOfMemoryError("too much")
            return plain(processor, embedding, *rest)

        monkeypatch.setattr(workload, "step_of", limited)
        findings = memory.run(self.settings(), CPU, 1, silent)
        row = find(findings.rows, "debug", 36, "fast, whole batch")
        assert (row.seconds, row.peak_bytes, row.share) == (None, None, None)
        assert "debug, 36 flows, fast, whole batch: out of memory" in findings.notes
        assert find(findings.rows, "debug", 36, chunked("fast")).seconds is not None
        assert render(memory.picture(findings.rows)).std() > 1

    def test_flatness_is_beyond_maps_and_landings(self) -> None:
        sweep = SweepSettings(size="debug", batches=[1, 2], chunk=1)
        peaks = {chunked("fast"): 5 * 2**20, chunked("lean"): 2 * 2**20, memory.NO_STEPS: 2**20}
        rows = [Row("memory", "debug; x", size, name, 1.0, peak) for size in (9, 18) for name, peak in peaks.items()]
        grid = memory.flatness_grid(rows, sweep)
        assert [line[1:] for line in grid.lines] == [("4 MiB", "4 MiB"), ("1 MiB", "1 MiB")]


class TestScaling:
    def test_seconds_are_per_flow_and_step(self) -> None:
        own = {"batches": [3, 1], "dtype": "float32", "repeats": 1, "min_seconds": 0.0}
        section = {"name": "scaling", "dim": 6, **tiny_size(**TINY), "cpu": own, "cuda": own}
        findings = scaling.run(read(ScalingSettings, section, "benchmark"), CPU, 1, silent)
        assert len(findings.rows) == 2 * 2 * 3
        for size in (12, 36):
            for variant in (scaling.EAGER, scaling.TAPE, scaling.LEAN):
                whole, each = (
                    find(findings.rows, case, size, variant) for case in (scaling.PER_STEP, scaling.PER_FLOW)
                )
                assert each.seconds == pytest.approx(whole.seconds / (size * 5))
                assert each.ratio == pytest.approx(whole.ratio)
        assert [line[-1] for line in findings.grids[0].lines] == ["1", "1", "1"]


class TestStability:
    def settings(self, **changes: Any) -> StabilitySettings:
        rules = {
            "movement": {"scale": 0.1},
            "noise": {"std": 0.05},
            "spawn": {"enabled": True, "threshold": 0.06},
            "filter": {"enabled": True, "min_displacement": 0.055},
        }
        own = {
            **tiny_size(lattice={**TINY["lattice"], **rules}, model=TINY["model"]),
            "batches": [2, 1],
            "dtype": "float32",
        }
        section = {
            "name": "stability",
            "dim": 6,
            "steps": 20,
            "warmup_steps": 5,
            "window": 4,
            "validate_every": 6,
            "cleanup_every": 7,
            "cpu": own,
            "cuda": own,
        }
        return read(StabilitySettings, {**section, **changes}, "benchmark")

    def test_findings(self) -> None:
        settings = self.settings()
        findings = stability.run(settings, CPU, 1, silent)
        assert reported_steps(settings) == [2, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20]
        for case in (stability.STEP, stability.RESIDENT):
            assert [row.size for row in findings.rows if row.case.startswith(case)] == reported_steps(settings)
        early, late = (find(findings.rows, stability.STEP, step, "step") for step in (10, 20))
        assert early.ratio == 1
        assert late.ratio == pytest.approx(early.seconds / late.seconds)
        assert find(findings.rows, stability.RESIDENT, 20, "process").peak_bytes > 2**20
        (grid,) = findings.grids
        assert grid.columns[1:] == ("after 5 steps", "after 20 steps")
        figure = stability.picture(findings.rows)
        assert [axes.get_ylim()[0] for axes in figure.axes] == [0, 0]

    def test_cleanup_and_validation_come_at_their_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[str] = []
        plain = stability.FlowProcessor.cleanup_memory_safe
        monkeypatch.setattr(
            stability.FlowProcessor, "cleanup_memory_safe", lambda self: called.append("clean") or plain(self)
        )
        monkeypatch.setattr(Training, "validate", lambda self: called.append(f"validate {self._num_steps}"))
        stability.run(self.settings(), CPU, 1, silent)
        assert called == ["validate 6", "clean", "validate 12", "clean", "validate 18"]

    def test_a_population_that_never_changes_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        still = self.settings()
        own = still.cpu.model_copy(update={"lattice": TINY["lattice"]})
        with pytest.raises(RuntimeError, match="the population never changed"):
            stability.run(still.model_copy(update={"cpu": own}), CPU, 1, silent)

    def test_a_training_trains(self) -> None:
        settings = self.settings()
        training = Training(Workload.read(settings.cpu, 6, CPU, 1), [2, 1], "float32")
        before = {name: value.clone() for name, value in training.processor.state_dict().items()}
        first = int(training.processor.optimizer_step)
        training.step()
        assert training.processor.last_output.embedding.shape == (2, 6)
        training.step()
        assert training.processor.last_output.embedding.shape == (1, 6)
        training.validate()
        assert training.processor.last_output.embedding.shape == (2, 6)
        assert training.processor.training
        assert int(training.processor.optimizer_step) == first + 2
        after = training.processor.state_dict()
        assert all(not torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize(
        ("step", "expected"), [(1, [0, 1, 2, 3]), (3, [0, 1, 2, 3]), (5, [2, 3, 4, 5]), (10, [6, 7, 8, 9])]
    )
    def test_windows(self, step: int, expected: list[float]) -> None:
        assert steps_around([float(value) for value in range(10)], step, 4) == expected

    @pytest.mark.parametrize("changes", [{"steps": 5}, {"steps": 10, "window": 11}])
    def test_steps_must_reach_beyond_the_warm_up(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"benchmark\.steps = "):
            self.settings(**changes)
