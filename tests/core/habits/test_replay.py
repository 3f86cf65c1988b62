"""Between forward and backward: values changed, a second backward, random numbers and buffers in replayed chunks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.flow_processor import FlowProcessor
from tests.core.habits.helpers import (
    CASE,
    CHUNKED,
    EVERY,
    GENERIC,
    SEED,
    assert_close,
    assert_right,
    assert_slope_of,
    disturb,
    gradients_of,
    inputs_of,
    plain_results,
    processor_of,
    scalar,
    trained,
)
from tests.core.habits.parts import ENERGY, FEATURES, HIDDEN, OwnCarrier, filled, with_weights_of

every = pytest.mark.parametrize("way", EVERY)
generic = pytest.mark.parametrize("way", GENERIC)


@every
def test_second_backward(way: str) -> None:
    """`retain_graph=True` allows a second backward pass, and a third; all give the same gradients."""
    processor = processor_of(EVERY[way])
    expected = plain_results(processor)
    embedding, rows = inputs_of()
    leaves = {**trained(processor), "input": embedding}
    loss = scalar(processor(embedding, rows))
    for again in (True, True, False):
        found = gradients_of(loss, leaves, again=again)
        assert_close(found, {name: expected[name] for name in leaves})


@every
def test_second_backward_after_another_batch(way: str) -> None:
    """Another batch between two backward passes of the same graph changes nothing."""
    processor = processor_of(EVERY[way])
    embedding, rows = inputs_of()
    loss = scalar(processor(embedding, rows))
    first = gradients_of(loss, trained(processor), again=True)
    other = scalar(processor(2 * embedding.detach(), rows + 1))
    second = gradients_of(loss, trained(processor))
    assert_close(second, first)
    gradients_of(other, trained(processor))


@every
def test_two_losses_of_one_batch(way: str) -> None:
    """Two losses of one forward pass, each with its own backward pass, add up."""
    processor = processor_of(EVERY[way])
    expected = plain_results(processor)
    output = processor(*inputs_of())
    rest = scalar(output) - output.surface.square().sum()
    first = gradients_of(rest, trained(processor), again=True)
    second = gradients_of(output.surface.square().sum(), trained(processor))
    assert_close({name: first[name] + second[name] for name in first}, {name: expected[name] for name in first})


def data_changed(processor: FlowProcessor, rows: Tensor) -> None:
    for parameter in processor.parameters():
        parameter.data.mul_(1.5)


def data_exchanged(processor: FlowProcessor, rows: Tensor) -> None:
    for parameter in processor.parameters():
        parameter.data = parameter.data * 1.5


def rows_changed(processor: FlowProcessor, rows: Tensor) -> None:
    rows.add_(100)


def step_changed(processor: FlowProcessor, rows: Tensor) -> None:
    processor.optimizer_step.add_(1)


def step_set_anew(processor: FlowProcessor, rows: Tensor) -> None:
    processor.optimizer_step = processor.optimizer_step + 1


@pytest.mark.parametrize("way", CHUNKED)
@pytest.mark.parametrize("change", [data_changed, data_exchanged])
def test_weights_changed_before_backward(way: str, change: Callable[[FlowProcessor, Tensor], None]) -> None:
    """Weights changed through `.data`: the flows' gradients are those of the values of the forward pass."""
    processor = processor_of(CHUNKED[way])
    leaves = {name: value for name, value in trained(processor).items() if name.startswith(("neuron.", "carrier."))}
    expected = plain_results(processor)
    maps = {name: value.detach().clone() for name, value in processor.named_parameters() if name not in leaves}
    embedding, rows = inputs_of()
    loss = scalar(processor(embedding, rows))
    change(processor, rows)
    for name, value in maps.items():  # outside of the rollout, plain autograd itself would use the new values
        processor.get_parameter(name).data.copy_(value)
    assert_close(gradients_of(loss, leaves), {name: expected[name] for name in leaves})


