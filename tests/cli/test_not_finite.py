"""A run with NaN, as a user sees it."""

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from energy_flow.training import module as module_file
from tests.cli.helpers import Program, check_message


def test_the_program_ends_with_a_message(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module_file.weighted
    calls: list[int] = []

    def weighted(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args) * (torch.nan if len(calls) > 2 else 1.0)

    monkeypatch.setattr(module_file, "weighted", weighted)
    outcome = program.train(
        "callbacks.bad_steps.max_bad_steps=2", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"
    )
    assert outcome.code == 1
    errors = outcome.err[outcome.err.index("error: ") :]
    check_message(errors)
    assert "2 steps in a row were skipped (callbacks.bad_steps.max_bad_steps). The first was step 2: NaN in" in errors
    for name in ("checkpoints/before_fault.ckpt", "bad_batch.safetensors"):
        assert str(outcome.folder / name) in errors
        assert (outcome.folder / name).is_file()
    log = (outcome.folder / "train.log").read_text()
    assert len(re.findall(r"WARNING\] step [23] skipped: NaN in the loss \(rows", log)) == 2
    assert len(re.findall(r"rows of a batch of step [23]: \[\d+, ", log)) == 2
    assert load_file(outcome.folder / "bad_batch.safetensors")["source"].shape == (16, 16)


def test_anomaly_mode_names_the_operation(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module_file.weighted

    def root_of_zero(*args: Any) -> Tensor:
        loss = original(*args)
        return loss + 0 * (loss - loss).sqrt()  # 0 * inf in its gradient

    monkeypatch.setattr(module_file, "weighted", root_of_zero)
    outcome = program.train("debug=anomaly")
    assert outcome.code == 1
    assert "error: Function 'SqrtBackward0' returned nan" in outcome.err
    assert "(loss - loss).sqrt()" in outcome.err  # where it was called
