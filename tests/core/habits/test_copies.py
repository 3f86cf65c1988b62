"""Copies of a model, averages of its weights, and several threads with one model."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.local_field import LocalFieldNeuron
from energy_flow.errors import ConfigError
from energy_flow.training.module import EnergyFlowModule
from tests.core.habits.helpers import (
    EVERY,
    GENERIC,
    assert_close,
    assert_right,
    disturb,
    gradients_of,
    inputs_of,
    own_results,
    plain_results,
    processor_of,
    scalar,
    trained,
)
from tests.core.habits.parts import OwnCarrier, filled
from tests.training.test_module import make_loader, make_module, make_trainer

every = pytest.mark.parametrize("way", EVERY)


def pickled(processor: FlowProcessor) -> FlowProcessor:
    return pickle.loads(pickle.dumps(processor))  # noqa: S301  # our own


def saved(processor: FlowProcessor) -> FlowProcessor:
    file = io.BytesIO()
    torch.save(processor, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[FlowProcessor], FlowProcessor]] = [copy.deepcopy, pickled, saved]
copying = pytest.mark.parametrize("make", COPIES)


def halved(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 0.5 * output


@every
@copying
def test_copy(way: str, make: Callable[[FlowProcessor], FlowProcessor]) -> None:
    """A copy of a model that has run gives the same, and has its own weights."""
    processor = processor_of(EVERY[way])
    before = own_results(processor)
    copied = make(processor)
    assert_close(own_results(copied), before, tolerance=0)
    disturb(copied)
    assert_right(copied)
    assert_close(own_results(processor), before, tolerance=0)


@pytest.mark.parametrize("way", GENERIC)
@copying
def test_copy_with_hooks_and_own_parts(way: str, make: Callable[[FlowProcessor], FlowProcessor]) -> None:
    """Hooks and parts of one's own survive a copy, as they do in torch."""
    processor = processor_of(GENERIC[way])
    processor.neuron.network[0].register_forward_hook(halved)
    processor.carrier = filled(OwnCarrier())
    before = own_results(processor)
    copied = make(processor)
    assert_close(own_results(copied), before, tolerance=0)
    assert_right(copied)


@every
def test_copy_between_forward_and_backward(way: str) -> None:
    """A copy made between forward and backward changes nothing, and has no graph."""
    processor = processor_of(EVERY[way])
    expected = plain_results(processor)
    loss = scalar(processor(*inputs_of()))
    copied = copy.deepcopy(processor)
    disturb(copied)
    own_results(copied)
    assert_close(gradients_of(loss, trained(processor)), {name: expected[name] for name in trained(processor)})


AVERAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "use_buffers": {"use_buffers": True},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "ema, use_buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True},
}


def averaged_model(way: str, average: str) -> tuple[FlowProcessor, FlowProcessor, Tensor]:
    """A processor after a few steps, its average over two of them, and its head's weight at the first."""
    processor = processor_of(EVERY[way])
    processor.set_optimizer_step(0)
    start = processor.carrier.energy_head.weight.detach().clone()
    averaged = AveragedModel(processor, **AVERAGES[average])
    averaged.update_parameters(processor)
    disturb(processor)
    processor.set_optimizer_step(3)
    averaged.update_parameters(processor)
    return processor, averaged.module, start


@every
@pytest.mark.parametrize("average", [name for name in AVERAGES if "use_buffers" not in name])
def test_averaged_model(way: str, average: str) -> None:
    """`AveragedModel` averages weights. The step counter, and with it the scale, is the latest one."""
    processor, module, start = averaged_model(way, average)
    middle = (start + processor.carrier.energy_head.weight.detach()) / 2
    torch.testing.assert_close(module.carrier.energy_head.weight.detach(), middle)
    assert int(module.optimizer_step) == 3
    assert float(module.displacement_scale()) == float(processor.displacement_scale())
    assert_right(module)


