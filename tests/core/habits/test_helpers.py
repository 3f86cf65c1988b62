"""The checks of this folder find faults: in outputs, in gradients, and in parts that are never called."""

import pytest
import torch
from torch import Tensor, nn

from tests.core.habits.helpers import (
    CASE,
    assert_close,
    assert_slope,
    assert_slope_of,
    disturb,
    gradients_of,
    inputs_of,
    own_results,
    plain_results,
    processor_of,
    scalar,
    trained,
)
from tests.core.habits.plain import plain_forward, plain_parts
from tests.helpers import SMALLEST_MARGIN, reference_of


def test_the_plain_pass_is_the_reference() -> None:
    """The two share no line. Events of both kinds happen, away from thresholds."""
    processor, (embedding, rows) = processor_of({}), inputs_of()
    expected = reference_of(CASE, processor, embedding, rows)
    assert expected.margins.smallest > SMALLEST_MARGIN
    assert all(expected.events[event] > 0 for event in ("projected", "reached_z0", "reflected", "noise"))
    with plain_parts():
        output = plain_forward(processor, embedding, rows)
    found = gradients_of(scalar(output), trained(processor))
    assert_close(
        {"embedding": output.embedding, "surface": output.surface, **found},
        {
            "embedding": expected.embedding,
            "surface": expected.surface,
            **gradients_of(scalar(expected), trained(processor)),  # type: ignore[arg-type]
        },
    )


def test_a_wrong_gradient_is_found() -> None:
    processor = processor_of({"engine": "autograd"})
    expected = plain_results(processor)
    name = "carrier.cells.1.weight_hh"
    with pytest.raises(AssertionError, match="weight_hh"):
        assert_close({**expected, name: expected[name] + 1e-6}, expected)


def test_a_part_that_is_not_called_is_found() -> None:
    expected = plain_results(processor_of({"engine": "autograd"}))
    processor = processor_of({"engine": "autograd"})
    processor.carrier.energy_head.register_forward_hook(lambda module, inputs, output: 1.001 * output)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(expected, plain_results(processor))


def test_stale_weights_are_found() -> None:
    processor = processor_of({"engine": "autograd"})
    before = own_results(processor)
    disturb(processor)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(before, plain_results(processor))


@pytest.mark.parametrize("error", [0.0, 1e-4])
def test_finite_differences_find_a_wrong_gradient(error: float) -> None:
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return weight.pow(3).sum()

    found = [3 * weight.detach() ** 2 + error]
    if error:
        with pytest.raises(AssertionError, match="finite differences"):
            assert_slope(loss, [weight], found)
    else:
        assert_slope(loss, [weight], found)


def test_finite_differences_find_a_cut_graph() -> None:
    class Cut(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value + 0.1 * value.detach()

    processor = processor_of({"engine": "autograd"})
    assert_slope_of(processor)
    processor.map_in = nn.Sequential(processor.map_in, Cut())
    with pytest.raises(AssertionError, match="finite differences"):
        assert_slope_of(processor)
