"""`benchmark=collect`: softmax over the landings of every cell and the deposit, against other methods.

Letters: N landings, K cells that one landing touches, G groups (samples x cells).
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from energy_flow.core.flow_step import fold
from energy_flow.core.geometry import Deposit, cell_centres, deposit_cells
from energy_flow.ops.group_softmax import group_softmax_deposit
from energy_flow_benchmarks.figures import AS_GRAPH, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Measured, Row, find, grid_by_size, rows_of, sizes_of
from energy_flow_benchmarks.measure import Build, Count, Effort, measure, recorded, require_near

OURS, BOUNDED = "group_softmax_deposit", "group_softmax_deposit, bound"
UNIQUE, SEGMENTS, PYG = "unique + scatter", "sorted + segment_reduce", "torch_geometric"
COPY = "copy of the same bytes"
RECORDABLE = (OURS, BOUNDED, PYG)  # they never wait for the device, so a CUDA graph can hold them
DEPOSITS: tuple[Deposit, ...] = ("nearest", "bilinear")
LARGEST_SCORE = 3.0  # |energy| <= 1, because of tanh, times the factor of 20 steps
SPREAD = 2.0  # standard deviation of the distance from a flow's first cell to its landing, in cells
TOLERANCE = 1e-3  # of the largest entry, in float32
COPIED = 2**28  # bytes of the copy: more than any cache holds


class CollectSettings(Effort):
    """Config group `benchmark`, option `collect`."""

    name: Literal["collect"]
    landings: Annotated[list[Count], Field(min_length=1)]
    cuda_landings: list[Count]
    lattice_width: Count


@dataclass(frozen=True)
class Problem:
    """Landings to collect, and a gradient of the collected values. Tensors that need gradients are leaves."""

    scores: Tensor  # [N]
    values: Tensor  # [N, 1]
    keys: Tensor  # int64 [N, K]
    weights: Tensor  # [N, K]; constants where the deposit is `nearest`
    grad: Tensor  # [G, 1]

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that need gradients."""
        return [tensor for tensor in (self.scores, self.values, self.weights) if tensor.requires_grad]

    @property
    def bytes_moved(self) -> int:
        """Fewest bytes of forward and backward: inputs are read in both, outputs and gradients move once."""
        inputs = [self.scores, self.values, self.keys, self.weights]
        out = self.grad.nbytes + len(self.grad) * self.weights.element_size()  # value and mass of every group
        moved = 2 * sum(tensor.nbytes for tensor in inputs) + sum(leaf.nbytes for leaf in self.leaves)
        return moved + out + self.grad.nbytes


Method = Callable[[Problem], Tensor]  # -> [G, 1]


def run(settings: CollectSettings, device: torch.device, seed: int, progress: Callable[[str], None]) -> Findings:
    """Measure forward and backward of every method, on the same landings.

    Raises:
        RuntimeError: a method gave other values or gradients than ours.
    """
    progress("copy rate")
    copied = measure({COPY: functools.partial(_copy, COPIED, device)}, device, settings)[COPY]
    rate = copied.rate(2 * COPIED)
    rows: list[Row] = []
    sizes = settings.landings + (settings.cuda_landings if device.type == "cuda" else [])
    for deposit in DEPOSITS:
        for num_landings in sorted(set(sizes)):
            progress(f"{deposit}, {num_landings:,} landings")
            problem = make_problem(num_landings, deposit, settings.lattice_width, device, seed)
            rows += _measure(problem, deposit, device, rate, settings)
    notes = [
        "one energy per landing, float32; forward and backward; all give the same values and gradients (checked)",
        f"copy rate, measured in this run: {rate / 1e9:,.1f} GB/s (bytes read and bytes written); the copy moves as "
        "many bytes as forward and backward move at least",
    ]
    if device.type == "cuda":
        notes.append(
            "CUDA graph: the same work without the time that Python and the driver add to every kernel; methods that "
            "wait for the device can't be recorded"
        )
    if PYG not in methods("nearest"):
        notes.append("torch_geometric is not installed: its softmax was not measured")
    return Findings(rows, [share_grid(rows)], notes)