@every
@pytest.mark.parametrize("change", [rows_changed, step_changed, step_set_anew])
def test_inputs_changed_before_backward(way: str, change: Callable[[FlowProcessor, Tensor], None]) -> None:
    """Rows or the optimiser step changed: noise and scale of the gradients are those of the forward pass."""
    processor = processor_of(EVERY[way])
    expected = plain_results(processor)
    embedding, rows = inputs_of()
    loss = scalar(processor(embedding, rows))
    change(processor, rows)
    assert_close(gradients_of(loss, trained(processor)), {name: expected[name] for name in trained(processor)})


@generic
def test_own_part_changed_before_backward(way: str) -> None:
    """Weights of a part of one's own, changed by an optimiser: right, or refused by torch."""
    processor = processor_of(GENERIC[way])
    processor.carrier = filled(OwnCarrier())
    right_or_torch_refuses(processor, lambda processor, embedding, output: disturb(processor.carrier))


Change = Callable[[FlowProcessor, Tensor, Any], Any]


def evaluation(processor: FlowProcessor, embedding: Tensor, output: Any) -> None:
    processor.eval()


def carrier_replaced(processor: FlowProcessor, embedding: Tensor, output: Any) -> None:
    processor.carrier = filled(OwnCarrier())


def hook_added(processor: FlowProcessor, embedding: Tensor, output: Any) -> None:
    processor.carrier.energy_head.register_forward_hook(lambda module, inputs, output: 2 * output)


def embedding_changed(processor: FlowProcessor, embedding: Tensor, output: Any) -> None:
    with torch.no_grad():
        embedding.mul_(2)


def surface_changed(processor: FlowProcessor, embedding: Tensor, output: Any) -> None:
    with torch.no_grad():
        output.input_surface.mul_(2)


def weights_changed(processor: FlowProcessor, embedding: Tensor, output: Any) -> None:
    disturb(processor)


@every
@pytest.mark.parametrize(
    "change",
    [evaluation, carrier_replaced, hook_added, embedding_changed, surface_changed, weights_changed],
)
def test_changed_before_backward(way: str, change: Change) -> None:
    """Anything else changed between forward and backward: the gradients of the forward pass, or an error."""
    right_or_torch_refuses(processor_of(EVERY[way]), change)


@generic
@pytest.mark.parametrize("change", [evaluation, carrier_replaced, hook_added])
def test_changed_before_backward_with_dropout(way: str, change: Change) -> None:
    """The same with dropout, which evaluation would switch off."""
    processor = with_carrier(GENERIC[way], DroppingCarrier)
    embedding, rows = inputs_of()
    torch.manual_seed(SEED)
    expected = gradients_of(scalar(processor(embedding, rows)), trained(processor))
    right_or_torch_refuses(processor, change, expected)


def right_or_torch_refuses(processor: FlowProcessor, change: Change, expected: dict[str, Tensor] | None = None) -> None:
    """Gradients of the values of the forward pass, or torch's error about a value that was changed in place.

    Torch refuses a change of all weights always, of the input surface with the tape or in chunks, and of the weights
    of one's own part without chunks.
    """
    leaves = trained(processor)
    expected = plain_results(processor) if expected is None else expected
    embedding, rows = inputs_of()
    torch.manual_seed(SEED)
    output = processor(embedding, rows)
    loss = scalar(output)
    change(processor, embedding, output)
    try:
        found = gradients_of(loss, leaves)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_close(found, {name: expected[name] for name in leaves})


