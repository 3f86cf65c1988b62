"""The figure of learned paths and true landings."""

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from energy_flow.viz import field_figure
from tests.viz.fakes import random_walk
from tests.viz.test_figures import assert_drawn, assert_no_overlap

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(("width", "height", "num_steps", "max_flows"), [(4, 3, 5, 7), (2, 2, 0, 60), (1, 5, 1, 1)])
def test_every_shape(width: int, height: int, num_steps: int, max_flows: int) -> None:
    _, trajectories = random_walk(2, width, height, 1, num_steps)
    figure = field_figure(trajectories, torch.rand(2, width * height, 2) * 2 - 1, 1, max_flows)
    assert_drawn(figure)
    assert_no_overlap(figure)
    count = min(max_flows, width * height)
    assert figure.get_suptitle().startswith(f"Sample 1: {count} of {width * height} flows")


def test_paths_and_distances() -> None:
    _, trajectories = random_walk(2, 4, 3, 1, 5)
    start, end = trajectories.position[0, 1, :, :2], trajectories.position[-1, 1, :, :2]
    true = end + torch.tensor([0.3, 0.4])
    figure = field_figure(trajectories, torch.stack([true, true]), 1, 12)
    still = (start - true).norm(dim=-1).mean().item()
    assert f"true landings 0.500, without movement {still:.3f}" in figure.get_suptitle()
    straight, paths = (found for found in figure.axes[0].collections if isinstance(found, LineCollection))
    drawn = np.array([path.vertices for path in paths.get_paths()])
    assert drawn.shape == (12, 6, 2)
    expected = trajectories.position[:, 1, :, :2].transpose(0, 1).numpy()
    ours, theirs = (sorted(array.reshape(12, -1).tolist()) for array in (drawn, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    ends = np.array([path.vertices[1] for path in straight.get_paths()])
    np.testing.assert_allclose(sorted(ends.tolist()), sorted(true.tolist()), atol=1e-6)


def test_one_true_landing_per_flow() -> None:
    _, trajectories = random_walk(1, 4, 3, 1, 2, spare=2)
    with pytest.raises(ValueError, match=r"true landings \[12, 2\]: must be one per flow, \[14, 2\]"):
        field_figure(trajectories, torch.zeros(1, 12, 2), 0, 5)
