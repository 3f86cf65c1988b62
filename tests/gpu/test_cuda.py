"""Tests that need a CUDA device. Run them with: python -m pytest -m gpu"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from energy_flow.core.engine.compiled import step_kernels
from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.ops.counter_noise import counter_noise
from energy_flow.training.callbacks.bad_steps import StopOnBadSteps
from tests.core.ways import PLAIN
from tests.helpers import Case
from tests.training.test_module import LIVELY, LossCurve, make_loader, make_module
from tests.training.test_step_guard import check_step_guard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# All rules together: children, removals, early ends, noise. The heads are so strong that every event happens.
LIVELY_CASE = Case(
    {
        "width": 6,
        "height": 5,
        "max_steps": 5,
        "noise.std": 0.05,
        "spawn.enabled": True,
        "filter.enabled": True,
        "filter.min_displacement": 0.29,
        "convergence.enabled": True,
    },
    {"energy_dim": 2, "num_layers": 2},
    displacement=0.5,
    seed=3,
    training=True,
    batch=4,
)


def run(processor: FlowProcessor, source: Tensor, cotangent: Tensor) -> tuple[FlowOutput, dict[str, Tensor]]:
    processor.zero_grad()
    output = processor(source, torch.arange(len(source), device=source.device))
    (output.embedding * cotangent).sum().backward()
    return output, {name: p.grad.clone().cpu() for name, p in processor.named_parameters() if p.grad is not None}


@contextmanager
def no_sync() -> Iterator[None]:
    """Raise an error if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_noise_has_the_same_bits_on_both_devices() -> None:
    rows, step = torch.tensor([0, 7, 2**31, 2**32 - 1]), torch.tensor(123456)
    on_cpu = counter_noise(9, step, 3, rows, 1000, torch.float32)
    on_gpu = counter_noise(9, step.cuda(), 3, rows.cuda(), 1000, torch.float32)
    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("num_slots", [1, 37, 1000])
def test_compiled_noise_has_the_same_bits_too(num_slots: int) -> None:
    rows, noise = torch.tensor([0, 7, 2**31, 2**32 - 1]), step_kernels(True, False).counter_noise
    for optimizer_step in (0, 123456):
        for step in range(4):
            now = torch.tensor(optimizer_step)
            expected = counter_noise(9, now, step, rows, num_slots, torch.float32)
            actual = noise(9, now.cuda(), step, rows.cuda(), num_slots, torch.float32)
            assert torch.equal(actual.cpu(), expected), (optimizer_step, step)


@pytest.mark.parametrize("compaction", [False, True])
def test_outputs_and_gradients_are_those_of_the_cpu(compaction: bool) -> None:
    processor = dataclasses.replace(LIVELY_CASE, rollout={"compaction": compaction}).processor()
    source = LIVELY_CASE.embedding().detach()
    cotangent = torch.randn(source.shape, dtype=source.dtype)
    expected, expected_grads = run(processor, source, cotangent)
    actual, grads = run(processor.cuda(), source.cuda(), cotangent.cuda())
    for happened in ("spawned", "removed", "share_projected", "share_z0", "share_zdepth"):
        assert expected.statistics[happened] > 0, happened
    torch.testing.assert_close(actual.embedding.cpu(), expected.embedding, rtol=1e-10, atol=1e-10)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-9, msg=name)


EARLY_CASE = Case(
    {"width": 30, "height": 20, "max_steps": 12, "movement.max_displacement": 0.4, "spawn.enabled": True},
    {"energy_dim": 2, "num_layers": 2, "hidden_size": 64, "features": 14},
    displacement=0.5,
    training=True,
    batch=8,
)


