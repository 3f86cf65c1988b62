"""The shipped parts on a GPU: the numbers of the CPU, and the same bits in every run where one asks for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.convolution import ReflectPad, planes_to_surface
from energy_flow.core.local_field import read_field
from tests.core.test_parts_against_reference import AGGREGATIONS, CARRIERS, CONV, LOCAL_FIELD, SPAWN
from tests.helpers import Case, assert_near, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def case_of(carrier: str, aggregation: str) -> Case:
    """A lattice of which no part is the default."""
    lattice: dict[str, Any] = {"width": 5, "height": 1, **SPAWN}
    lattice["aggregation"] = {"_target_": f"energy_flow.core.aggregation.{aggregation}"}
    return Case(lattice, {"energy_dim": 2, "neuron": LOCAL_FIELD, "carrier": CARRIERS[carrier], **CONV}, batch=2)


def run(case: Case, device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Embedding, surface and all gradients, on the CPU."""
    processor = case.processor().to(device, dtype)
    embedding = case.embedding().detach().to(device, dtype).requires_grad_()
    output = processor(embedding, case.rows().to(device))
    values = {"embedding": output.embedding.cpu(), "surface": output.surface.cpu()}
    found = gradients(processor, embedding, SimpleNamespace(**values))  # type: ignore[arg-type]
    return {name: value.detach().cpu() for name, value in {**values, **found}.items()}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_gpu_gives_the_numbers_of_the_cpu(carrier: str, aggregation: str) -> None:
    case = case_of(carrier, aggregation)
    actual, expected = run(case, "cuda"), run(case, "cpu")
    for name, value in expected.items():
        assert_near(actual[name], value, 1e-9, name)


def test_deterministic_algorithms_give_the_same_bits_of_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million flows read 30 cells: without a fixed order the sums of their gradients vary in the last bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    generator = torch.Generator("cuda").manual_seed(1)
    plane = torch.randn(1, 3, 3, 4, device="cuda", generator=generator, requires_grad=True)
    xy = 2 * torch.rand(1, 1_000_000, 2, device="cuda", generator=generator) - 1
    cotangent = torch.randn(1, 1_000_000, 3, device="cuda", generator=generator)

    def gradient() -> Tensor:
        field = planes_to_surface(ReflectPad(1)(plane))
        return torch.autograd.grad(read_field(field, xy, 6, 5), plane, cotangent)[0]

    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (gradient() for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_deterministic_algorithms_give_the_same_bits(aggregation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    case = case_of("attention", aggregation)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(case, "cuda", torch.float32) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
