"""The sensing neuron against the reference: the field, its reading where a flow is, and all gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from energy_flow.core.geometry import cell_centres
from energy_flow.core.local_field import LocalFieldNeuron, read_field
from energy_flow.core.parts import SensingNeuron
from energy_flow.errors import ConfigError
from tests.helpers import assert_near, fill_parameters
from tests.reference_flows import Margins
from tests.reference_parts import neuron_features, sense

DTYPE = torch.float64
CPU = torch.device("cpu")
BATCH, SLOTS, ENERGIES, FEATURES, CHANNELS = 2, 6, 2, 4, 3
SIZES = [(4, 3), (2, 2), (1, 3), (5, 1), (1, 1)]
INSIDE = st.floats(-1, 1, allow_nan=False)


def neuron_of(width: int, height: int, **changes: int) -> LocalFieldNeuron:
    sizes = {"energy_dim": ENERGIES, "features": FEATURES, "channels": CHANNELS, "kernel_size": 3, "num_layers": 2}
    neuron = LocalFieldNeuron(width=width, height=height, **{**sizes, **changes}).double()
    fill_parameters(neuron, seed=1, displacement=1.0)
    return neuron


def inputs(width: int, height: int, slots: int = SLOTS) -> tuple[Tensor, Tensor, Tensor]:
    """Surface [B, S, E], positions [B, M, 3] in [-1, 1] and energies [B, M, E]."""
    surface = torch.randn(BATCH, width * height, ENERGIES, dtype=DTYPE)
    position = 2 * torch.rand(BATCH, slots, 3, dtype=DTYPE) - 1
    return surface, position, torch.randn(BATCH, slots, ENERGIES, dtype=DTYPE)


def run(neuron: LocalFieldNeuron, surface: Tensor, position: Tensor, energy: Tensor) -> Tensor:
    return neuron(position, energy, neuron.sense(surface, {}))


def run_reference(neuron: LocalFieldNeuron, surface: Tensor, position: Tensor, energy: Tensor) -> Tensor:
    margins = Margins()
    samples = []
    for sample in range(BATCH):
        field = sense(neuron, surface[sample])
        flows = zip(position[sample], energy[sample], strict=True)
        samples.append(torch.stack([neuron_features(neuron, place, own, field, margins) for place, own in flows]))
    assert margins.smallest > 1e-5, "no flow is at a cell, where bilinear weights have a kink"
    return torch.stack(samples)


@pytest.mark.parametrize("changes", [{}, {"kernel_size": 5}, {"kernel_size": 1, "num_layers": 1}, {"num_layers": 3}])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_equals_the_reference(width: int, height: int, changes: dict[str, int]) -> None:
    neuron, case = neuron_of(width, height, **changes), inputs(width, height)
    leaves = [*(tensor.requires_grad_() for tensor in case), *neuron.parameters()]
    actual, expected = run(neuron, *case), run_reference(neuron, *case)
    assert_near(actual, expected, 1e-13, "features")
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(actual, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert other.abs().max() > 0
        assert_near(one, other, 1e-12, f"gradient {index}")


@pytest.mark.parametrize(("width", "height"), [(3, 2), (1, 2), (1, 1)])
def test_gradcheck(width: int, height: int) -> None:
    neuron, case = neuron_of(width, height, energy_dim=2, features=2, channels=1), inputs(width, height, slots=2)
    leaves = [*(tensor.requires_grad_() for tensor in case), *neuron.parameters()]
    assert gradcheck(lambda surface, position, energy, *_: run(neuron, surface, position, energy), leaves)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_at_a_centre_one_reads_the_cell(width: int, height: int) -> None:
    field = torch.randn(BATCH, width * height, CHANNELS, dtype=DTYPE)
    centres = cell_centres(width, height, DTYPE, CPU).expand(BATCH, -1, -1)
    assert_near(read_field(field, centres, width, height), field, 1e-14, "reading")


@given(st.lists(st.tuples(INSIDE, INSIDE), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 6))
def test_a_field_of_places_reads_the_place(points: list[tuple[float, float]], width: int, height: int) -> None:
    xy = torch.tensor([points], dtype=DTYPE)
    field = cell_centres(width, height, DTYPE, CPU)[None]
    expected = xy * torch.tensor([width > 1, height > 1])
    assert_near(read_field(field, xy, width, height), expected, 1e-13, "place")


def test_inside_the_reading_is_that_of_grid_sample() -> None:
    field, xy = torch.randn(BATCH, 12, CHANNELS, dtype=DTYPE), 2 * torch.rand(BATCH, SLOTS, 2, dtype=DTYPE) - 1
    leaves = [field.requires_grad_(), xy.requires_grad_()]
    planes = field.transpose(1, 2).unflatten(2, (3, 4))
    expected = torch.nn.functional.grid_sample(planes, xy[:, :, None], align_corners=True)[..., 0].transpose(1, 2)
    actual = read_field(field, xy, 4, 3)
    assert_near(actual, expected, 1e-13, "reading")
    cotangent = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(value, leaves, cotangent) for value in (actual, expected))
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other, 1e-12, "gradient")


def test_the_last_cell_has_a_slope() -> None:
    field = torch.tensor([[[1.0], [4.0], [9.0]]], dtype=DTYPE)
    xy = torch.tensor([[[1.0, 0.0]]], dtype=DTYPE, requires_grad=True)
    reading = read_field(field, xy, 3, 1)
    assert reading.item() == 9
    (slope,) = torch.autograd.grad(reading.sum(), xy)
    assert slope.tolist() == [[[5.0, 0.0]]]


def test_what_a_flow_senses_depends_on_where_it_is() -> None:
    """A far change of the surface isn't sensed, a near one is."""
    neuron, (surface, _, energy) = neuron_of(20, 1), inputs(20, 1)
    position = torch.zeros(BATCH, SLOTS, 3, dtype=DTYPE)
    position[..., 0] = -1
    before = run(neuron, surface, position, energy)
    for cell, near in ((0, True), (3, True), (4, False), (19, False)):  # one cell away, and one per convolution
        changed = surface.clone()
        changed[:, cell] += 1
        assert torch.equal(run(neuron, changed, position, energy), before) != near


