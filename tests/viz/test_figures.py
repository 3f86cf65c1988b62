"""The figures: every shape, counts, positions, colours and captions."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Path3DCollection

from energy_flow.core.energy_lattice import Landings
from energy_flow.core.history import Trajectories
from energy_flow.viz import (
    group_figure,
    landing_figure,
    population_figure,
    render,
    surface_figure,
    trajectory_figure,
)
from tests.viz.fakes import random_walk

pytestmark = pytest.mark.filterwarnings("error")

SHAPES = [(4, 3, 2, 5), (1, 5, 1, 1), (6, 1, 3, 0)]  # W, H, E, T


def texts(figure: Figure) -> list[str]:
    titles = [axes.get_title() for axes in figure.axes]
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [figure.get_suptitle(), *titles, *written, *legends]


def assert_drawn(figure: Figure) -> None:
    image = render(figure)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10, "an empty page"


def assert_no_overlap(figure: Figure) -> None:
    """Check that titles, axis labels and legends of a rendered figure don't overlap."""
    labels = [
        artist
        for axes in figure.axes
        for artist in (axes.title, axes.xaxis.label, axes.yaxis.label)
        if artist.get_text() and artist.get_visible()
    ]
    boxes = [artist.get_window_extent() for artist in [*labels, *figure.legends, *figure.texts]]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :]), figure.get_suptitle()


@pytest.mark.parametrize(("width", "height", "energy_dim", "num_steps"), SHAPES)
def test_every_figure_draws_every_shape(width: int, height: int, energy_dim: int, num_steps: int) -> None:
    landings, trajectories = random_walk(2, width, height, energy_dim, num_steps, spare=1 if num_steps else 0)
    counts = torch.arange(num_steps + 1)
    by_step = dict.fromkeys(("created", "active", "reached", "removed", "projected"), counts)
    surface = torch.randn(2, width * height, energy_dim)
    for figure in (
        surface_figure(surface, width, height, "Input surface"),
        landing_figure(landings, 1, width, height),
        group_figure(landings, 1, width, height, "bilinear"),
        group_figure(landings, 1, width, height, "nearest"),
        population_figure(by_step),
    ):
        assert_drawn(figure)
        assert_no_overlap(figure)
    assert_drawn(trajectory_figure(trajectories, 1, max_flows=4))


def test_figures_do_not_import_pyplot() -> None:
    code = (
        "import sys; from energy_flow.viz import render, surface_figure; import torch; "
        "render(surface_figure(torch.zeros(4, 1), 2, 2, 't')); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestSurface:
    def test_cells_are_at_their_index(self) -> None:
        surface = torch.zeros(6, 1)
        surface[1 * 3 + 2] = 1.0  # x = 2, y = 1 of a 3 x 2 surface
        axes = surface_figure(surface, 3, 2, "t").axes[0]
        image = axes.images[0]
        pixels = np.asarray(image.get_array())
        assert pixels.shape == (2, 3, 4)
        assert image.origin == "lower"
        red = pixels[..., 0] - pixels[..., 2]
        assert np.unravel_index(red.argmax(), red.shape) == (1, 2)
        assert axes.get_box_aspect() == pytest.approx(2 / 3)
        assert axes.get_ylim() == (-0.5, 1.5)

    def test_zero_is_white_for_any_range(self) -> None:
        surface = torch.tensor([[0.0], [5.0]])
        pixels = np.asarray(surface_figure(surface, 2, 1, "t").axes[0].images[0].get_array())
        assert pixels[0, 0, :3] == pytest.approx([0.97, 0.97, 0.97], abs=0.01)

    def test_first_four_channels_and_the_norm_of_all(self) -> None:
        figure = surface_figure(torch.randn(2, 4, 6), 2, 2, "Output surface")
        assert texts(figure)[:6] == [
            "Output surface, first 4 of 6 channels",
            *(f"channel {index}" for index in range(4)),
            "norm",
        ]

    def test_one_channel_needs_no_norm(self) -> None:
        assert "norm" not in texts(surface_figure(torch.randn(4, 1), 2, 2, "t"))

    def test_bfloat16_and_nonfinite_values(self) -> None:
        surface = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]], dtype=torch.bfloat16)
        assert_drawn(surface_figure(surface, 2, 1, "t"))

    def test_wrong_number_of_cells(self) -> None:
        with pytest.raises(ValueError, match=r"\[5, 1\].*2 \* 2"):
            surface_figure(torch.zeros(5, 1), 2, 2, "t")


def hand_made(energy_dim: int = 1) -> Landings:
    """One sample on a 3 x 2 surface: two flows reach z0, one is projected to zdepth, one slot is empty."""
    return Landings(
        landed=torch.tensor([[True, True, True, False]]),
        projected=torch.tensor([[False, False, True, False]]),
        xy=torch.tensor([[[-1.0, -1.0], [-1.0, -1.0], [1.0, 0.5], [0.0, 0.0]]]),
        plane=torch.tensor([[0, 0, 1, 0]]),
        distance=torch.tensor([[0.0, 0.0, 0.4, 0.0]]),
        steps=torch.full((1, 4), 2),
        energy=torch.ones(1, 4, energy_dim),
    )


