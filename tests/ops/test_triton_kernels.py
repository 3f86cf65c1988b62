"""Run the tests of Triton kernels again in the interpreter, and test kernels on a device."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from energy_flow.ops.backend import use_triton
from energy_flow.ops.gru_gates import gates_backward, gates_forward, next_hidden
from energy_flow.ops.launch import require_adjacent_columns, resident_programs
from energy_flow.ops.narrow_linear import narrow_linear, narrow_linear_backward
from tests.ops.kernels import INTERPRETED

ROOT = Path(__file__).parents[2]
ALSO_INTERPRETED = [
    pytest.param("ops/test_gru_gates.py", marks=pytest.mark.slow),
    "ops/test_narrow_linear.py",
    "ops/test_prefix_matmul.py",
    "ops/test_triton_kernels.py",
    pytest.param("core/engine/test_compaction_in_halves.py", marks=pytest.mark.slow),
]


@pytest.mark.skipif(INTERPRETED, reason="this would call itself")
@pytest.mark.parametrize("file", ALSO_INTERPRETED)
def test_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", f"tests/{file}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_device_selects_the_kernels() -> None:
    """With the interpreter, kernels also run on a CPU, so its tests do test them."""
    assert use_triton(torch.zeros(1)) == INTERPRETED
    assert not use_triton(torch.zeros(1, device="meta"))


def test_no_kernels_without_triton() -> None:
    code = (
        "import sys, importlib.util; sys.modules['triton'] = None; importlib.util.find_spec = lambda *_: None;"
        "import torch; from energy_flow.ops.backend import use_triton; assert not use_triton(torch.zeros(1))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_other_column_strides_are_refused() -> None:
    require_adjacent_columns(fine=torch.zeros(4, 6)[:, 2:], column=torch.zeros(6, 6)[:, :1].t().t())
    with pytest.raises(ValueError, match="hidden has column stride 2"):
        require_adjacent_columns(hidden=torch.zeros(4, 6)[:, ::2])


def test_resident_programs() -> None:
    """A CPU counts as one multiprocessor. Programs per block are rounded up, but there are no more than tiles."""
    tensor = torch.zeros(1)
    assert [resident_programs(tensor, 9, blocks, 8) for blocks in (1, 2, 3, 8, 9)] == [8, 4, 3, 1, 1]
    assert [resident_programs(tensor, tiles, 1, 8) for tiles in (0, 3, 8, 9)] == [0, 3, 8, 8]


def on_device(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def gates_step() -> tuple[Callable[[], None], list[Tensor]]:
    gates, hidden, grad, out = on_device(300, 256), on_device(300, 64), on_device(300, 64), on_device(300, 64)
    bias, grad_bias = on_device(256, dtype=torch.float32), on_device(256, dtype=torch.float32)

    def step() -> None:
        gates_forward(gates, hidden, bias, out)
        gates_backward(gates, hidden, grad, bias, grad_bias)

    return step, [gates, out, grad, grad_bias]


def narrow_linear_step() -> tuple[Callable[[], None], list[Tensor]]:
    hidden, weight, bias = on_device(300, 64), on_device(5, 64, dtype=torch.float32), on_device(5, dtype=torch.float32)
    out = torch.zeros(300, 5, device="cuda")
    totals = [torch.zeros_like(tensor) for tensor in (hidden, weight, bias)]

    def step() -> None:
        out.copy_(narrow_linear(hidden, weight, bias))
        narrow_linear_backward(out, hidden, weight, *totals)

    return step, [out, *totals]


@pytest.mark.parametrize("make", [gates_step, narrow_linear_step])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_from_a_cuda_graph(make: Callable[[], tuple[Callable[[], None], list[Tensor]]]) -> None:
    """No call waits for the device, and a replay gives the bits of a plain call."""
    step, state = make()
    start = [tensor.clone() for tensor in state]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor, value in zip(state, start, strict=True):
        tensor.copy_(value)
    graph.replay()
    assert not torch.equal(expected[0], start[0])
    for tensor, value in zip(state, expected, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_numbers() -> None:
    size, tail = 512, 8
    num = 2**31 // (4 * size) + 100
    gates = torch.zeros(num, 4 * size, device="cuda", dtype=torch.bfloat16)
    gates[-tail:] = on_device(tail, 4 * size)
    hidden, bias = on_device(num, size), on_device(4 * size, dtype=torch.float32)
    out, expected = torch.full_like(hidden, torch.nan), next_hidden(gates[-tail:], hidden[-tail:], bias)
    gates_forward(gates, hidden, bias, out)
    torch.testing.assert_close(out[-tail:], expected, rtol=0.01, atol=0.01)
    grad = torch.zeros_like(hidden)
    grad[-tail:] = 1
    gates_backward(gates, hidden, grad, bias, torch.zeros_like(bias))
    assert gates[:-tail].count_nonzero() == 0
    assert (gates[-tail:] != 0).float().mean() > 0.9
