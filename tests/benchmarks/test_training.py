"""Turns, and the benchmarks of training steps: memory, stability, scaling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from energy_flow.errors import ConfigError
from energy_flow.settings import read
from energy_flow.viz.style import render
from energy_flow_benchmarks import memory, scaling, stability
from energy_flow_benchmarks.findings import Row, find
from energy_flow_benchmarks.memory import MemorySettings, SweepSettings, chunked
from energy_flow_benchmarks.scaling import ScalingSettings
from energy_flow_benchmarks.stability import StabilitySettings, Training, around, looks_at
from energy_flow_benchmarks.turns import measure_in_turns
from energy_flow_benchmarks.workload import Workload
from tests.benchmarks.training import tiny_size

CPU = torch.device("cpu")
TINY = {"lattice": {"width": 4, "height": 3}, "model": {"hidden_size": 8}}


def silent(_: str) -> None:
    pass


class TestTurns:
    def test_variants_take_turns_and_are_freed(self) -> None:
        seen: list[str] = []

        class Built:
            def __init__(self, name: str) -> None:
                self.name = name

            def __call__(self) -> None:
                seen.append(f"run {self.name}")

            def __del__(self) -> None:
                seen.append(f"free {self.name}")

        measured = measure_in_turns(
            {name: lambda name=name: Built(name) for name in "ab"}, CPU, repeats=2, min_seconds=0
        )
        turn = [[f"run {name}", f"run {name}", f"free {name}"] for name in "ab"]
        assert seen == [*turn[0], *turn[1]] * 2
        assert all(one.seconds is not None for one in measured.values())

    def test_memory_is_counted_from_before_a_variant_was_built(self) -> None:
        def large() -> Callable[[], Any]:
            held = torch.ones(2**24)  # 64 MiB
            return lambda: held

        measured = measure_in_turns({"none": lambda: lambda: None, "large": large}, CPU, repeats=2, min_seconds=0)
        none, peak = measured["none"].peak_bytes, measured["large"].peak_bytes
        if none is None or peak is None:
            pytest.skip("the system keeps no high-water mark")
        assert none < 2**23
        assert 2**26 - 2**20 <= peak < 2**26 + 2**23

    @pytest.mark.parametrize("inside", [False, True], ids=["as it is", "behind another error"])
    def test_out_of_memory_is_a_result(self, inside: bool) -> None:
        built = []

        def run() -> None:
            try:
                raise torch.OutOfMemoryError("too much")
            finally:
                if inside:
                    raise RuntimeError("the recording was not ended")

        def build() -> Callable[[], None]:
            built.append(1)
            return run

        measured = measure_in_turns({"it": build, "other": lambda: lambda: None}, CPU, repeats=3, min_seconds=0)
        assert (measured["it"].seconds, measured["it"].peak_bytes) == (None, None)
        assert measured["other"].seconds is not None
        assert len(built) == 1, "no further turns"

    def test_other_errors_are_errors(self) -> None:
        def run() -> None:
            raise RuntimeError("wrong shapes")

        with pytest.raises(RuntimeError, match="wrong shapes"):
            measure_in_turns({"it": lambda: run}, CPU, repeats=1, min_seconds=0)


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

    def test_what_is_found(self) -> None:
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

    def test_variants_are_what_they_are_called(self) -> None:
        sweep = SweepSettings(size="debug", batches=[1, 8], chunk=2)
        assert memory.variants(sweep, 8) == {
            "fast, whole batch": {"recompute": False, "chunk": None},
            "lean, whole batch": {"recompute": True, "chunk": None},
            "fast, in chunks": {"recompute": False, "chunk": 2},
            "lean, in chunks": {"recompute": True, "chunk": 2},
            "fast, chunk auto": {"recompute": False, "chunk": "auto"},
        }

    def test_a_batch_that_does_not_fit_has_a_row_and_a_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = memory.step_of

        def limited(processor: Any, embedding: torch.Tensor, *rest: Any) -> Any:
            if processor.rollout_settings.chunk is None and len(embedding) == 3:
                raise torch.OutOfMemoryError("too much")
            return plain(processor, embedding, *rest)

        monkeypatch.setattr(memory, "step_of", limited)
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

    def test_what_is_found(self) -> None:
        settings = self.settings()
        findings = stability.run(settings, CPU, 1, silent)
        assert looks_at(settings) == [2, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20]
        for case in (stability.STEP, stability.RESIDENT):
            assert [row.size for row in findings.rows if row.case.startswith(case)] == looks_at(settings)
        early, late = (find(findings.rows, stability.STEP, step, "step") for step in (10, 20))
        assert early.ratio == 1
        assert late.ratio == pytest.approx(early.seconds / late.seconds)
        assert find(findings.rows, stability.RESIDENT, 20, "process").peak_bytes > 2**20
        (grid,) = findings.grids
        assert grid.columns[1:] == ("after 5 steps", "after 20 steps")
        figure = stability.picture(findings.rows)
        assert [axes.get_ylim()[0] for axes in figure.axes] == [0, 0]

    def test_cleanup_and_validation_come_in_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert around([float(value) for value in range(10)], step, 4) == expected

    @pytest.mark.parametrize("changes", [{"steps": 5}, {"steps": 10, "window": 11}])
    def test_steps_must_reach_beyond_the_warm_up(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"benchmark\.steps = "):
            self.settings(**changes)
