"""Results of a run: files after a failure, messages and examples at the end."""

import gc
import json
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from energy_flow import train
from energy_flow.runs import results
from energy_flow.training.module import EnergyFlowModule
from tests.cli.helpers import Program, check_message, files_of_runs


def test_metrics_are_kept_if_baselines_fail(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(results, "run_baselines", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        program.train("baselines.enabled=true")
    [written] = [path for path in files_of_runs(program.folder) if path.name == "metrics.json"]
    assert json.loads(written.read_text())["test/mrr"] > 0


def test_no_baselines_without_a_test(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "run_baselines", lambda *args, **kwargs: pytest.fail("fitted without a test"))
    outcome = program.train("baselines.enabled=true", "test=false")
    assert outcome.code == 0
    assert "no test: test=false" in outcome.out
    assert set(outcome.metrics()) == {"params", "fit_seconds", "val/mrr"}


def test_ctrl_c_in_the_test_is_an_interruption(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EnergyFlowModule, "test_step", interrupt)
    outcome = program.train()
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_diverging_run_ends_with_a_message(program: Program) -> None:
    outcome = program.train("optimizer.lr=1.0e30", "optimizer.warmup_steps=0", "trainer.max_epochs=3")
    assert outcome.code == 1
    check_message(outcome.err)
    assert "NaN or Inf in the output of" in outcome.err
    assert "lower optimizer.lr" in outcome.err


def test_examples_have_names(program: Program) -> None:
    names = [f"word {i}" for i in range(32)]
    lines = "\n".join(json.dumps({"headword": name}) for name in names)
    (program.folder / "test.jsonl").write_text(lines + "\n")
    outcome = program.train()
    shown = outcome.out.split("nearest targets of the first test rows:\n")[1].splitlines()[:5]
    for row, line in enumerate(shown):
        own, nearest = line.strip().split(": ")
        assert own == names[row]
        assert len(set(nearest.split(", ")) & set(names)) == 3


def test_a_finished_job_is_freed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    build = EnergyFlowModule.from_config

    def build_and_watch(*args: Any) -> EnergyFlowModule:
        module = build(*args)
        alive.append(weakref.ref(module))
        return module

    def collect_and_check() -> None:
        gc.collect()
        assert alive[0]() is None, "the job's module is still held"
        alive.append(alive[0])

    monkeypatch.setattr(EnergyFlowModule, "from_config", build_and_watch)
    monkeypatch.setattr(train, "gc", SimpleNamespace(collect=collect_and_check))
    assert program.train().code == 0
    assert len(alive) == 2


def test_a_single_test_row_is_refused(program: Program) -> None:
    save_file({"source": torch.ones(1, 16), "target": torch.ones(1, 16)}, program.folder / "test.safetensors")
    assert "1 row; retrieval needs at least 2" in program.refused()


def test_a_lattice_without_steps_refuses_several_processes(program: Program) -> None:
    message = program.refused("lattice.max_steps=0", "trainer.strategy=ddp_spawn", "trainer.devices=2")
    assert "lattice.max_steps = 0" in message
    assert "Set trainer.devices=1" in message
