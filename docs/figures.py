"""Draw the pictures of the concepts: `python docs/figures.py` writes docs/_static/*.svg."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle
from numpy.typing import NDArray

STATIC = Path(__file__).parent / "_static"
Z0, ZDEPTH, MIDDLE, INK = "#0072B2", "#D55E00", "#555555", "#222222"
ENERGIES = plt.get_cmap("PuOr")
CELLS = 5


def project(x: float, y: float, z: float) -> tuple[float, float]:
    """Lattice coordinates in [-1, 1] to the page: z to the right, x into the page, y up."""
    return 4.9 + 1.9 * z + 0.42 * x, 1.85 + 1.05 * y + 0.36 * x


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=13, color=INK, lw=1.3)
    )


def strip(axes: Axes, x: float, numbers: NDArray, title: str) -> None:
    """An embedding: numbers above each other."""
    height = 2.6 / len(numbers)
    for index, value in enumerate(numbers):
        box = Rectangle((x, 0.55 + index * height), 0.26, height, facecolor=ENERGIES(value), edgecolor="white", lw=0.6)
        axes.add_patch(box)
    axes.text(x + 0.13, 0.36, title, ha="center", va="top", fontsize=9.5, color=INK)


def plane(axes: Axes, z: float, values: NDArray, colour: str, alpha: float) -> None:
    """A plane of the lattice, cell by cell."""
    edges = np.linspace(-1, 1, CELLS + 1)
    for i in range(CELLS):
        for j in range(CELLS):
            corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            points = [project(edges[a], edges[b], z) for a, b in corners]
            axes.add_patch(
                Polygon(points, facecolor=ENERGIES(values[i, j]), edgecolor=colour, lw=0.7, alpha=alpha, zorder=2)
            )


def paths(rng: np.random.Generator) -> list[NDArray]:
    """Flows from the middle plane to an end, x and y reflected at the sides."""
    centres = (np.arange(CELLS) + 0.5) * 2 / CELLS - 1
    found = []
    for number, cell in enumerate(rng.permutation(CELLS * CELLS)[:14]):
        place = np.array([centres[cell % CELLS], centres[cell // CELLS], 0.0])
        path, side = [place], 1 if number % 2 else -1
        while abs(path[-1][2]) < 1:
            moved = path[-1] + rng.normal(0, [0.16, 0.16, 0.05]) + [0, 0, side * 0.3]
            moved[:2] = 1 - np.abs((moved[:2] + 1) % 4 - 2)
            if abs(moved[2]) >= 1:
                moved[2] = side
            path.append(moved)
        found.append(np.array(path))
    return found


def lattice(axes: Axes, rng: np.random.Generator) -> None:
    surface = rng.uniform(0.05, 0.95, (CELLS, CELLS))
    for z in (-1, 1):
        plane(axes, z, np.full((CELLS, CELLS), 0.5), Z0 if z < 0 else ZDEPTH, 0.75)
    plane(axes, 0, surface, MIDDLE, 0.95)
    for x in (-1, 1):
        for y in (-1, 1):
            ends = np.array([project(x, y, z) for z in (-1, 1)])
            axes.plot(*ends.T, color="#999999", lw=0.8, ls=":", zorder=1)
    for path in paths(rng):
        points = np.array([project(*place) for place in path])
        colour = ZDEPTH if path[-1][2] > 0 else Z0
        axes.plot(*points.T, color=colour, lw=1.4, zorder=3)
        axes.plot(*points[0], "o", color=INK, ms=3, zorder=4)
        axes.plot(*points[-1], "o", color=colour, ms=6, mec="white", zorder=4)
    for z, title in ((-1, "output plane z0\nz = -1"), (0, "input plane\nz = 0"), (1, "output plane zdepth\nz = +1")):
        x, y = project(-0.2, -1, z)
        axes.text(x, y - 0.38, title, ha="center", va="top", fontsize=9.5, color=INK)


def overview() -> Figure:
    rng = np.random.default_rng(4)
    figure = Figure(figsize=(10.6, 4.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, 10.5), ylim=(-0.15, 3.9), aspect="equal")
    axes.axis("off")
    strip(axes, 0.35, rng.uniform(0.05, 0.95, 13), "input\nembedding")
    lattice(axes, rng)
    strip(axes, 9.9, rng.uniform(0.05, 0.95, 13), "output\nembedding")
    arrow(axes, (0.72, 2.9), project(0.1, 1.08, 0), bend=-0.22)
    axes.text(2.0, 3.72, "map in: one energy per cell, one flow per cell", ha="left", fontsize=9.5, color=INK)
    output = rng.uniform(0.05, 0.95, (CELLS, CELLS))
    for i in range(CELLS):
        for j in range(CELLS):
            corner = (7.95 + i * 0.24, 1.25 + j * 0.24)
            axes.add_patch(Rectangle(corner, 0.24, 0.24, facecolor=ENERGIES(output[i, j]), edgecolor="white", lw=0.7))
    axes.text(8.55, 1.05, "output surface", ha="center", va="top", fontsize=9.5, color=INK)
    arrow(axes, project(0.9, 1.05, -1), (8.55, 2.55), bend=-0.2)
    arrow(axes, (7.35, 1.85), (7.88, 1.85))
    arrow(axes, (9.2, 1.85), (9.83, 1.85))
    axes.text(7.05, 3.42, "collect the landings\nof both planes", ha="left", fontsize=9.5, color=INK)
    axes.text(9.5, 2.0, "map out", ha="center", fontsize=9.5, color=INK)
    return figure


def step_rules() -> Figure:
    """The rules of a step, seen from the side: x up, z to the right."""
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="#f4f4f4", zorder=0)
    for z, colour in ((-1, Z0), (0, MIDDLE), (1, ZDEPTH)):
        axes.axvline(z, color=colour, lw=2)
    for x in (-1, 1):
        axes.axhline(x, color=INK, lw=1)
    curves = [
        ([0, 0.35, 0.7, 1.0], [-0.4, -0.25, -0.45, -0.3], ZDEPTH, "reaches zdepth:\ndistance 0"),
        ([0, -0.2, -0.3], [0.45, 0.8, 1.0], Z0, ""),
        ([-0.3, -0.42, -0.6], [1.0, 0.78, 0.6], Z0, "reflected\nat a side"),
        ([0, -0.1, -0.25, -0.3], [-0.6, -0.7, -0.62, -0.75], Z0, ""),
        ([0, 0.45], [0.25, 0.62], ZDEPTH, "a long move\nleaves a child"),
        ([0, 0.12, 0.3], [0.25, 0.1, 0.16], "#009E73", "child"),
    ]
    for z, x, colour, label in curves:
        axes.plot(z, x, "-o", color=colour, ms=4, lw=1.8)
        axes.annotate(
            label, (z[-1], x[-1]), (6, -24 if "side" in label else 8), textcoords="offset points", fontsize=9, color=INK
        )
    axes.plot([-0.3, -1], [-0.75, -0.75], ls="--", color=Z0, lw=1.5)
    axes.annotate("after the last step: projected,\nthe distance it still had is kept", (-0.95, -0.7), fontsize=9)
    axes.set(xlim=(-1.08, 1.32), ylim=(-1.12, 1.18), xlabel="z", ylabel="x", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def deposit() -> Figure:
    """Bilinear deposit: one landing, the four cells around it, their weights."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    landing = np.array([1.3, 0.6])
    for x in range(4):
        for y in range(3):
            weight = max(0.0, 1 - abs(landing[0] - x)) * max(0.0, 1 - abs(landing[1] - y))
            square = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=ZDEPTH, alpha=0.75 * weight, zorder=0)
            left.add_patch(square)
            left.plot(x, y, "o", color=INK, ms=3)
            if weight:
                left.text(x, y + 0.12, f"{weight:.2f}", ha="center", fontsize=9)
    left.plot(*landing, "*", color=Z0, ms=14)
    left.set(xlim=(-0.5, 3.5), ylim=(-0.5, 2.5), aspect="equal", xticks=range(4), yticks=range(3))
    left.set(title="weights w of one landing (star)", xlabel="cell x", ylabel="cell y")
    weights = np.linspace(0, 1, 101)
    for score in (0, 1, 2):
        share = weights * np.exp(score) / (weights * np.exp(score) + 1 - weights)
        right.plot(weights, share, label=f"score {score}")
    right.set(title="a cell with one landing", xlabel="weight w of the landing on the cell")
    right.set(ylabel="cell energy / landing energy")
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "energy_flow"  # the same file in every run
    for name, draw in (("flow_lattice", overview), ("step_rules", step_rules), ("deposit", deposit)):
        draw().savefig(STATIC / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