def picture(rows: list[Row]) -> Figure:
    """Draw the time of every method against the number of landings."""
    panels = [Panel(deposit, f"{deposit} deposit", SECONDS, "landings") for deposit in DEPOSITS]
    return figure_of_panels(rows, panels, "Softmax over the landings of every cell, forward and backward")


def make_problem(num_landings: int, deposit: Deposit, width: int, device: torch.device, seed: int) -> Problem:
    """Place one landing per cell and sample, a few cells away, on planes of at most `width` x `width` cells."""
    width = min(width, math.isqrt(num_landings))
    num_cells = width * width
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(num_landings)
    sample = index // num_cells
    num_groups = (int(sample[-1]) + 1) * num_cells
    away = torch.randn(num_landings, 2, generator=generator) * (2 * SPREAD / max(width - 1, 1))
    centres = cell_centres(width, width, torch.float32, torch.device("cpu"))
    cells, weights = deposit_cells(fold(centres[index % num_cells] + away), width, width, deposit)
    values = torch.randn(num_landings, 1, generator=generator).tanh()
    return Problem(
        scores=(values.abs().squeeze(1) * LARGEST_SCORE).to(device).requires_grad_(),
        values=values.to(device).requires_grad_(),
        keys=(cells + sample[:, None] * num_cells).to(device),
        weights=weights.to(device).requires_grad_(deposit == "bilinear"),
        grad=torch.randn(num_groups, 1, generator=generator).to(device),
    )


def methods(deposit: Deposit) -> dict[str, Method]:
    """Return the methods for a deposit; torch_geometric's where it is installed."""
    bounded = functools.partial(ours, bound=LARGEST_SCORE)
    if deposit == "bilinear":
        return {UNIQUE: unique_scatter_weighted, OURS: ours, BOUNDED: bounded}
    found: dict[str, Method] = {UNIQUE: unique_scatter, OURS: ours, BOUNDED: bounded, SEGMENTS: sorted_segments}
    if importlib.util.find_spec("torch_geometric") is not None:
        found[PYG] = pyg_softmax
    return found


def ours(problem: Problem, bound: float | None = None) -> Tensor:
    """Collect by the framework's own operation; a bound on the scores saves the maximum per group."""
    inputs = (problem.scores, problem.values, problem.keys, problem.weights)
    return group_softmax_deposit(*inputs, num_groups=len(problem.grad), bound=bound)[0]


def unique_scatter(problem: Problem) -> Tensor:
    """Find groups by `torch.unique`, as the performance analysis proposes; softmax by `scatter_reduce`, `index_add`."""
    found, inverse = torch.unique(problem.keys[:, 0], return_inverse=True)
    none = problem.scores.new_full((len(found),), -torch.inf)
    maximum = none.scatter_reduce(0, inverse, problem.scores.detach(), "amax")
    share = (problem.scores - maximum[inverse]).exp()
    total = share.new_zeros(len(found)).index_add(0, inverse, share)
    weighted = (share / total[inverse])[:, None] * problem.values
    of_groups = weighted.new_zeros(len(found), 1).index_add(0, inverse, weighted)
    return torch.zeros_like(problem.grad).index_copy(0, found, of_groups)


