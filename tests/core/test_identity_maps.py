"""Maps that are the identity: surfaces in, surfaces out, and weights that fit any lattice."""

from typing import Any

import pytest
import torch

from energy_flow.core.embedding_mapper import IdentityIn
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.errors import ConfigError
from tests.helpers import fill_parameters, lattice_settings, model_settings


def make_processor(width: int, height: int, energy_dim: int = 1, **lattice: Any) -> FlowProcessor:
    settings = lattice_settings(width=width, height=height, **lattice)
    model = model_settings(maps="identity", energy_dim=energy_dim, residual_energy=True)
    return FlowProcessor(width * height * energy_dim, settings, model, seed=1)


def test_the_embedding_is_the_surface() -> None:
    processor = make_processor(4, 3, energy_dim=2)
    embedding = torch.randn(5, 24)
    before = embedding.clone()
    output = processor(embedding)
    assert torch.equal(output.input_surface, embedding.view(5, 12, 2)), "s * E + e"
    assert torch.equal(output.embedding, output.surface.view(5, 24))
    assert torch.equal(embedding, before), "the batch is left alone"


def test_flows_that_stay_give_the_surface_back() -> None:
    """With weights 0 every flow lands on its own cell, with its own energy."""
    processor = make_processor(4, 3)
    for parameter in processor.carrier.parameters():
        torch.nn.init.zeros_(parameter)
    embedding = torch.randn(2, 12)
    torch.testing.assert_close(processor(embedding).embedding, embedding)


def test_no_parameter_belongs_to_a_cell() -> None:
    small, large = make_processor(4, 3), make_processor(8, 6)
    fill_parameters(small, 3, 1.0)
    large.load_state_dict(small.state_dict())
    assert {name.split(".")[0] for name, _ in small.named_parameters()} == {"neuron", "carrier"}
    # The corners of both lattices are at the same positions: flows with the same energy take the same path from there.
    source_small, source_large = torch.full((1, 12), 0.4), torch.full((1, 48), 0.4)
    with torch.no_grad():
        ends_small, ends_large = small(source_small).landings.xy, large(source_large).landings.xy
    torch.testing.assert_close(ends_small[0, [0, 3, 8, 11]], ends_large[0, [0, 7, 40, 47]])


@pytest.mark.parametrize(
    ("dim", "settings", "model", "message"),
    [
        (7, {}, {}, r"dimension 7 must be surfaces of .* 3 x 2 x 1 = 6 numbers\. Set lattice\.width and"),
        (6, {}, {"energy_dim": 2}, r"dimension 6 must be .* 3 x 2 x 2 = 12 numbers.* model\.maps=learned"),
        (6, {"max_steps": 0}, {}, r"lattice\.max_steps = 0 .*Set lattice\.max_steps=1"),
        (6, {}, {"map_hidden": 4}, r"model\.map_hidden = 4: .*Set model\.map_hidden=null"),
        (6, {}, {"maps": "linear"}, r"model\.maps = 'linear': .*'learned' or 'identity'"),
    ],
)
def test_data_and_settings_that_do_not_fit(
    dim: int, settings: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowProcessor(dim, lattice_settings(**settings), model_settings(**{"maps": "identity", **model}), seed=1)


def test_embeddings_of_another_size_are_refused() -> None:
    """Where the map is an option of its own; `reshape` would mix samples, and then complain about their number."""
    map_in = IdentityIn(6, 1)
    with pytest.raises(ConfigError, match=r"model\.map_in: embeddings of dimension 12 .* = 6 numbers"):
        map_in(torch.zeros(2, 12))
