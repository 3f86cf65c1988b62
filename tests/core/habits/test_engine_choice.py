"""Each call looks at the parts of now: the tape where it knows them all, else the modules, said once."""

import logging
import re
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.rollout import RolloutSettings
from energy_flow.errors import ConfigError
from energy_flow.settings import read
from tests.core.habits.helpers import EVERY, assert_right, inputs_of, processor_of
from tests.core.habits.parts import (
    ENERGY,
    FEATURES,
    HIDDEN,
    Doubling,
    DoublingCarrier,
    DoublingNeuron,
    HalvedCell,
    LoRA,
    OwnCarrier,
    OwnNeuron,
    Scaled,
    filled,
    with_weights_of,
)

Change = Callable[[FlowProcessor], None]


def replace_carrier(processor: FlowProcessor) -> None:
    processor.carrier = filled(OwnCarrier())


def replace_neuron(processor: FlowProcessor) -> None:
    processor.neuron = filled(OwnNeuron())


def subclass_neuron(processor: FlowProcessor) -> None:
    processor.neuron = with_weights_of(DoublingNeuron, processor.neuron, ENERGY, FEATURES)


def subclass_carrier(processor: FlowProcessor) -> None:
    processor.carrier = with_weights_of(DoublingCarrier, processor.carrier, FEATURES, ENERGY, HIDDEN, 2)


def subclass_cell(processor: FlowProcessor) -> None:
    processor.carrier.cells[1].__class__ = HalvedCell


def wrap_cell(processor: FlowProcessor) -> None:
    processor.carrier.cells[0] = Scaled(processor.carrier.cells[0])


def lora(processor: FlowProcessor) -> None:
    processor.carrier.energy_head = LoRA(processor.carrier.energy_head)


def hook_cell(processor: FlowProcessor) -> None:
    processor.carrier.cells[0].register_forward_hook(lambda module, inputs, output: None)


def pre_hook_neuron(processor: FlowProcessor) -> None:
    processor.neuron.register_forward_pre_hook(lambda module, inputs: None)


def backward_hook_head(processor: FlowProcessor) -> None:
    processor.carrier.displacement_head.register_full_backward_hook(lambda module, grad_in, grad_out: None)


def backward_pre_hook_layer(processor: FlowProcessor) -> None:
    processor.neuron.network[2].register_full_backward_pre_hook(lambda module, grad_out: None)


def prune_head(processor: FlowProcessor) -> None:
    prune.l1_unstructured(processor.carrier.energy_head, "weight", 0.5)


def parametrize_cell(processor: FlowProcessor) -> None:
    parametrizations.weight_norm(processor.carrier.cells[0], "weight_hh")


def patch_forward(processor: FlowProcessor) -> None:
    head = processor.carrier.energy_head
    head.forward = types.MethodType(nn.Linear.forward, head)


def tensor_subclass(processor: FlowProcessor) -> None:
    head = processor.carrier.energy_head
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Doubling))


def activation(processor: FlowProcessor) -> None:
    processor.neuron.network[1] = nn.Tanh()


CHANGES: dict[str, tuple[Change, str]] = {
    "another carrier": (replace_carrier, r"processor\.carrier"),
    "another neuron": (replace_neuron, r"processor\.neuron"),
    "a subclass of the neuron": (subclass_neuron, r"processor\.neuron"),
    "a subclass of the carrier": (subclass_carrier, r"processor\.carrier"),
    "a subclass of a cell": (subclass_cell, r"processor\.carrier\.cells\.1"),
    "a wrapped cell": (wrap_cell, r"processor\.carrier\.cells\.0"),
    "LoRA": (lora, r"processor\.carrier\.energy_head"),
    "forward hook": (hook_cell, r"processor\.carrier\.cells\.0 .*hook"),
    "forward pre-hook": (pre_hook_neuron, r"processor\.neuron .*hook"),
    "backward hook": (backward_hook_head, r"processor\.carrier\.displacement_head .*hook"),
    "backward pre-hook": (backward_pre_hook_layer, r"processor\.neuron\.network\.2 .*hook"),
    "pruned": (prune_head, r"processor\.carrier\.energy_head"),
    "parametrized": (parametrize_cell, r"processor\.carrier\.cells\.0"),
    "patched forward": (patch_forward, r"processor\.carrier\.energy_head"),
    "tensor subclass": (tensor_subclass, r"processor\.carrier\.energy_head"),
    "another activation": (activation, r"processor\.neuron\.network\.1"),
}
changes = pytest.mark.parametrize("change", CHANGES)