def unique_scatter_weighted(problem: Problem) -> Tensor:
    """Do the same with weights. A group whose weights sum to less than 1 has an empty member of score 0."""
    found, inverse = torch.unique(problem.keys.flatten(), return_inverse=True)
    weights = problem.weights.flatten()
    scores, values = (
        tensor.repeat_interleave(problem.keys.shape[1]) for tensor in (problem.scores, problem.values[:, 0])
    )
    # Scores are positive: neither a member of weight 0 nor the empty member changes the result through the maximum.
    maximum = scores.new_zeros(len(found)).scatter_reduce(0, inverse, scores.detach(), "amax")
    share = weights * (scores - maximum[inverse]).exp()
    mass = weights.new_zeros(len(found)).index_add(0, inverse, weights)
    total = ((1 - mass).clamp(min=0) * (-maximum).exp()).index_add(0, inverse, share)
    of_groups = torch.zeros_like(total).index_add(0, inverse, share / total[inverse] * values)
    return torch.zeros_like(problem.grad).index_copy(0, found, of_groups[:, None])


def sorted_segments(problem: Problem) -> Tensor:
    """Sort landings by key and reduce groups as segments."""
    keys, order = problem.keys[:, 0].sort()
    lengths = torch.bincount(keys, minlength=len(problem.grad))
    scores, values = problem.scores[order], problem.values[order]
    maximum = torch.segment_reduce(scores.detach(), "max", lengths=lengths, unsafe=True)
    share = (scores - maximum[keys]).exp()
    total = torch.segment_reduce(share, "sum", lengths=lengths, unsafe=True)
    return torch.segment_reduce((share / total[keys])[:, None] * values, "sum", lengths=lengths, unsafe=True)


def pyg_softmax(problem: Problem) -> Tensor:
    """Collect by torch_geometric's softmax over the neighbours of a node."""
    softmax = importlib.import_module("torch_geometric.utils").softmax
    keys = problem.keys[:, 0]
    share = softmax(problem.scores, keys, num_nodes=len(problem.grad))
    return torch.zeros_like(problem.grad).index_add(0, keys, share[:, None] * problem.values)


def forward_backward(method: Method, problem: Problem) -> tuple[Tensor, ...]:
    """Return the values of all groups and the gradients of all leaves."""
    out = method(problem)
    return (out.detach(), *torch.autograd.grad(out, problem.leaves, problem.grad))


def require_same(name: str, expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """Compare the results of `forward_backward`.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    parts = ("values", "gradient of scores", "gradient of energies", "gradient of weights")
    for part, left, right in zip(parts, expected, found, strict=False):
        require_near(f"{name}: {part}", left, right, TOLERANCE, scale=1.0)


def share_grid(rows: list[Row]) -> Grid:
    """Compare every method with a copy of the fewest bytes that it must move."""

    def share(deposit: str, size: int, variant: str) -> str:
        copy, own = (find(rows, deposit, size, name).seconds for name in (COPY, variant))
        return "-" if not copy or not own else f"{100 * copy / own:.2g}%"

    sizes, lines = sizes_of(rows, ""), {}
    for deposit in DEPOSITS:
        for variant in dict.fromkeys(row.variant for row in rows if row.case.startswith(deposit)):
            if variant != COPY:
                lines[f"{deposit}: {variant}"] = [share(deposit, size, variant) for size in sizes]
    return grid_by_size("Share of the copy rate", "method", sizes, "landings", lines)


def _measure(problem: Problem, deposit: Deposit, device: torch.device, rate: float, effort: Effort) -> list[Row]:
    expected = forward_backward(ours, problem)
    builds: dict[str, Build] = {}
    for name, method in methods(deposit).items():
        require_same(name, expected, forward_backward(method, problem))
        builds[name] = build = functools.partial(functools.partial, forward_backward, method, problem)
        if device.type == "cuda" and name in RECORDABLE:
            builds[name + AS_GRAPH] = functools.partial(recorded, build())
    del expected
    found = measure(builds, device, effort) | {COPY: Measured(problem.bytes_moved / rate)}
    for name in found:
        if name.endswith(AS_GRAPH):  # the memory of a recording says nothing about the method
            found[name] = Measured(found[name].seconds)
    return rows_of("collect", deposit, len(problem.scores), found, UNIQUE)


def _copy(num_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)
