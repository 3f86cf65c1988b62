"""Message, checkpoint and exit code after a signal, and after a data worker that fails."""

import gc
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.utils import JobReturn
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch.utils.data import get_worker_info

from energy_flow.data.pairs import PairDataset
from energy_flow.runs import results
from energy_flow.runs.sweep import SweepSummary
from tests.cli.helpers import Program, start, wait_for, write_pairs
from tests.cli.test_interruptions import ActAt, check_resume, interrupted, saved_step, sender


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, Any]]:
    return {}


def test_a_signal_while_a_checkpoint_is_written(program: Program, uninterrupted: Any) -> None:
    outcome = interrupted(program, ActAt("on_save_checkpoint", 4, sender(signal.SIGTERM)))
    assert outcome.code == 143
    assert "terminated at step 4\nto resume from step 4:" in outcome.err
    there = {path.name for path in (program.folder / "interrupted" / "checkpoints").iterdir()}
    assert there == {"last.ckpt", "last-1.ckpt", "best.ckpt"}
    check_resume(program, uninterrupted)


def test_a_signal_during_the_test_and_the_baselines(program: Program) -> None:
    with program.patch.context() as patch:
        patch.setattr(results, "run_baselines", lambda *_, **__: sender(signal.SIGTERM)())
        outcome = program.train("baselines.enabled=true")
    assert outcome.code == 143
    assert "terminated at step 4\nto resume from step 4:" in outcome.err
    assert "ending after this batch" not in outcome.err
    assert outcome.metrics()["test/mrr"] > 0, "the model's own results are there"
    with program.patch.context() as patch:
        patch.setattr(PairDataset, "__getitems__", lambda *_: sender(signal.SIGINT)())
        again = program.train(f"ckpt_path={outcome.folder}/checkpoints/last.ckpt", "data=files")
    assert again.code == 130, "training is over: its test reads rows"
    assert "interrupted at step 4\nto resume from" in again.err
    last = f"ckpt_path={outcome.folder}/checkpoints/last.ckpt"
    assert program.train(last, f"hydra.run.dir={outcome.folder}").metrics()["test/mrr"] > 0
    with program.patch.context() as patch:
        patch.setattr(PairDataset, "__getitems__", lambda *_: sender(signal.SIGTERM)())
        evaluated = program.evaluate(last)
    assert (evaluated.code, evaluated.err.strip()) == (143, "terminated")


def test_slurm_requeues(program: Program, uninterrupted: Any) -> None:
    """Lightning's own handlers run: they save a checkpoint that the next start finds, then `scontrol requeue`."""
    scontrol = program.folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {program.folder}/asked\n')
    scontrol.chmod(0o755)
    names = {"NTASKS": "1", "JOB_ID": "77", "JOB_NAME": "x", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in names.items():
        program.patch.setenv(f"SLURM_{name}", value)
    program.patch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    requeue = ActAt("on_before_backward", 5, sender(signal.SIGUSR1))
    outcome = interrupted(program, requeue, ActAt("on_before_backward", 6, sender(signal.SIGTERM)))
    assert outcome.code == 143
    assert (program.folder / "asked").read_text() == "requeue 77\n"
    saved = program.folder / "interrupted" / "hpc_ckpt_1.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 6, "between two steps"
    for name in names:
        program.patch.delenv(f"SLURM_{name}")
    saved.rename(program.folder / "interrupted" / "checkpoints" / "last.ckpt")
    check_resume(program, uninterrupted)


def in_worker(batch: int, do: Callable[[], Any]) -> Callable[..., Any]:
    """A replacement of `PairDataset.__getitems__`: a worker calls `do` at its batch number `batch`."""
    read, seen = PairDataset.__getitems__, []

    def read_and_do(self: PairDataset, rows: list[int]) -> Any:
        seen.append(0)
        if get_worker_info() is not None and len(seen) == batch:
            do()
        return read(self, rows)

    return read_and_do


def raise_in_worker() -> None:
    raise ValueError("a bad row")


def hang_and_ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        (raise_in_worker, "ValueError: a bad row"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "data.num_workers = 1: a worker was killed from outside"),
        (lambda: time.sleep(1000), "data.timeout = 2: no batch arrived within these seconds."),
        (hang_and_ignore_sigterm, "data.timeout = 2: no batch arrived within these seconds."),
    ],
    ids=["raises", "killed", "hangs", "hangs and ignores SIGTERM"],
)
def test_a_worker_fails(program: Program, uninterrupted: Any, do: Callable[[], Any], expected: str) -> None:
    workers, before = ("data.num_workers=1", "data.timeout=2"), set(psutil.Process().children())
    with program.patch.context() as patch:
        patch.setattr(PairDataset, "__getitems__", in_worker(6, do))
        with pytest.raises((RuntimeError, ValueError)) as caught:
            interrupted(program, overrides=workers)
    message = "\n".join([str(caught.value), *caught.value.__notes__])
    step = saved_step(program.folder)
    assert expected in message
    assert f"to resume from step {step}:\npython -m energy_flow.train" in message
    assert 1 <= step <= 8, "within the first epochs: workers are a few batches ahead"
    assert set(psutil.Process().children()) <= before, "a worker is left behind"
    check_resume(program, uninterrupted)


