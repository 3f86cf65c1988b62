"""Modes of torch: compiled, lower precision, autocast, meta device, quantised, without gradients."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.errors import ConfigError
from tests.core.habits.helpers import (
    EVERY,
    GENERIC,
    assert_close,
    assert_right,
    gradients_of,
    inputs_of,
    own_results,
    plain_results,
    processor_of,
    scalar,
    trained,
)
from tests.core.habits.parts import OwnCarrier, filled
from tests.core.habits.plain import plain_forward, plain_parts
from tests.helpers import DIM, Case
from tests.training.test_module import DIM as MODULE_DIM
from tests.training.test_module import make_module

every = pytest.mark.parametrize("way", EVERY)
# Weak heads: no flow comes near a decision, so rounding can't flip one.
CALM = Case(
    {"max_steps": 2, "depth": 8},
    {"num_layers": 2, "energy_dim": 2, "hidden_size": 16},
    displacement=0.02,
)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SHORT = Case({"noise.std": 0.1, "max_steps": 1}, {"energy_dim": 2}, training=True)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("tape", "eager"),
        pytest.param("tape, chunk 2", "aot_eager", marks=pytest.mark.slow),
        pytest.param("autograd", "aot_eager", marks=pytest.mark.slow),
        pytest.param("autograd, chunk 2", "eager", marks=pytest.mark.slow),
    ],
)
def test_compiled(way: str, backend: str) -> None:
    """`torch.compile(processor)` gives the same outputs and gradients."""
    processor = processor_of(EVERY[way], SHORT)
    expected = plain_results(processor, SHORT)
    compiled = torch.compile(processor, backend=backend)
    for _ in range(2):  # with the second batch nothing is compiled any more
        embedding, rows = inputs_of(SHORT)
        output = compiled(embedding, rows)
        found = gradients_of(scalar(output), {**trained(processor), "input": embedding})
        assert_close(found, {name: expected[name] for name in found})


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_with_an_own_part() -> None:
    """The same with a carrier of one's own, which is compiled in place."""
    processor = processor_of({"chunk": 2})
    processor.carrier = filled(OwnCarrier())
    expected = plain_results(processor)
    processor.carrier.compile(backend="eager")
    assert_close(own_results(processor), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_module(backend: str) -> None:
    """`torch.compile` of the LightningModule gives the same outputs."""
    module = make_module("lattice.depth=2").eval()
    source = torch.nn.functional.normalize(torch.randn(4, MODULE_DIM), dim=-1)
    with torch.no_grad():
        expected = module(source).embedding
        found = torch.compile(module, backend=backend)(source).embedding
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [*EVERY, "auto"])
def test_low_precision(way: str, dtype: torch.dtype) -> None:
    """`bfloat16()` and `half()` modules are refused: positions would lose their cells. The message names autocast."""
    processor = processor_of({**GENERIC, **EVERY}[way], CALM).to(dtype)
    with pytest.raises(ConfigError, match=r"parameters of torch\.\w+: .* trainer\.precision=bf16-mixed"):
        processor(CALM.embedding().detach().to(dtype))
    exact = processor.float()(CALM.embedding().detach().float())
    assert exact.embedding.isfinite().all()


@pytest.mark.parametrize("way", [*EVERY, "auto"])
def test_autocast(way: str) -> None:
    """Under bfloat16 autocast outputs and gradients are near those of float32; positions stay in float32."""
    processor = processor_of({**GENERIC, **EVERY}[way], CALM).float()
    embedding = CALM.embedding().detach().float()
    exact = processor(embedding)
    expected = gradients_of(exact.embedding.sum(), trained(processor))
    with torch.autocast("cpu", torch.bfloat16):
        output = processor(embedding)
        assert output.landings.xy.dtype == torch.float32
        loss = output.embedding.float().sum()
    found = gradients_of(loss, trained(processor))
    near(output.surface, exact.surface, 0.05)
    for name, value in expected.items():
        near(found[name], value, 0.2)  # sums of many terms of both signs
    assert not torch.equal(output.surface, exact.surface), "products were in bfloat16"


@pytest.mark.parametrize("way", GENERIC)
def test_autocast_with_an_own_part(way: str) -> None:
    """The same with a carrier of one's own: a replayed chunk runs under the autocast of the forward pass."""
    found = []
    for settings in ({"engine": "autograd", "chunk": None}, GENERIC[way]):
        processor = processor_of(settings, CALM)
        processor.carrier = filled(CalmCarrier())
        processor.float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = processor(CALM.embedding().detach().float()).surface.square().sum()
        found.append(gradients_of(loss, trained(processor)))
    for name, value in found[0].items():
        near(found[1][name], value, 0.02)