class TestLandings:
    def test_counts_per_plane(self) -> None:
        titles = texts(landing_figure(hand_made(), 0, 3, 2))
        assert "z0: 2 landings, 0 projected" in titles
        assert "zdepth: 1 landing, 1 projected" in titles

    def test_places_in_cell_units(self) -> None:
        _, zdepth = landing_figure(hand_made(), 0, 3, 2).axes[:2]
        reached, projected = (np.asarray(marks.get_offsets()) for marks in zdepth.collections)
        assert reached.shape == (0, 2)
        np.testing.assert_allclose(projected, [[2.0, 0.75]], rtol=1e-6)

    def test_an_empty_plane_has_a_note(self) -> None:
        landings = dataclasses.replace(hand_made(), plane=torch.zeros(1, 4, dtype=torch.int64))
        figure = landing_figure(landings, 0, 3, 2)
        assert texts(figure).count("no flow landed here") == 1
        assert_drawn(figure)

    def test_no_landing(self) -> None:
        landings = dataclasses.replace(hand_made(), landed=torch.zeros(1, 4, dtype=torch.bool))
        assert texts(landing_figure(landings, 0, 3, 2)).count("no flow landed here") == 2
        assert "no flow landed" in texts(group_figure(landings, 0, 3, 2, "bilinear"))


class TestGroups:
    def test_members_per_cell_nearest(self) -> None:
        figure = group_figure(hand_made(), 0, 3, 2, "nearest")
        assert "coverage 33%: 2 of 6 cells" in texts(figure)
        members = np.ma.filled(figure.axes[0].images[0].get_array(), 0)
        assert members.tolist() == [[2, 0, 0], [0, 0, 1]]
        heights = [bar.get_height() for bar in figure.axes[1].patches]
        assert heights == [4, 1, 1]

    def test_bilinear_counts_only_cells_with_weight(self) -> None:
        members = np.ma.filled(group_figure(hand_made(), 0, 3, 2, "bilinear").axes[0].images[0].get_array(), 0)
        assert members.tolist() == [[2, 0, 1], [0, 0, 1]]

    def test_histogram_counts_every_cell_once(self) -> None:
        landings, _ = random_walk(1, 30, 2, 1, 4, spare=0)
        crowded = dataclasses.replace(landings, xy=torch.zeros_like(landings.xy))
        for shown in (landings, crowded):
            axes = group_figure(shown, 0, 30, 2, "nearest").axes[1]
            assert sum(bar.get_height() for bar in axes.patches) == 60
            assert len(axes.patches) <= 26


class TestTrajectories:
    def test_counts_by_end(self) -> None:
        landings, trajectories = random_walk(1, 5, 4, 1, 4, spare=3)
        titles = texts(trajectory_figure(trajectories, 0, max_flows=100))
        landed, plane = landings.landed[0], landings.plane[0]
        assert f"ended on z0 ({int((landed & (plane == 0)).sum())})" in titles
        assert f"ended on zdepth ({int((landed & (plane == 1)).sum())})" in titles
        assert f"removed ({int((~landed).sum())})" in titles
        assert titles[0] == "Sample 0: 23 of 23 flows, 4 steps"

    def test_at_most_max_flows_and_the_same_flows_each_time(self) -> None:
        _, trajectories = random_walk(1, 5, 4, 1, 4)
        first, second = (render(trajectory_figure(trajectories, 0, max_flows=3)) for _ in range(2))
        assert texts(trajectory_figure(trajectories, 0, max_flows=3))[0].startswith("Sample 0: 3 of 20 flows")
        assert (first == second).all()

    def test_a_child_starts_at_its_first_position(self) -> None:
        position = torch.zeros(4, 1, 2, 3)
        position[1:, 0, 0, 2] = torch.tensor([0.4, 0.8, 1.0])
        position[2:, 0, 1] = torch.tensor([[0.5, 0.6, 0.7], [0.5, 0.6, 1.0]])
        active = torch.tensor([[[True, False]], [[True, False]], [[True, True]], [[False, False]]])
        trajectories = Trajectories(position, active, torch.zeros(3, 1, 2))
        axes = trajectory_figure(trajectories, 0, max_flows=2).axes[0]
        starts = next(marks for marks in axes.collections if isinstance(marks, Path3DCollection))
        places = {tuple(round(float(value), 3) for value in place) for place in zip(*starts._offsets3d, strict=True)}
        assert places == {(0, 0, 0), (0.5, 0.6, 0.7)}


def test_population_shows_the_last_counts() -> None:
    by_step = {
        "created": torch.tensor([4, 4, 6]),
        "active": torch.tensor([4, 3, 2]),
        "reached": torch.tensor([0, 1, 3]),
        "removed": torch.tensor([0, 0, 1]),
        "projected": torch.tensor([0, 0, 0]),  # without early convergence there is no curve
    }
    figure = population_figure(by_step)
    assert texts(figure)[-4:] == [
        "created (6 at the end)",
        "active (2 at the end)",
        "reached (3 at the end)",
        "removed (1 at the end)",
    ]
    for line, counts in zip(figure.axes[0].lines, list(by_step.values())[:4], strict=True):
        assert line.get_xdata().tolist() == [0, 1, 2]
        assert line.get_ydata().tolist() == counts.tolist()


def test_population_shows_early_ends() -> None:
    counts = torch.tensor([4, 4])
    by_step = dict.fromkeys(("created", "active", "reached", "removed", "projected"), counts)
    assert "projected (4 at the end)" in texts(population_figure(by_step))
