"""Figures of the flows, for TensorBoard and for notebooks."""

from energy_flow.viz.field import field_figure
from energy_flow.viz.landings import group_figure, landing_figure
from energy_flow.viz.population import population_figure
from energy_flow.viz.style import render
from energy_flow.viz.surfaces import surface_figure
from energy_flow.viz.trajectories import trajectory_figure

__all__ = [
    "field_figure",
    "group_figure",
    "landing_figure",
    "population_figure",
    "render",
    "surface_figure",
    "trajectory_figure",
]