def test_samples_do_not_touch() -> None:
    neuron, case = neuron_of(4, 3), inputs(4, 3)
    together = run(neuron, *case)
    for sample in range(BATCH):
        alone = run(neuron, *(tensor[sample : sample + 1] for tensor in case))
        assert_near(alone, together[sample : sample + 1], 1e-14, "alone")


def test_shapes_and_protocol() -> None:
    neuron, (surface, position, energy) = neuron_of(4, 3), inputs(4, 3)
    assert isinstance(neuron, SensingNeuron)
    field = neuron.sense(surface, {})
    assert field.shape == (BATCH, 12, 5 * CHANNELS)
    assert neuron(position, energy, field).shape == (BATCH, SLOTS, FEATURES)
    assert neuron(position[:, :0], energy[:, :0], field).shape == (BATCH, 0, FEATURES)


def test_weights_fit_any_lattice() -> None:
    neuron_of(4, 3).load_state_dict(neuron_of(7, 2).state_dict())


def test_autocast_leaves_places_alone() -> None:
    """Encoder in bfloat16, reading in float32: neighbouring places of a wide lattice stay different."""
    neuron, (surface, _, energy) = neuron_of(500, 1).float(), inputs(500, 1)
    surface, energy = surface.float(), energy.float()
    position = torch.zeros(BATCH, SLOTS, 3)
    position[..., 0] = 0.9 + torch.arange(SLOTS) * 1e-4
    exact = neuron.sense(surface, {})
    with torch.autocast("cpu", torch.bfloat16):
        field = neuron.sense(surface, {})
        features = neuron(position, energy, field)
    assert field.dtype == features.dtype == torch.float32
    assert not torch.equal(field, exact)
    assert_near(field, exact, 0.03, "field")
    assert torch.equal(features, neuron(position, energy, field))
    features.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in neuron.parameters())


@pytest.mark.parametrize(("kernel_size", "remedy"), [(4, "3 or model.neuron.kernel_size=5"), (0, "1 or")])
def test_kernels_have_a_middle(kernel_size: int, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        neuron_of(4, 3, kernel_size=kernel_size)
    assert f"model.neuron.kernel_size = {kernel_size}: " in str(error.value)
    assert f"Set model.neuron.kernel_size={remedy}" in str(error.value)