class CalmCarrier(OwnCarrier):
    def forward(self, features: Tensor, energy: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        decision, state = super().forward(features, energy, hidden)
        return torch.cat([decision[..., :-3], 0.02 * decision[..., -3:]], -1), state


def near(actual: Tensor, expected: Tensor, share: float) -> None:
    """Equal up to a share of the largest entry."""
    assert actual.shape == expected.shape
    limit = share * max(1e-3, float(expected.detach().abs().max()))
    assert float((actual.detach() - expected.detach()).abs().max()) <= limit


def on_meta(way: str) -> FlowProcessor:
    processor = processor_of(EVERY[way])
    with torch.device("meta"):
        return FlowProcessor(
            DIM, processor.settings, processor.model, seed=processor.seed, rollout=processor.rollout_settings
        ).double()


def moved_to_meta(way: str) -> FlowProcessor:
    return processor_of(EVERY[way]).to("meta")


@every
@pytest.mark.parametrize("make", [on_meta, moved_to_meta])
def test_meta_device(way: str, make: Callable[[str], FlowProcessor]) -> None:
    """A model on the meta device gives tensors of the right shapes, or words that name the way."""
    processor = make(way)
    embedding = torch.empty(3, DIM, dtype=torch.float64, device="meta")
    try:
        output = processor(embedding, torch.arange(3, device="meta"))
    except ConfigError as error:
        assert "meta" in str(error)  # noqa: PT017  # refused, or right
        return
    assert output.embedding.shape == (3, DIM)
    assert output.surface.shape == (3, 6, 2)
    assert output.embedding.device.type == "meta"


def test_meta_device_and_back() -> None:
    """A model made on the meta device, emptied onto the CPU, with loaded weights, is a model like any other."""
    source = processor_of(GENERIC["auto"])
    processor = on_meta("autograd").to_empty(device="cpu")
    processor.load_state_dict(source.state_dict())
    assert_close(own_results(processor), plain_results(source))


@pytest.mark.parametrize("way", ["auto", "autograd"])
def test_quantised(way: str) -> None:
    """`quantize_dynamic` on all linear layers: the output is near, and the quantised layers are used.

    Its scale is one for the whole batch, so chunks differ from the batch by their rounding.
    """
    processor = processor_of(GENERIC[way], CALM).float().eval()
    embedding = CALM.embedding().detach().float()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        exact = processor(embedding)
        quantised = torch.ao.quantization.quantize_dynamic(processor, {nn.Linear}, dtype=torch.qint8)
        assert not isinstance(quantised.carrier.energy_head, nn.Linear)
        output = quantised(embedding)
        with plain_parts():
            expected = plain_forward(quantised, embedding)
    near(output.embedding, exact.embedding, 0.2)
    near(output.embedding, expected.embedding, 0.02)
    assert not torch.equal(output.surface, exact.surface)


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(way: str, mode: Callable[[], torch.no_grad]) -> None:
    """`no_grad` and `inference_mode` give the same outputs without a graph; training goes on afterwards."""
    processor = processor_of(EVERY[way])
    expected = plain_results(processor)
    embedding, rows = inputs_of()
    with mode():
        output = processor(embedding, rows)
    assert not output.embedding.requires_grad
    assert_close(
        {"embedding": output.embedding, "surface": output.surface}, {k: expected[k] for k in ("embedding", "surface")}
    )
    assert_right(processor)


@pytest.mark.parametrize("way", GENERIC)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_own_part_without_gradients(way: str, mode: Callable[[], torch.no_grad]) -> None:
    """The same with a carrier of one's own."""
    processor = processor_of(GENERIC[way])
    processor.carrier = filled(OwnCarrier())
    embedding, rows = inputs_of()
    with mode():
        output = processor(embedding, rows)
    assert not output.embedding.requires_grad
    assert_close({"surface": output.surface.clone()}, {"surface": plain_results(processor)["surface"]})
    assert_right(processor)


@every
def test_no_grad_inside_a_training_step(way: str) -> None:
    """A pass without gradients between forward and backward of another changes nothing."""
    processor = processor_of(EVERY[way])
    expected = plain_results(processor)
    embedding, rows = inputs_of()
    loss = scalar(processor(embedding, rows))
    with torch.no_grad():
        processor(2 * embedding, rows + 1)
    assert_close(gradients_of(loss, trained(processor)), {name: expected[name] for name in trained(processor)})


@every
def test_evaluation_mode(way: str) -> None:
    """In evaluation there is no noise, and gradients are right as well."""
    assert_right(processor_of(EVERY[way]).eval())


@every
def test_float_after_double(way: str) -> None:
    """A change of dtype between batches is seen at once."""
    processor = processor_of(EVERY[way])
    expected = own_results(processor)
    processor.float()
    embedding, rows = inputs_of()
    single = processor(embedding.float(), rows)
    assert single.embedding.dtype == torch.float32
    assert not torch.equal(single.embedding.double(), expected["embedding"])
    processor.double()
    assert_right(processor)


def test_settings_may_change() -> None:
    """`rollout_settings` are those of the call."""
    processor = processor_of(EVERY["tape"])
    expected = own_results(processor)
    for way in EVERY.values():
        processor.rollout_settings = processor.rollout_settings.model_copy(update=way)
        assert_close(own_results(processor), expected)


def test_the_case_is_calm() -> None:
    """No flow of the low-precision tests reaches a plane."""
    output = processor_of({"engine": "autograd"}, CALM)(CALM.embedding())
    assert bool(output.landings.projected.all())


@pytest.mark.parametrize("way", EVERY)
def test_made_in_inference_mode(way: str) -> None:
    """A model that is made and run in inference mode, whose tensors count no changes."""
    with torch.inference_mode():
        processor = processor_of(EVERY[way], CALM).eval()
        output = processor(CALM.embedding().detach())
    expected = processor_of(EVERY[way], CALM).eval()(CALM.embedding().detach())
    torch.testing.assert_close(output.embedding, expected.embedding.detach(), rtol=0, atol=0)