@pytest.mark.parametrize("recompute", [False, True])
def test_ended_flows_are_left_out(recompute: bool) -> None:
    """bfloat16 products leave rows out: forward, backward and in graphs. Each way rounds differently."""
    case, way = dataclasses.replace(EARLY_CASE, seed=1), {"recompute": recompute, "cuda_graph": True}
    source = case.embedding().detach().float().cuda()
    cotangent, rows = torch.randn_like(source), torch.arange(8, device="cuda")
    found = {}
    for name, rollout in {
        "exact": PLAIN,
        "all": {**way, "compaction": False},
        "active": {**way, "compaction": True},
    }.items():
        processor = dataclasses.replace(case, rollout=rollout).processor().float().cuda()
        for _ in range(4):
            processor.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=name != "exact"):
                output = processor(source, rows)
            (output.embedding.float() * cotangent).sum().backward()
        assert output.statistics["active_share"] < 0.6
        found[name] = {name: p.grad.clone() for name, p in processor.named_parameters() if p.grad is not None}
    for name, exact in found["exact"].items():
        of_all, of_active = ((found[way][name] - exact).norm() / exact.norm() for way in ("all", "active"))
        assert of_active < max(0.02, 1.5 * of_all), (name, of_all, of_active)


@pytest.mark.parametrize("compaction", [False, True])
def test_the_host_never_waits_inside_a_rollout(compaction: bool) -> None:
    case = dataclasses.replace(LIVELY_CASE, rollout={"cuda_graph": True, "compaction": compaction})
    processor, source = case.processor().cuda(), case.embedding().detach().cuda()
    cotangent = torch.randn_like(source)
    rows = torch.arange(4, device="cuda")
    for _ in range(3):  # it runs, runs again, and is recorded
        (processor(source, rows).embedding * cotangent).sum().backward()
    with no_sync():
        (processor(source, rows).embedding * cotangent).sum().backward()
    with pytest.raises(RuntimeError), no_sync():
        source.sum().item()  # the guard works


def test_recorded_passes_write_only_to_their_own_memory() -> None:
    """Larger evaluation batches need larger buffers. Then other tensors may get the old buffers."""
    source = dataclasses.replace(LIVELY_CASE, batch=9).embedding().detach().cuda()
    cotangent, rows = torch.randn_like(source), torch.arange(9, device="cuda")
    plain = dataclasses.replace(LIVELY_CASE, rollout=PLAIN).processor().cuda()
    _, expected = run(plain, source[:4], cotangent[:4])
    processor = dataclasses.replace(LIVELY_CASE, rollout={"cuda_graph": True}).processor().cuda()
    for _ in range(3):
        for _ in range(4):
            run(processor, source[:4], cotangent[:4])
        processor.eval()
        with torch.inference_mode():
            for of_batch in (rows, rows, rows, None, None, None, rows):
                processor(source, of_batch)
        with torch.no_grad():
            processor(source, rows)
        processor.train()
        marked = [torch.full((size,), 7, dtype=torch.uint8, device="cuda") for size in (512, 1024, 4096) * 200]
        _, grads = run(processor, source[:4], cotangent[:4])
        assert all((mark == 7).all() for mark in marked)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_deterministic_algorithms_give_the_same_bits(autocast: bool) -> None:
    """This runs in a separate process, because cuBLAS reads its setting once."""
    code = f"""
import faulthandler
faulthandler.dump_traceback_later(180, exit=True)
import torch
from tests.gpu.test_cuda import LIVELY_CASE, run

torch.use_deterministic_algorithms(True)
processor, source = LIVELY_CASE.processor().float().cuda(), LIVELY_CASE.embedding().detach().float().cuda()
first = None
for _ in range(20):
    with torch.autocast("cuda", torch.bfloat16, enabled={autocast}):
        output, grads = run(processor, source, source)
    bits = [output.embedding, output.surface, *grads.values()]
    first = first or [tensor.clone() for tensor in bits]
    assert all(torch.equal(*pair) for pair in zip(first, bits, strict=True))
print(len(processor._engines.tape._graphs), "recorded")
"""
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "1 recorded\n", done.stderr


