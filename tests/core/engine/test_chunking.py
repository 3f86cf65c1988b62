"""The number of samples that run at a time, and its halving when memory runs out."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from energy_flow.core.engine import chunking as chunks
from energy_flow.core.engine.chunking import ChunkSizes, is_out_of_memory
from energy_flow.core.engine.tape import Tape
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.rollout import Rollout
from tests.core.ways import assert_same, everything, processor_of, tape
from tests.helpers import Case

CPU = torch.device("cpu")
PLENTY = 2**40
TOLERANCE = 1e-12  # sums in another order
CASE = Case(
    {"width": 4, "spawn.enabled": True, "noise.std": 0.1, "max_steps": 4},
    {"num_layers": 2},
    training=True,
    batch=7,
)


class Memory:
    """Stands in for a device's memory: passes over more than `limit` samples fail, and every chunk is recorded."""

    def __init__(self) -> None:
        self.limit = {"forward": PLENTY, "backward": PLENTY}
        self.fail_at: dict[str, int] = {}  # the pass of this number fails, whatever its size
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.seen: dict[str, list[int]] = {"forward": [], "backward": []}

    def use(self, kind: str, samples: int) -> None:
        self.seen[kind].append(samples)
        assert len(self.seen[kind]) < 300, "it repeats without end"
        if samples > self.limit[kind] or len(self.seen[kind]) == self.fail_at.get(kind):
            raise self.error


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    run, backward = Rollout.run, Tape.backward

    def run_forward(self: Rollout, surface: Tensor, *args: Any) -> Any:
        result = run(self, surface, *args)  # fails late: buffers and records are there already
        memory.use("forward", len(surface))
        return result

    def run_backward(self: Tape, grad_position: Tensor, *args: Any) -> Tensor:
        result = backward(self, grad_position, *args)
        memory.use("backward", len(grad_position))
        return result

    monkeypatch.setattr(Rollout, "run", run_forward)
    monkeypatch.setattr(Tape, "backward", run_backward)
    monkeypatch.setattr(chunks, "free_bytes", lambda device: PLENTY)
    return memory


@contextmanager
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    messages: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.INFO, "energy_flow"):
        yield messages
    messages += [record.getMessage() for record in caplog.records]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def auto(**changes: bool) -> dict[str, Any]:
    return tape(chunk="auto", **changes)


def train(processor: FlowProcessor) -> dict[str, Tensor]:
    return everything(CASE, {}, processor=processor)


@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"compaction": True}], ids=str)
@pytest.mark.parametrize(
    ("forward", "backward", "halvings"),
    [
        (PLENTY, PLENTY, []),
        (4, PLENTY, [(7, 4)]),
        (2, PLENTY, [(7, 4), (4, 2)]),
        (PLENTY, 3, [(7, 4), (4, 2)]),
        (4, 1, [(7, 4), (4, 2), (2, 1)]),
    ],
)
def test_out_of_memory_halves_the_chunk_and_repeats(
    memory: Memory,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, bool],
    forward: int,
    backward: int,
    halvings: list[tuple[int, int]],
) -> None:
    expected = everything(CASE, tape(**changes))
    processor = processor_of(CASE, auto(**changes))
    memory.limit = {"forward": forward, "backward": backward}
    with warnings_of(caplog) as messages:
        assert_same(train(processor), expected, TOLERANCE)
    assert len(messages) == len(halvings)
    for message, (before, after) in zip(messages, halvings, strict=True):
        for part in ("out of memory on cpu", f"{before} samples", f"with {after} ", "rollout.chunk=auto"):
            assert part in message, message
    memory.seen = {"forward": [], "backward": []}
    with warnings_of(caplog) as messages:
        for _ in range(2):
            assert_same(train(processor), expected, TOLERANCE)
    assert messages == [], "it is remembered"
    assert max(memory.seen["forward"]) <= forward
    assert max(memory.seen["backward"]) <= min(forward, backward)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("number", [2, 3])
