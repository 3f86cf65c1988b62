"""Maps by convolution against the reference; borders that reflect; images in the order of their channels."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from energy_flow.core.convolution import ReflectPad
from energy_flow.core.maps import ConvMapIn, ConvMapOut
from energy_flow.errors import ConfigError
from tests.helpers import assert_near, fill_parameters
from tests.reference_parts import conv_map_in, conv_map_out

DTYPE = torch.float64
BATCH, CHANNELS, ENERGIES = 3, 3, 2
SIZES = [(4, 3), (2, 5), (1, 3), (1, 1)]
KINDS = {ConvMapIn: conv_map_in, ConvMapOut: conv_map_out}
every_kind = pytest.mark.parametrize("kind", KINDS)


def map_of(kind: type[nn.Module], width: int, height: int, **changes: int | None) -> nn.Module:
    sizes = {
        "embedding_dim": CHANNELS * width * height,
        "energy_dim": ENERGIES,
        "hidden": 4,
        "kernel_size": 3,
        **changes,
    }
    mapper = kind(width=width, height=height, **sizes).double()
    fill_parameters(mapper, seed=1, displacement=1.0)
    return mapper


def input_of(kind: type[nn.Module], width: int, height: int) -> Tensor:
    """An embedding [B, D] of unit length, or a surface [B, S, E]."""
    if kind is ConvMapOut:
        return torch.randn(BATCH, width * height, ENERGIES, dtype=DTYPE)
    return nn.functional.normalize(torch.randn(BATCH, CHANNELS * width * height, dtype=DTYPE), dim=1)


@every_kind
@pytest.mark.parametrize("changes", [{}, {"hidden": None}, {"kernel_size": 5}, {"kernel_size": 1}])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_equals_the_reference(kind: type[nn.Module], width: int, height: int, changes: dict[str, int | None]) -> None:
    mapper, values = map_of(kind, width, height, **changes), input_of(kind, width, height)
    leaves = [values.requires_grad_(), *mapper.parameters()]
    actual, expected = mapper(values), torch.stack([KINDS[kind](mapper, row) for row in values])
    assert_near(actual, expected, 1e-13, "output")
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(actual, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert other.abs().max() > 0
        assert_near(one, other, 1e-12, f"gradient {index}")


@every_kind
def test_gradcheck(kind: type[nn.Module]) -> None:
    mapper, values = map_of(kind, 2, 2, hidden=1), input_of(kind, 2, 2)[:1]
    assert gradcheck(lambda values, *_: mapper(values), [values.requires_grad_(), *mapper.parameters()])


def test_pixels_and_cells() -> None:
    """A kernel of one cell: cell (x, y) reads the pixel (x, y) of every channel, which stand H * W numbers apart."""
    mapper = map_of(ConvMapIn, 4, 3, hidden=None, kernel_size=1)
    with torch.no_grad():
        mapper.network[0][1].weight.zero_()[0, 2] = 1  # energy 0 is channel 2
        mapper.network[0][1].bias.zero_()
        mapper.cell_value.zero_()
    embedding = 0.1 * torch.randn(1, 36, dtype=DTYPE)
    surface = mapper(embedding)
    for y in range(3):
        for x in range(4):
            assert surface[0, y * 4 + x, 0].item() == pytest.approx(math.tanh(6 * embedding[0, 24 + y * 4 + x].item()))


@every_kind
def test_samples_do_not_touch(kind: type[nn.Module]) -> None:
    mapper, values = map_of(kind, 4, 3), input_of(kind, 4, 3)
    together = mapper(values)
    for sample in range(BATCH):
        assert_near(mapper(values[sample : sample + 1]), together[sample : sample + 1], 1e-14, "alone")


def test_there_and_back() -> None:
    surface = map_of(ConvMapIn, 4, 3)(input_of(ConvMapIn, 4, 3))
    assert surface.shape == (BATCH, 12, ENERGIES)
    assert map_of(ConvMapOut, 4, 3)(surface).shape == (BATCH, CHANNELS * 12)


@every_kind
def test_autocast(kind: type[nn.Module]) -> None:
    mapper, values = map_of(kind, 4, 3).float(), input_of(kind, 4, 3).float()
    exact = mapper(values)
    with torch.autocast("cpu", torch.bfloat16):
        output = mapper(values)
    assert not torch.equal(output.float(), exact)
    assert_near(output, exact, 0.03, "output under autocast")
    output.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in mapper.parameters())


@every_kind
def test_the_embedding_must_be_an_image(kind: type[nn.Module]) -> None:
    with pytest.raises(ConfigError) as error:
        kind(embedding_dim=768, width=20, height=20, energy_dim=1, kernel_size=3)
    assert str(error.value) == (
        "lattice.width x lattice.height = 20 x 20 = 400: a map by convolution reads an embedding as an image with one "
        "pixel per cell, so its 768 numbers must be a multiple of 400. Set lattice.width and lattice.height to the "
        "size of the images, or set model/map_in=linear and model/map_out=linear"
    )


@pytest.mark.parametrize(("kind", "key"), [(ConvMapIn, "model.map_in"), (ConvMapOut, "model.map_out")])
def test_kernels_have_a_middle(kind: type[nn.Module], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        map_of(kind, 4, 3, kernel_size=2)
    assert str(error.value) == (
        f"{key}.kernel_size = 2: a kernel has a cell in its middle, so its width must be odd and at least 1. Set "
        f"{key}.kernel_size=1 or {key}.kernel_size=3"
    )


@pytest.mark.parametrize(("width", "height", "cells"), [(4, 3, 1), (4, 3, 2), (2, 5, 1)])
def test_borders_reflect_as_torch_does(width: int, height: int, cells: int) -> None:
    planes = torch.randn(BATCH, CHANNELS, height, width)
    assert torch.equal(ReflectPad(cells)(planes), nn.functional.pad(planes, [cells] * 4, mode="reflect"))


def test_borders_of_any_size_reflect() -> None:
    assert ReflectPad(3)(torch.tensor([[[[1, 2]]]]))[0, 0].tolist() == [[2, 1, 2, 1, 2, 1, 2, 1]] * 7