@pytest.mark.parametrize("waiting", ["Rollout.run", "Tape.backward"])
def test_a_failed_recording_is_an_error_with_a_remedy(waiting: str) -> None:
    """This runs in a separate process, because a failed recording leaves torch in a bad state."""
    code = f"""
import faulthandler
faulthandler.dump_traceback_later(180, exit=True)
import torch
from energy_flow.core.rollout import Rollout
from energy_flow.core.engine.tape import Tape
from tests.gpu.test_cuda import LIVELY_CASE, run

works = {waiting}
def waits(*args):
    result = works(*args)
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()  # nobody may, while something is recorded
    return result

{waiting} = waits
processor, source = LIVELY_CASE.processor().cuda(), LIVELY_CASE.embedding().detach().cuda()
for _ in range(2):
    run(processor, source, source)
print("ran")
run(processor, source, source)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ran\n", done.stderr
    assert "RecordingError: a CUDA graph can't be recorded: " in done.stderr
    assert "Set rollout.cuda_graph=false" in done.stderr


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_mixed_precision_trains(precision: str) -> None:
    curve = LossCurve()
    trainer = make_cuda_trainer(curve, precision=precision, max_epochs=6, gradient_clip_val=1.0)
    trainer.fit(make_module(*LIVELY, "optimizer.lr=1.0e-2"), make_loader(64))
    assert all(torch.tensor(curve.losses).isfinite())
    assert sum(curve.losses[-8:]) < 0.7 * sum(curve.losses[:8])


class NoSync(Callback):
    """From batch 3 to batch 6 the host must not wait for the device, not even between batches."""

    def __init__(self) -> None:
        self.watched = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            torch.cuda.set_sync_debug_mode("error")
        if batch_idx == 6:
            torch.cuda.set_sync_debug_mode("default")
        self.watched += batch_idx in (3, 4, 5)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("bad", [False, True])
def test_the_host_never_waits_in_a_training_loop(precision: str, bad: bool, tmp_path: Path) -> None:
    """This holds for skipped steps too: the host copies their result one step later."""
    batches = [{name: value.cuda() for name, value in batch.items()} for batch in make_loader(64)]
    watch, stop, module = NoSync(), StopOnBadSteps(tmp_path, 3), make_module(*LIVELY)
    if bad:
        batches[5]["target"][0, 0] = torch.nan
    options: dict[str, Any] = {
        "precision": precision,
        "max_epochs": 1,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 2,
    }
    make_cuda_trainer(watch, stop, **options).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert watch.watched == 3
    assert module.guard.skipped == bad
    taken = {float(entry["step"]) for entry in module.optimizers().optimizer.state.values()}
    assert taken == {len(batches) - float(bad)}
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_any_nonfinite_gradient_is_found(value: float) -> None:
    check_step_guard(value, "cuda")


def test_the_search_of_a_gradient_scaler_is_no_fault(tmp_path: Path) -> None:
    module = make_module("optimizer.lr=1.0e-2")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**18)
    plugin = MixedPrecision("16-mixed", "cuda", scaler)
    stop = StopOnBadSteps(tmp_path, 1)
    make_cuda_trainer(stop, plugins=[plugin], max_epochs=1, gradient_clip_val=1.0).fit(module, make_loader(80))
    halved = 18 - int(math.log2(scaler.get_scale()))
    assert 0 < halved < 10
    assert (module.guard.skipped, module.guard.in_row) == (halved, 0)
    assert {float(entry["step"]) for entry in module.optimizers().optimizer.state.values()} == {10.0 - halved}


class Allocated(Callback):
    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.synchronize()
        self.bytes.append(torch.cuda.memory_allocated())


def test_device_memory_after_batch_50_is_memory_after_batch_3() -> None:
    allocated = Allocated()
    make_cuda_trainer(allocated, max_epochs=1).fit(make_module(*LIVELY), make_loader(400))
    assert allocated.bytes[49] == allocated.bytes[2]


def make_cuda_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "gpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options}, callbacks=list(callbacks))
