"""Nothing survives the batch: no pooled buffer in outputs, no graph, no growth."""

import copy
import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.core.tensor_pool import TensorPool
from tests.helpers import Case, tensors_of

CPU = torch.device("cpu")
CASE = Case({"spawn.enabled": True, "noise.std": 0.1, "max_steps": 4}, {"num_layers": 2}, training=True)


def run(processor: FlowProcessor, seed: int = 0, batch: int = 3) -> FlowOutput:
    case = dataclasses.replace(CASE, seed=seed, batch=batch)
    return processor(case.embedding().detach(), case.rows() + 100 * seed, record_trajectories=True)


def train(processor: FlowProcessor, seed: int = 0) -> None:
    processor.zero_grad(set_to_none=True)
    run(processor, seed).embedding.square().sum().backward()


class TestTensorPool:
    def test_memory_is_reused(self) -> None:
        pool = TensorPool()
        first = pool.take("a", (2, 3), torch.float32, CPU)
        second = pool.take("a", (2, 3), torch.float32, CPU)
        assert second.data_ptr() == first.data_ptr()
        assert pool.nbytes == 24

    def test_smaller_requests_use_the_same_memory(self) -> None:
        pool = TensorPool()
        large = pool.take("a", (10,), torch.int64, CPU)
        small = pool.take("a", (2, 2), torch.int64, CPU)
        assert small.data_ptr() == large.data_ptr()
        assert small.shape == (2, 2)
        assert pool.nbytes == 80

    def test_it_grows_on_demand(self) -> None:
        pool = TensorPool()
        pool.take("a", (2,), torch.int64, CPU)
        assert pool.take("a", (5,), torch.int64, CPU).shape == (5,)
        assert pool.nbytes == 40

    def test_names_and_dtypes_do_not_share(self) -> None:
        pool = TensorPool()
        buffers = [pool.take(name, (4,), dtype, CPU) for name in "ab" for dtype in (torch.int64, torch.float64)]
        assert len({buffer.data_ptr() for buffer in buffers}) == 4
        for number, buffer in enumerate(buffers):
            buffer.fill_(number)
        assert [int(buffer[0]) for buffer in buffers] == [0, 1, 2, 3]

    def test_trim_keeps_what_the_last_window_needed(self) -> None:
        pool = TensorPool()
        pool.take("a", (100,), torch.int64, CPU)
        pool.take("b", (100,), torch.int64, CPU)
        assert pool.trim() == 0
        pool.take("a", (10,), torch.int64, CPU)
        pool.take("a", (30,), torch.int64, CPU)
        pool.take("a", (20,), torch.int64, CPU)
        assert pool.trim() == 1600 - 240
        assert pool.nbytes == 240
        assert pool.trim() == 240
        assert pool.nbytes == 0

    def test_clear_frees_all_buffers(self) -> None:
        pool = TensorPool()
        first = pool.take("a", (100,), torch.int64, CPU)
        pool.clear()
        assert pool.nbytes == 0
        assert pool.take("a", (50,), torch.int64, CPU).data_ptr() != first.data_ptr()
        assert pool.nbytes == 400

    def test_dependants_are_cleared_before_a_buffer_is_freed(self) -> None:
        pool = TensorPool()
        held: list[int] = []

        class Dependant:
            def clear(self) -> None:
                held.append(pool.nbytes)

        pool.dependants.append(Dependant())
        pool.take("a", (2,), torch.int64, CPU)
        pool.take("a", (1,), torch.int64, CPU)
        assert held == []
        pool.take("a", (5,), torch.int64, CPU)
        assert held == [16]
        pool.trim()
        pool.take("a", (3,), torch.int64, CPU)
        assert held == [16]
        pool.trim()
        assert held == [16, 40]
        pool.clear()
        assert held == [16, 40, 24]

    def test_use_across_inference_mode(self) -> None:
        """Validation runs in inference mode; its buffers must be writable in training."""
        pool = TensorPool()
        with torch.inference_mode():
            pool.take("a", (8,), torch.float32, CPU)
            pool.trim()
            pool.take("a", (4,), torch.float32, CPU)
            assert pool.trim() == 16
        pool.take("a", (4,), torch.float32, CPU).add_(1)


def test_outputs_are_never_overwritten() -> None:
    """The output of a batch is the same after later batches and a clean-up."""
    processor = CASE.processor()
    output = run(processor, 0)
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(output).items()}
    assert len(before) > 30
    for seed in (1, 2):
        later = run(processor, seed)
        train(processor, seed)
    processor.cleanup_memory_safe()
    run(processor, 3)
    for name, tensor in tensors_of(output).items():
        assert torch.equal(tensor, before[name]), name
    assert not torch.equal(later.surface, output.surface)


def test_outputs_of_one_batch_do_not_share_memory_with_the_next() -> None:
    processor = CASE.processor()
    first, second = run(processor, 0), run(processor, 1)

    def addresses(output: FlowOutput) -> dict[int, str]:
        return {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors_of(output).items()}

    shared = addresses(first).keys() & addresses(second).keys()
    assert {addresses(first)[address] for address in shared} == set()


def test_successive_training_steps_with_the_earlier_graph_alive() -> None:
    processor = CASE.processor()
    alone = []
    for seed in (0, 1):
        other = CASE.processor()
        run(other, seed).embedding.sum().backward()
        alone.append([parameter.grad for parameter in other.parameters()])
    outputs = [run(processor, seed) for seed in (0, 1)]
    for output, expected in zip(outputs, alone, strict=True):
        processor.zero_grad(set_to_none=True)
        output.embedding.sum().backward()
        for parameter, gradient in zip(processor.parameters(), expected, strict=True):
            assert parameter.grad is not None
            assert gradient is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-13)


