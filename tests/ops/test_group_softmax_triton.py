"""Run the tests of the group softmax again, with its Triton kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.kernels import INTERPRETED

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(INTERPRETED, reason="this would call itself")
@pytest.mark.parametrize(
    "file", ["test_group_softmax.py", pytest.param("test_group_softmax_fused.py", marks=pytest.mark.slow)]
)
def test_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", f"tests/ops/{file}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