def test_work_before_a_failure_counts_once(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    expected = everything(CASE, tape())
    processor = processor_of(CASE, tape(chunk="auto"))
    memory.limit["forward"] = 2
    with torch.no_grad():
        processor(CASE.embedding(), CASE.rows())
    memory.seen = {"forward": [], "backward": []}
    memory.fail_at = {kind: number}
    assert_same(train(processor), expected, TOLERANCE)
    assert len(memory.seen[kind]) > number
    assert set(memory.seen["backward"]) <= {1, 2}


def test_a_failed_attempt_is_freed_before_the_next(memory: Memory) -> None:
    """The buffers of the chunk that didn't fit must not stay beside those of the next."""
    processor = processor_of(CASE, auto())
    memory.limit["forward"] = 2
    train(processor)
    small = processor_of(CASE, tape(chunk=2))
    train(small)
    assert processor._engines.tape._pool.nbytes == small._engines.tape._pool.nbytes


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize(("chunk", "shown", "size"), [(4, "4", 4), (None, "null", 7)])
def test_a_chosen_chunk_is_not_changed(
    memory: Memory, caplog: pytest.LogCaptureFixture, kind: str, chunk: int | None, shown: str, size: int
) -> None:
    processor = processor_of(CASE, tape(chunk=chunk))
    memory.limit[kind] = 2
    with warnings_of(caplog) as messages, pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        train(processor)
    assert messages == []
    assert len([samples for samples in memory.seen[kind] if samples > 2]) == 1, "no second attempt"
    [note] = caught.value.__notes__
    assert f"rollout.chunk = {shown}: set rollout.chunk=auto or a number below {size}" in note


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("chunk", ["auto", 1])
def test_one_sample_is_the_smallest_chunk(
    memory: Memory, caplog: pytest.LogCaptureFixture, kind: str, chunk: Any
) -> None:
    processor = processor_of(CASE, tape(chunk=chunk))
    memory.limit[kind] = 0
    with warnings_of(caplog) as messages, pytest.raises(torch.OutOfMemoryError) as caught:
        train(processor)
    assert len(messages) == (3 if chunk == "auto" else 0)  # 7, 4, 2
    [note] = caught.value.__notes__
    assert "one sample at a time doesn't fit" in note
    assert "rollout.recompute=true" in note


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")], ids=str)
@pytest.mark.parametrize("chunk", ["auto", 4, None])
def test_other_errors_pass_through(
    memory: Memory, caplog: pytest.LogCaptureFixture, kind: str, error: Exception, chunk: Any
) -> None:
    processor = processor_of(CASE, tape(chunk=chunk))
    memory.limit[kind], memory.error = 3, error
    with warnings_of(caplog) as messages, pytest.raises(type(error)) as caught:
        train(processor)
    assert caught.value is error
    assert messages == []
    assert not hasattr(error, "__notes__")
    assert len([samples for samples in memory.seen[kind] if samples > 3]) == 1


def test_after_an_error_the_next_batch_is_right(memory: Memory) -> None:
    processor = processor_of(CASE, auto())
    expected = train(processor)
    for kind in ("forward", "backward"):
        memory.limit[kind], memory.error = 3, ValueError("stop")
        with pytest.raises(ValueError, match="stop"):
            train(processor)
        memory.limit[kind] = PLENTY
        assert_same(train(processor), expected, TOLERANCE)


def test_errors_of_failed_allocations_are_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for messages in (
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(messages))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"compaction": True}], ids=str)
@pytest.mark.parametrize("fitting", [1, 3, 8])
def test_auto_starts_from_a_size_that_fits(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, changes: dict[str, bool], fitting: int
) -> None:
    """The buffers fit into the share of the free memory, and use more than half of it."""
    case = dataclasses.replace(CASE, batch=16, model={"num_layers": 2, "hidden_size": 32})
    processor = processor_of(case, tape(chunk=1, **changes))
    everything(case, {}, processor=processor)
    budget = (fitting + 0.9) * processor._engines.tape._pool.nbytes
    monkeypatch.setattr(chunks, "free_bytes", lambda device: int(budget / chunks._SHARE))
    memory.seen = {"forward": [], "backward": []}
    processor = processor_of(case, auto(**changes))
    everything(case, {}, processor=processor)
    assert processor._engines.tape._pool.nbytes <= budget
    largest = max(memory.seen["forward"])
    assert largest <= fitting
    assert fitting == 1 or largest > fitting / 2
    assert max(memory.seen["backward"]) == largest


def test_an_evaluation_does_not_set_the_size_of_training(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning evaluates before it trains; without a tape many more samples fit."""
    budget = 3.9 * everything_held(tape(chunk=1))
    processor = processor_of(CASE, auto())
    left = lambda device: int((budget - processor._engines.tape._pool.nbytes) / chunks._SHARE)  # noqa: E731
    monkeypatch.setattr(chunks, "free_bytes", left)
    with torch.no_grad():
        processor(CASE.embedding(), CASE.rows())
    train(processor)
    assert processor._engines.tape._pool.nbytes <= budget


def everything_held(way: dict[str, Any]) -> int:
    """Bytes of the buffers after a training step."""
    processor = processor_of(CASE, way)
    train(processor)
    return processor._engines.tape._pool.nbytes


def test_buffers_of_the_pool_count_as_available(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's buffers aren't free memory, but the rollout can use them."""
    monkeypatch.setattr(chunks, "free_bytes", lambda device: 0)
    for held, chunk in ((0, 1), (2**26, 7)):
        processor = processor_of(CASE, auto())
        processor._engines.tape._pool.take("held", (held,), torch.uint8, CPU)
        train(processor)
        assert max(memory.seen["forward"]) == chunk


@given(st.integers(1, 70), st.integers(1, 70))
def test_chunks_are_even(batch: int, fitting: int) -> None:
    tried: list[int] = []
    size = 2**60  # of a sample: far more than the machine's free memory
    ChunkSizes("auto").within_memory(
        batch,
        CPU,
        kind="training",
        bytes_per_sample=lambda: size,
        held=lambda: fitting * size,
        release=lambda: None,
        attempt=tried.append,
    )
    [chunk] = tried
    assert 1 <= chunk <= min(batch, fitting)
    parts = -(-batch // chunk)
    assert parts == -(-batch // fitting), "as few as possible"
    assert parts * (chunk - 1) < batch, "and none larger than it needs to be"


def test_a_small_batch_says_nothing_of_a_large_one(memory: Memory) -> None:
    """A first batch of 2 doesn't make later ones of 7 run two at a time."""
    processor = processor_of(CASE, auto())
    with torch.no_grad():
        for batch in (2, 7):
            processor(CASE.embedding()[:batch], CASE.rows()[:batch])
    assert memory.seen["forward"] == [2, 7]


def test_a_container_may_have_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used, details, missing = (tmp_path / name for name in ("limit", "used", "details", "missing"))
    monkeypatch.setattr(chunks, "_CONTAINER", ((missing, used, details), (limit, used, details)))
    used.write_text("300\n")
    details.write_text("anon 200\ninactive_file 30\nactive_file 20\n")
    limit.write_text("1000\n")
    assert chunks.free_bytes(CPU) == 750
    details.write_text("inactive_file 1\ntotal_inactive_file 70\ntotal_active_file 0\n")
    assert chunks.free_bytes(CPU) == 770
    limit.write_text("100\n")
    assert chunks.free_bytes(CPU) == 0
    limit.write_text("max\n")
    assert chunks.free_bytes(CPU) > 2**20
