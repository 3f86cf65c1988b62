"""Start the programs as a user does: in this process with their own command line, or as a subprocess."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file

from energy_flow import train
from energy_flow.check import main as check_main
from energy_flow.encode import main as encode_main
from energy_flow.evaluate import main as evaluate_main
from energy_flow.export import main as export_main
from energy_flow.predict import main as predict_main
from energy_flow.train import main as train_main

ROOT = Path(__file__).parents[2]
DIM = 16
SIZES = {"train": 64, "val": 32, "test": 32}

# The smallest model and run. Figures take seconds and have their own tests.
TINY = {
    "data": "files",
    "lattice.width": "4",
    "lattice.height": "4",
    "lattice.max_steps": "1",
    "model.hidden_size": "8",
    "data.batch_size": "16",
    "trainer.max_epochs": "1",
    "trainer.enable_progress_bar": "false",
    "callbacks.flow_monitor": "null",
    "baselines.enabled": "false",
}
EVALUATE = {
    "data": "files",
    "trainer.enable_progress_bar": "false",
    "baselines.enabled": "false",
}
PREDICT = {"data": "files", "k": "3"}
ENCODE = {"input": "pairs.jsonl", "output": "out.safetensors", "encoder": "stand/in-16"}
MODULES = {
    "train": (train_main, TINY),
    "evaluate": (evaluate_main, EVALUATE),
    "predict": (predict_main, PREDICT),
    "encode": (encode_main, ENCODE),
    "export": (export_main, {"output": "model.onnx"}),
    "check": (check_main, {"data": "files"}),
}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The printed run folder."""
        return Path(self.out.split("run folder: ")[1].split("\n")[0])

    def metrics(self) -> dict[str, float]:
        return read_metrics(self.folder)


def read_metrics(folder: Path) -> dict[str, float]:
    """`metrics.json` of a run folder."""
    return json.loads((folder / "metrics.json").read_text())


def write_pairs(folder: Path, sizes: dict[str, int] | None = None, dim: int = DIM, seed: int = 0) -> None:
    """train, val and test.safetensors: targets are a rotation of their sources, with noise."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    for split, size in (sizes or SIZES).items():
        source = torch.randn(size, dim, generator=generator)
        noise = 0.3 * torch.randn(size, dim, generator=generator)
        save_file({"source": source, "target": source @ rotation + noise}, folder / f"{split}.safetensors")


def words(program: str, folder: Path, overrides: tuple[str, ...]) -> list[str]:
    """The command line of a tiny run on the files of `folder`. `overrides` replace defaults."""
    own = MODULES[program][1]
    splits = {f"data.{split}": str(folder / f"{split}.safetensors") for split in SIZES} if "data" in own else {}
    given = {word.split("=")[0].lstrip("+~") for word in overrides}
    if any(word.startswith("data=") and word != "data=files" for word in overrides):
        splits = {}
    defaults = {**own, **splits, "paths.log_dir": str(folder / "logs")}
    return [*(f"{key}={value}" for key, value in defaults.items() if key not in given), *overrides]


@dataclass(frozen=True)
class Program:
    """The entry points on the files of a folder, started in this process."""

    folder: Path
    capture: pytest.CaptureFixture
    patch: pytest.MonkeyPatch

    def train(self, *overrides: str, multirun: bool = False, more_callbacks: Sequence[Callback] = ()) -> Outcome:
        """Run the training program; `more_callbacks` come after the callbacks of the config."""
        build = train.build_trainer

        def build_with_more(*args: Any, callbacks: list[Callback], **kwargs: Any) -> Any:
            return build(*args, callbacks=[*callbacks, *more_callbacks], **kwargs)

        with self.patch.context() as patch:
            patch.setattr(train, "build_trainer", build_with_more)
            return self._run("train", overrides, multirun=multirun)

    def evaluate(self, *overrides: str) -> Outcome:
        return self._run("evaluate", overrides)

    def predict(self, *overrides: str) -> Outcome:
        return self._run("predict", overrides)

    def encode(self, *overrides: str) -> Outcome:
        return self._run("encode", overrides)

    def export(self, *overrides: str) -> Outcome:
        return self._run("export", overrides)

    def check(self, *overrides: str) -> Outcome:
        return self._run("check", overrides)

    def refused(self, *overrides: str, program: str = "train") -> str:
        """Check that a program ends before any training with a short message; returns the message."""
        before = files_of_runs(self.folder)
        outcome = self._run(program, overrides)
        assert outcome.code == 1, outcome
        check_message(outcome.err)
        assert files_of_runs(self.folder) == before, "something was trained or left behind"
        return outcome.err

    def _run(self, program: str, overrides: tuple[str, ...], *, multirun: bool = False) -> Outcome:
        self.capture.readouterr()
        flags = ["-m"] if multirun else []
        self.patch.setattr(sys, "argv", [program, *flags, *words(program, self.folder, overrides)])
        with _logging_as_it_was(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", hidden)  # as Python does by default
            try:
                MODULES[program][0]()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
        out, err = self.capture.readouterr()
        return Outcome(code, out, err + "".join(f"{warning.message}\n" for warning in warned))


def check_message(err: str) -> None:
    lines = err.strip().splitlines()
    assert 1 <= len(lines) <= 6, err
    assert lines[0].startswith("error: "), err
    assert "Traceback" not in err
    assert len(err) < 1500, err


def files_of_runs(folder: Path) -> set[Path]:
    """All files below logs/, without the config and the log that Hydra writes before a run begins."""
    found = {path for path in (folder / "logs").rglob("*") if path.is_file()}
    return {path for path in found if path.parent.name != ".hydra" and path.suffix != ".log"}


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Restore the handlers and the level of the root logger, because Hydra replaces them."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:], root.level = handlers, level


def environment(**changes: str) -> dict[str, str]:
    """The environment of a subprocess whose configs may name callbacks of the tests."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "ENERGY_FLOW_TRUST": "tests"}
    return {**os.environ, **own, **changes}


def spawn(program: str, folder: Path, *overrides: str, cwd: Path | None = None, check: bool = False) -> Outcome:
    """Run `python -m energy_flow.<program>` on the files of `folder` to its end."""
    return run_alone(program, cwd or folder, words(program, folder, overrides), check=check)


def run_alone(program: str, cwd: Path, arguments: Sequence[str], *, check: bool = False) -> Outcome:
    """Run `python -m energy_flow.<program>` to its end with exactly these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", f"energy_flow.{program}", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


def start(program: str, folder: Path, *overrides: str, prefix: Sequence[str] = ()) -> subprocess.Popen:
    """Start a program behind the command `prefix`, without waiting for it."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", f"energy_flow.{program}", *words(program, folder, overrides)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, condition: Any, seconds: float = 120) -> None:
    """Wait until `condition()` is true. Fail if the process ends first, or after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def interrupt(process: subprocess.Popen) -> tuple[int, str, str]:
    """Press Ctrl-C. Returns exit code, stdout and stderr."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