class DroppingCarrier(EnergyCarrier):
    """Dropout on the features."""

    def forward(self, features: Tensor, energy: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        return super().forward(nn.functional.dropout(features, 0.3, self.training), energy, hidden)


class CountingCarrier(EnergyCarrier):
    """Counts its calls and keeps a running mean of its features, in buffers."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mean", torch.zeros(FEATURES), persistent=False)

    def forward(self, features: Tensor, energy: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        output = super().forward(features - self.mean, energy, hidden)
        if self.training:
            self.calls += 1
            self.mean.lerp_(features.detach().mean((0, 1)), 0.1)
        return output


class ReassigningCarrier(CountingCarrier):
    """The same with buffers that are set anew, not changed in place."""

    def forward(self, features: Tensor, energy: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        output = EnergyCarrier.forward(self, features - self.mean, energy, hidden)
        if self.training:
            self.calls = self.calls + 1
            self.mean = torch.lerp(self.mean, features.detach().mean((0, 1)), 0.1)
        return output


def with_carrier(way: dict[str, Any], make: type[EnergyCarrier]) -> FlowProcessor:
    processor = processor_of(way)
    processor.carrier = with_weights_of(make, processor.carrier, FEATURES, ENERGY, HIDDEN, 2).train()
    return processor


@generic
def test_dropout(way: str) -> None:
    """Dropout in a carrier: the backward pass has the masks of the forward pass, also where a chunk runs twice."""
    assert_slope_of(with_carrier(GENERIC[way], DroppingCarrier))


@pytest.mark.parametrize("way", ["auto", "autograd"])
def test_dropout_is_that_of_the_modules(way: str) -> None:
    """Without chunks the masks are drawn in the order in which the modules run."""
    assert_right(with_carrier(GENERIC[way] | {"chunk": None}, DroppingCarrier))


@generic
def test_backward_draws_no_random_numbers(way: str) -> None:
    """A backward pass leaves the random generator where the forward pass left it."""
    processor = with_carrier(GENERIC[way], DroppingCarrier)
    loss = scalar(processor(*inputs_of()))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


@generic
@pytest.mark.parametrize("make", [CountingCarrier, ReassigningCarrier])
def test_buffers_change_once(way: str, make: type[CountingCarrier]) -> None:
    """Buffers that a part changes in its forward pass change once per step and chunk, not again for the backward."""
    processor = with_carrier(GENERIC[way], make)
    carrier = processor.carrier
    assert isinstance(carrier, CountingCarrier)
    loss = scalar(processor(*inputs_of()))
    chunk = GENERIC[way].get("chunk")
    chunks = 1 if chunk in (None, "auto") else -(-CASE.batch // chunk)
    calls, mean = int(carrier.calls), carrier.mean.clone()
    assert calls == CASE.lattice["max_steps"] * chunks
    assert (mean != 0).any()
    loss.backward()
    assert int(carrier.calls) == calls
    assert torch.equal(carrier.mean, mean)


@generic
@pytest.mark.parametrize("make", [CountingCarrier, ReassigningCarrier])
def test_buffers_that_the_result_depends_on(way: str, make: type[CountingCarrier]) -> None:
    """A chunk is replayed with the buffers that it had: the gradients are those of its chunks as batches."""
    processor = with_carrier(GENERIC[way], make)
    carrier = processor.carrier
    assert isinstance(carrier, CountingCarrier)
    chunk = GENERIC[way].get("chunk")
    if chunk in (None, "auto"):
        assert_right(processor)
        return
    embedding, rows = inputs_of()
    found = gradients_of(scalar(processor(embedding, rows)), trained(processor))
    assert_close(found, one_chunk_at_a_time(with_carrier({"engine": "autograd", "chunk": None}, make), chunk))


def one_chunk_at_a_time(processor: FlowProcessor, chunk: int) -> dict[str, Tensor]:
    """Gradients of a batch whose chunks are batches of their own, one after the other."""
    embedding, rows = inputs_of()
    outputs = [
        processor(embedding[start : start + chunk], rows[start : start + chunk])
        for start in range(0, len(embedding), chunk)
    ]
    whole = {name: torch.cat([getattr(output, name) for output in outputs]) for name in ("embedding", "surface")}
    return gradients_of(scalar(type("Output", (), whole)), trained(processor))  # type: ignore[arg-type]


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around(way: str, reentrant: bool) -> None:
    """`torch.utils.checkpoint` around the processor gives the same gradients."""
    processor = processor_of(EVERY[way])
    expected = plain_results(processor)
    embedding, rows = inputs_of()

    def run(value: Tensor) -> tuple[Tensor, Tensor]:
        output = processor(value, rows)
        return output.embedding, output.surface

    values = checkpoint(run, embedding, use_reentrant=reentrant)
    scalar(type("Output", (), {"embedding": values[0], "surface": values[1]})).backward()  # type: ignore[arg-type]
    found = {name: value.grad for name, value in trained(processor).items()} | {"input": embedding.grad}
    assert_close(found, {name: expected[name] for name in found})  # type: ignore[arg-type]