def test_a_signal_while_a_config_is_composed(program: Program) -> None:
    def composing(*args: Any, **kwargs: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ConfigCompositionException from None

    program.patch.setattr(Hydra, "compose_config", composing)
    outcome = program.train()
    assert (outcome.code, outcome.err) == (143, "terminated\n")


def test_a_run_leaves_nothing_open(program: Program) -> None:
    """A multirun has hundreds of runs in one process."""
    process, used = psutil.Process(), []
    for _ in range(2):
        assert program.train("baselines.enabled=true", "baselines.training.epochs=1").code == 0
        gc.collect()
        used.append((process.num_threads(), process.num_fds(), len(process.children())))
    assert used[0] == used[1]


def test_a_sweep_does_not_keep_configs(program: Program) -> None:
    config = OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "sweep": {"dir": str(program.folder)}}})
    job = JobReturn(cfg=config, hydra_cfg=config)
    SweepSummary().on_job_end(config, job)
    assert job.cfg is None
    assert job.hydra_cfg is None


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job(tmp_path: Path) -> None:
    """Workers that end first are no error then. A worker that fails alone gives exit code 1."""
    write_pairs(tmp_path, {"train": 1600, "val": 32, "test": 32})
    process = start("train", tmp_path, "trainer.max_epochs=60", "data.batch_size=4", "data.num_workers=2")
    wait_for(process, lambda: list(tmp_path.rglob("last.ckpt")))
    workers = psutil.Process(process.pid).children()
    for target in (process, *workers):
        target.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert all(not worker.is_running() for worker in workers)
    command = shlex.split(err.strip().splitlines()[-1])
    process = start("train", tmp_path, *command[3:])
    wait_for(process, lambda: len(psutil.Process(process.pid).children()) >= 2)
    time.sleep(1)
    psutil.Process(process.pid).children()[0].kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "data.num_workers = 2: a worker was killed from outside" in err
    assert err.strip().splitlines()[-2].startswith("to resume from step")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_several_processes(tmp_path: Path, strategy: str) -> None:
    write_pairs(tmp_path, {"train": 1600, "val": 32, "test": 32})
    own = ("trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}", "data.batch_size=4")
    process = start("train", tmp_path, *own, "trainer.max_epochs=60")
    wait_for(process, lambda: list(tmp_path.rglob("last.ckpt")))
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    [last] = tmp_path.rglob("last.ckpt")
    assert f"to resume from step {torch.load(last, weights_only=True)['global_step']}:\n" in err
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


@pytest.mark.slow
def test_runs_that_start_at_once_have_their_own_folders(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    processes = [start("train", tmp_path) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    folders = list((tmp_path / "logs" / "train" / "runs").iterdir())
    assert len(folders) == 3
    assert all((folder / "metrics.json").is_file() for folder in folders)
