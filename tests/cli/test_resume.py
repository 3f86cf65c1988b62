"""A run that was interrupted and resumed ends like an uninterrupted run, bit for bit."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tests.cli.helpers import (
    Outcome,
    Program,
    check_message,
    environment,
    interrupt,
    start,
    wait_for,
    write_pairs,
)

# Everything that has state: noise by optimiser step and row, spawn, a schedule of the movement, warm-up and decay.
BUSY = (
    "trainer.max_epochs=4",
    "lattice.max_steps=3",
    "lattice.noise.std=0.1",
    "lattice.spawn.enabled=true",
    "lattice.spawn.threshold=0.05",
    "lattice.max_flows_per_sample=64",
    "lattice.movement.warmup_steps=3",
    "lattice.movement.decay_steps=20",
    "lattice.movement.final_scale=0.5",
    "optimizer.warmup_steps=3",
)
NOT_COMPARED = ("run_config", "hyper_parameters", "energy_flow")  # these depend on how the run was started


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Paths to the values of two checkpoints that are not equal bit for bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [path]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = dict.fromkeys([*left, *right])
        return [d for k in keys for d in differences(left.get(k), right.get(k), f"{path}/{k}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return [d for i, (a, b) in enumerate(zip(left, right, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    return [] if type(left) is type(right) and left == right else [path]


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    """The contents of a checkpoint, without paths and `NOT_COMPARED`."""
    saved = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    saved = {key: value for key, value in saved.items() if key not in NOT_COMPARED}
    for state in saved["callbacks"].values():
        for key in [key for key in state if key.endswith(("path", "dirpath"))]:
            del state[key]
        if "best_k_models" in state:
            state["best_k_models"] = list(state["best_k_models"].values())
    return saved


def test_differences_are_found() -> None:
    one = {"a": [torch.ones(2), {"b": 1}], "c": 1.0}
    assert differences(one, {"a": [torch.ones(2), {"b": 1}], "c": 1.0}) == []
    assert differences(one, {"a": [torch.ones(2) + 1e-7, {"b": 2}], "c": 1}) == ["/a/0", "/a/1/b", "/c"]
    assert differences(one, {"a": [torch.ones(2)], "c": 1.0, "d": 0}) == ["/a", "/d"]


class StopAt(Callback):
    """Raise an error before a batch."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step = step
        self.error = error

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.fixture
def uninterrupted(program: Program) -> Path:
    """The folder of the uninterrupted run."""
    outcome = program.train(*BUSY)
    assert outcome.code == 0, outcome.err
    return outcome.folder


def stopped(program: Program, step: int, error: BaseException) -> Outcome:
    """Run into the folder "interrupted", and raise an error before the batch after `step`."""
    return program.train(*BUSY, f"hydra.run.dir={program.folder}/interrupted", more_callbacks=[StopAt(step, error)])


def test_the_printed_command_survives_special_characters(program: Program) -> None:
    folder = program.folder / "a=1, b"
    path = f'hydra.run.dir="{folder}"'
    outcome = program.train(*BUSY, path, more_callbacks=[StopAt(6, KeyboardInterrupt())])
    printed = shlex.split(outcome.err.strip().splitlines()[-1])[3:]
    again = program.train(
        *[word for word in printed if word in BUSY or word.startswith(("ckpt_path", "hydra.run.dir"))]
    )
    assert (again.code, again.err) == (0, "")
    assert again.folder == folder


def test_noise_and_seed_change_the_result(program: Program, uninterrupted: Path) -> None:
    """Without this, the comparison of runs would show nothing."""
    other = program.train(*BUSY, "lattice.noise.std=0.11").folder
    assert any(path.startswith("/state_dict") for path in differences(checkpoint(uninterrupted), checkpoint(other)))


def test_resuming_a_finished_run(program: Program, uninterrupted: Path) -> None:
    last, here = uninterrupted / "checkpoints" / "last.ckpt", f"hydra.run.dir={uninterrupted}"
    longer = program.train(*BUSY, "trainer.max_epochs=6", f"ckpt_path={last}", here)
    assert (longer.code, longer.err) == (0, "")
    assert torch.load(last, weights_only=True)["epoch"] == 5
    shorter = program.train(*BUSY, "trainer.max_epochs=2", f"ckpt_path={last}", here)
    assert shorter.code == 1
    check_message(shorter.err)
    assert "max_epochs=2" in shorter.err


def test_the_last_checkpoint_is_of_the_last_epoch(program: Program) -> None:
    """Even if the best checkpoint is older: a killed run loses at most one epoch."""
    folder = program.train("trainer.max_epochs=3", "+callbacks.checkpoint.every_n_epochs=2").folder
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2
    assert torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.slow
def test_killed_and_resumed(program: Program, uninterrupted: Path) -> None:
    last = program.folder / "killed" / "checkpoints" / "last.ckpt"
    process = start("train", program.folder, *BUSY, f"hydra.run.dir={program.folder}/killed")
    wait_for(process, last.exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    outcome = program.train(*BUSY, f"hydra.run.dir={program.folder}/killed", f"ckpt_path={last}")
    assert outcome.code == 0, outcome.err
    assert differences(checkpoint(uninterrupted), checkpoint(outcome.folder)) == []


@pytest.mark.slow
def test_interrupted_and_resumed_by_the_printed_command(tmp_path: Path) -> None:
    write_pairs(tmp_path, {"train": 1600, "val": 32, "test": 32})
    overrides = ("trainer.max_epochs=60", "data.batch_size=4")
    process = start("train", tmp_path, *overrides)
    wait_for(process, lambda: list(tmp_path.rglob("last.ckpt")))
    time.sleep(0.3)  # into the middle of the next epoch
    code, out, err = interrupt(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert "run folder: " in out
    (last,) = tmp_path.rglob("last.ckpt")
    step = torch.load(last, weights_only=True)["global_step"]
    assert f"interrupted at step {step}\nto resume from step {step}:\n" in err
    command = shlex.split(err.strip().splitlines()[-1])
    assert command[:3] == ["python", "-m", "energy_flow.train"]
    words = [word for word in command[1:] if not word.startswith("trainer.max_epochs")]
    done = subprocess.run(
        [sys.executable, *words, f"trainer.max_epochs={step // 400 + 1}"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    after = torch.load(last, weights_only=True)
    assert after["global_step"] == (step // 400 + 1) * 400
    assert len(list((tmp_path / "logs" / "train" / "runs").iterdir())) == 1