@every
@pytest.mark.parametrize("average", [name for name in AVERAGES if "use_buffers" in name])
def test_averaged_buffers_are_refused(way: str, average: str) -> None:
    """With `use_buffers=True` the step counter is averaged. Evaluation refuses it, until the counter is set."""
    processor, module, _ = averaged_model(way, average)
    embedding, rows = inputs_of()
    with pytest.raises(ConfigError, match=r"optimizer_step was averaged .*use_buffers=False"):
        module.eval()(embedding, rows)
    module.set_optimizer_step(3)
    module.eval()(embedding, rows)
    assert float(module.displacement_scale()) == float(processor.displacement_scale())


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_averaged_buffers_are_refused_after_any_number_of_steps(num_steps: int) -> None:
    """A copy counts the versions of its tensors anew: no number of steps before it hides the average."""
    processor = processor_of(EVERY["autograd"])
    for step in range(num_steps):
        processor.set_optimizer_step(step)
    averaged = AveragedModel(processor, use_buffers=True)
    embedding, rows = inputs_of()
    for step in range(num_steps, num_steps + 9):
        averaged.update_parameters(processor)
        processor.set_optimizer_step(step)
        averaged.update_parameters(processor)
        with pytest.raises(ConfigError, match="optimizer_step was averaged"):
            averaged.module.eval()(embedding, rows)


class StepsSeen(pl.Callback):
    """Keeps the optimiser steps that the model believes in and those that were taken, in every validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(module, EnergyFlowModule)
        self.seen.append((int(module.processor.optimizer_step), trainer.global_step))


@pytest.mark.parametrize("make", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5)], ids=["mean", "ema"])
def test_weight_averaging_of_lightning(make: Callable[[], WeightAveraging]) -> None:
    """Lightning's averaging callbacks with their defaults: the step counter, and the scale, are as trained."""
    module, steps = make_module(), StepsSeen()
    trainer = make_trainer(make(), steps, max_epochs=2)
    trainer.fit(module, make_loader(24), make_loader(8))
    assert len(steps.seen) == 2
    assert all(believed == taken for believed, taken in steps.seen), steps.seen
    assert int(module.processor.optimizer_step) == trainer.global_step == 6


NUM_THREADS = 8


def in_threads(work: Callable[[int], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The results of 8 threads that start together."""
    found: dict[int, Any] = {}
    barrier = threading.Barrier(NUM_THREADS)

    def run(number: int) -> None:
        barrier.wait()
        try:
            found[number] = work(number)
        except Exception as error:  # noqa: BLE001  # raised again below
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in found.values():
        if isinstance(value, Exception):
            raise value
    return [found[number] for number in range(NUM_THREADS)]


@every
def test_threads_forward(way: str) -> None:
    """8 threads evaluate one model at once: each result is that of a run alone, bit for bit."""
    processor = processor_of(EVERY[way]).eval()
    embeddings = [inputs_of()[0].detach() * (1 + 0.1 * number) for number in range(NUM_THREADS)]

    def work(number: int) -> dict[str, Tensor]:
        with torch.no_grad():
            values = [processor(embeddings[number]) for _ in range(4)]
        return {f"{index}": value.embedding for index, value in enumerate(values)}

    expected = [work(number) for number in range(NUM_THREADS)]
    for actual, alone in zip(in_threads(work), expected, strict=True):
        assert_close(actual, alone, tolerance=0)


@every
def test_threads_forward_and_backward(way: str) -> None:
    """8 threads run forward and backward with one model at once: each gradient is that of a run alone."""
    threads_agree(processor_of(EVERY[way]))


@pytest.mark.parametrize("way", GENERIC)
def test_threads_with_an_own_part(way: str) -> None:
    """The same with a carrier of one's own."""
    processor = processor_of(GENERIC[way])
    processor.carrier = filled(OwnCarrier())
    threads_agree(processor)


@pytest.mark.parametrize("way", GENERIC)
def test_threads_with_a_sensing_neuron(way: str) -> None:
    """The same with a neuron that reads the surface before the first step."""
    processor = processor_of(GENERIC[way])
    sizes = {"energy_dim": 2, "features": 4, "width": 3, "height": 2, "channels": 2}
    processor.neuron = filled(LocalFieldNeuron(**sizes, kernel_size=3, num_layers=2))
    threads_agree(processor)


def threads_agree(processor: FlowProcessor) -> None:
    (embedding, rows), leaves = inputs_of(), trained(processor)

    def work(number: int) -> dict[str, Tensor]:
        found = {}
        for repeat in range(3):
            output = processor(embedding.detach() * (1 + 0.1 * number), rows + number)
            slopes = gradients_of(scalar(output), leaves)
            found |= {f"{repeat} {name}": value for name, value in slopes.items()}
        return found

    expected = [work(number) for number in range(NUM_THREADS)]
    for actual, alone in zip(in_threads(work), expected, strict=True):
        assert_close(actual, alone, tolerance=1e-12)
