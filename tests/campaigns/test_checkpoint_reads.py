"""A run with `resume=auto` opens each checkpoint once, and the counter notices every way to open one."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.campaigns.checkpoint_reads import counted_reads
from tests.cli.helpers import ROOT, environment


def test_every_way_to_open_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "it.ckpt"
    with counted_reads() as counter:
        torch.save({"weight": torch.ones(2)}, path)
        assert counter == {}, "writing is not reading"
        for count, read in enumerate(
            (
                lambda: path.read_bytes(),
                lambda: os.close(os.open(path, os.O_RDONLY)),
                lambda: zipfile.ZipFile(path).close(),
                lambda: torch.load(path, weights_only=True),
                lambda: torch._C.PyTorchFileReader(str(path)),
            ),
            start=1,
        ):
            read()
            assert counter == {"it.ckpt": count}
    path.read_bytes()
    assert counter == {"it.ckpt": 5}, "nothing is counted afterwards"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--corrupt-last",)])
def test_resume_opens_each_checkpoint_once(flags: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.checkpoint_reads", *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    counts = [line for line in done.stdout.splitlines() if ".ckpt: opened" in line]
    read = ["last-1.ckpt", "last.ckpt"] if flags else ["last.ckpt"]
    assert counts == [f"{name}: opened 1 time" for name in ("best.ckpt", *read)], done.stderr
    assert done.returncode == 0