@changes
def test_the_tape_refuses(change: str) -> None:
    """`rollout.engine=tape` refuses a part that it doesn't know: it names the part, and the way out."""
    apply, name = CHANGES[change]
    processor = processor_of(EVERY["tape"])
    processor(*inputs_of())
    apply(processor)
    with pytest.raises(ConfigError, match=name) as caught:
        processor(*inputs_of())
    assert "rollout.engine=auto" in str(caught.value)


@changes
def test_leaving_the_tape_is_said_once(change: str, caplog: pytest.LogCaptureFixture) -> None:
    """`rollout.engine=auto` says once which part made it leave the tape."""
    apply, name = CHANGES[change]
    processor = processor_of({})
    with caplog.at_level(logging.INFO, "energy_flow.core"):
        processor(*inputs_of())
        assert not caplog.records, "the shipped parts run on the tape"
        apply(processor)
        for _ in range(3):
            processor(*inputs_of())
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert re.search(name, message), message


def test_a_global_hook_leaves_the_tape(caplog: pytest.LogCaptureFixture) -> None:
    """A hook of all modules makes the tape refuse, and `auto` leave it."""
    processor, strict = processor_of({}), processor_of(EVERY["tape"])
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with caplog.at_level(logging.INFO, "energy_flow.core"):
            processor(*inputs_of())
        assert "hook" in caplog.text
        with pytest.raises(ConfigError, match="hook"):
            strict(*inputs_of())
    finally:
        handle.remove()
    assert_right(strict)


def test_back_on_the_tape() -> None:
    """Once the hook is gone, the tape runs again."""
    processor = processor_of(EVERY["tape"])
    handle = processor.carrier.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ConfigError, match="hook"):
        processor(*inputs_of())
    handle.remove()
    assert_right(processor)


def test_shipped_parts_stay_on_the_tape(caplog: pytest.LogCaptureFixture) -> None:
    """Frozen weights, hooks on maps, new weights and a copy are no reason to leave the tape."""
    processor = processor_of({})
    processor.carrier.requires_grad_(False)
    processor.map_in.register_forward_hook(lambda module, inputs, output: None)
    processor.carrier.energy_head = filled(nn.Linear(HIDDEN, ENERGY))
    with caplog.at_level(logging.INFO, "energy_flow.core"):
        processor(*inputs_of())
    assert not caplog.records


@pytest.mark.parametrize("chunk", ["auto", 2, None])
def test_chunks_of_the_modules(chunk: str | int | None) -> None:
    """`rollout.chunk` is a setting of engine autograd, too."""
    settings = RolloutSettings.automatic().model_dump() | {"engine": "autograd", "chunk": chunk}
    assert read(RolloutSettings, settings, "rollout").chunk == chunk


def test_a_patched_method_leaves_the_tape() -> None:
    """A method of the carrier other than `forward`, patched on the object or on the class, counts as well."""
    processor = processor_of({"engine": "tape"})
    processor.carrier.heads = lambda hidden: hidden[..., :5]
    with pytest.raises(ConfigError, match=r"processor\.carrier has a heads of its own"):
        processor(*inputs_of())


def test_a_class_that_is_patched_leaves_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = processor_of({"engine": "tape"})
    recur = EnergyCarrier.recur
    monkeypatch.setattr(EnergyCarrier, "recur", lambda self, inputs, hidden: recur(self, 2 * inputs, hidden))
    with pytest.raises(ConfigError, match=r"EnergyCarrier\.recur was replaced"):
        processor(*inputs_of())


def test_weights_of_other_sizes_leave_the_tape() -> None:
    """A layer whose weights don't have the sizes that it says."""
    processor = processor_of({"engine": "tape"})
    layer = processor.neuron.network[2]
    layer.weight, layer.bias = nn.Parameter(layer.weight[:2].detach()), nn.Parameter(layer.bias[:2].detach())
    with pytest.raises(ConfigError, match=r"the sizes of processor\.neuron and processor\.carrier don't fit"):
        processor(*inputs_of())


def test_settings_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Settings of the tape have no effect on other parts; the message says so."""
    processor = processor_of({"engine": "auto", "recompute": True})
    replace_carrier(processor)
    processor(*inputs_of())
    assert "rollout.recompute = true has no effect then" in caplog.text