def test_the_batch_size_may_change() -> None:
    processor = CASE.processor()
    for batch in (1, 5, 2, 3):
        output = run(processor, 0, batch)
        torch.testing.assert_close(output.surface, run(CASE.processor(), 0, batch).surface, rtol=0, atol=0)


def test_inference_between_training_steps() -> None:
    processor = CASE.processor()
    with torch.inference_mode():
        run(processor, 0, batch=5)
        processor.cleanup_memory_safe()
        run(processor, 0, batch=4)
        processor.cleanup_memory_safe()  # shrinks the buffers
    train(processor)
    assert all(parameter.grad is not None for parameter in processor.parameters())


class Mark:
    """An object that a graph holds, and that a weak reference can follow."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mark: Mark) -> Tensor:
        ctx.mark = mark
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_no_graph_is_kept() -> None:
    processor = CASE.processor()
    mark = Mark()
    graph = weakref.ref(mark)
    output = processor(Marked.apply(CASE.embedding(), mark), CASE.rows(), record_trajectories=True)
    del mark
    gc.collect()
    assert graph() is not None, "the output's graph holds it"
    assert processor.last_output is not None
    kept = tensors_of(processor.last_output)
    assert kept.keys() == tensors_of(output).keys()
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in kept.values())
    output.embedding.sum().backward()
    del output
    gc.collect()
    assert graph() is None


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def test_nothing_grows() -> None:
    processor = CASE.processor()
    for seed in range(3):
        train(processor, seed)
    after_three = live_tensors()
    for seed in range(3, 12):
        train(processor, seed)
    assert live_tensors() == after_three


def blocks(value: Any) -> dict[int, int]:
    """Bytes of every block of memory that tensors hold, by address; views of one block count once."""
    storages = [tensor.untyped_storage() for tensor in tensors_of(value).values()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def held(output: FlowOutput | None) -> int:
    return sum(blocks(output).values())


def test_clean_up_gives_back_what_the_last_batch_left() -> None:
    processor = CASE.processor()
    assert processor.cleanup_memory_safe() == 0, "nothing has run"
    run(processor, 0, batch=2)
    left = held(processor.last_output)
    assert left > (4 + 1) * 2 * 12 * 3 * 8, "the paths alone: T + 1 places of B x M flows in float64"
    assert processor.cleanup_memory_safe() == left
    assert processor.last_output is None
    run(processor, 0, batch=2)
    assert processor.cleanup_memory_safe() == left, "the same batch leaves the same behind"
    pooled = processor._engines.tape._pool.nbytes
    assert pooled > 2 * 12 * (1 + 8 + 8), "status, steps and age of every slot, and the tape"
    assert processor.cleanup_memory_safe() == pooled, "no batch since then: no buffer was needed"
    assert processor.cleanup_memory_safe() == 0


def test_clean_up_gives_back_the_buffers_of_a_larger_batch() -> None:
    processor = CASE.processor()
    run(processor, 0, batch=9)
    processor.cleanup_memory_safe()
    pooled = processor._engines.tape._pool.nbytes
    run(processor, 0, batch=2)
    left = held(processor.last_output)
    freed = processor.cleanup_memory_safe()
    assert freed - left == pooled - processor._engines.tape._pool.nbytes
    assert freed - left == pytest.approx(pooled * 7 / 9)
    assert torch.equal(run(processor, 1).surface, run(CASE.processor(), 1).surface)


def test_clean_up_frees_the_memory_that_it_counts() -> None:
    """No other tensor holds the blocks that it counts: neither the pool nor a view."""
    processor = CASE.processor()
    run(processor)
    counted = blocks(processor.last_output).keys()
    assert len(counted) > 20
    assert counted <= blocks(plain_tensors()).keys()
    processor.cleanup_memory_safe()
    assert counted & blocks(plain_tensors()).keys() == set()


def plain_tensors() -> list[Tensor]:
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]


def test_a_copy_of_a_model_is_a_model_of_its_own() -> None:
    """Weight averaging copies a model in the middle of a step. The copy has its own weights and no buffers."""
    processor = CASE.processor()
    output = run(processor, 0)
    copied = copy.deepcopy(processor)
    assert copied._engines.tape._pool.nbytes == 0 < processor._engines.tape._pool.nbytes
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(run(copied, 0).surface, output.surface)
    output.embedding.sum().backward()
    assert copied.carrier.energy_head.weight.grad is None
    train(copied)
    assert copied.carrier.energy_head.weight.grad is not None


def test_buffers_are_not_saved() -> None:
    processor = CASE.processor()
    before = set(processor.state_dict())
    run(processor)
    assert (
        set(processor.state_dict()) == before == {name for name, _ in processor.named_parameters()} | {"optimizer_step"}
    )


@pytest.mark.parametrize("step", [0, 7])
def test_the_optimiser_step_travels_with_the_weights(step: int) -> None:
    case = dataclasses.replace(CASE, lattice={**CASE.lattice, "movement.warmup_steps": 10}, optimizer_step=step)
    saved, loaded = case.processor(), dataclasses.replace(case, optimizer_step=3).processor()
    loaded.load_state_dict(saved.state_dict())
    assert float(loaded.displacement_scale()) == pytest.approx((step + 1) / 11)
    assert torch.equal(run(loaded).surface, run(saved).surface)
