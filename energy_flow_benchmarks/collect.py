"""`benchmark=collect`: softmax over the landings of every cell and the deposit, against other ways to do it.

Letters: N landings, K cells that one landing touches, G groups (samples x cells).
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from energy_flow.core.flow_step import fold
from energy_flow.core.geometry import Deposit, cell_centres, deposit_cells
from energy_flow.ops.group_softmax import group_softmax_deposit
from energy_flow.settings import Settings
from energy_flow_benchmarks.figures import AS_GRAPH, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Row, find, rows_of, sizes
from energy_flow_benchmarks.measure import compare, copy_rate, peak_memory

OURS, BOUNDED = "group_softmax_deposit", "group_softmax_deposit, bound"
UNIQUE, SEGMENTS, PYG = "unique + scatter", "sorted + segment_reduce", "torch_geometric"
COPY = "copy of the same bytes"
RECORDABLE = (OURS, BOUNDED, PYG)  # they wait for nothing, so a CUDA graph can hold them
DEPOSITS: tuple[Deposit, ...] = ("nearest", "bilinear")
LARGEST_SCORE = 3.0  # |energy| <= 1, as tanh gives it, times what 20 steps make of it
SPREAD = 2.0  # standard deviation of a landing's distance from where its flow began, in cells
TOLERANCE = 1e-3  # float32: of the largest entry
COPIED = 2**28  # bytes of the copy whose rate is the limit, where the machine has memory for more than its caches

Count = Annotated[int, Field(ge=1)]


class CollectSettings(Settings):
    """Config group `benchmark`, option `collect`."""

    name: Literal["collect"]
    landings: Annotated[list[Count], Field(min_length=1)]
    cuda_landings: list[Count]
    lattice_width: Count
    repeats: Count
    min_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Problem:
    """Landings to collect, and the gradient that comes back; leaves of autograd where they ask for gradients."""

    scores: Tensor  # [N]
    values: Tensor  # [N, 1]
    keys: Tensor  # int64 [N, K]
    weights: Tensor  # [N, K]
    grad: Tensor  # [G, 1]

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are asked of: weights of `nearest` are constants."""
        return [tensor for tensor in (self.scores, self.values, self.weights) if tensor.requires_grad]

    @property
    def bytes_moved(self) -> int:
        """The fewest bytes that forward and backward move: inputs read in both, outputs and gradients once."""
        inputs = [self.scores, self.values, self.keys, self.weights]
        out = self.grad.nbytes + len(self.grad) * self.weights.element_size()  # values and mass of every group
        return 2 * _nbytes(inputs) + out + self.grad.nbytes + _nbytes(self.leaves)


Collector = Callable[[Problem], Tensor]  # -> [G, 1]


def run(settings: CollectSettings, device: torch.device, seed: int, say: Callable[[str], None]) -> Findings:
    """Forward and backward of every way, on the same landings and with equal results.

    Raises:
        RuntimeError: a way gave other values or gradients than ours.
    """
    say("copy rate")
    options: dict[str, Any] = {"repeats": settings.repeats, "min_seconds": settings.min_seconds}
    rate = copy_rate(COPIED, device, **options)
    rows: list[Row] = []
    wanted = settings.landings + (settings.cuda_landings if device.type == "cuda" else [])
    for deposit in DEPOSITS:
        for num_landings in sorted(set(wanted)):
            say(f"{deposit}, {num_landings:,} landings")
            problem = make_problem(num_landings, deposit, settings.lattice_width, device, seed)
            rows += _measure(problem, deposit, device, rate, options)
    notes = [
        "one energy per landing, float32; forward and backward; all give the same values and gradients (checked)",
        f"copy rate, measured in this run: {rate / 1e9:,.1f} GB/s (bytes read and bytes written); the copy moves as "
        "many bytes as forward and backward move at least",
    ]
    if device.type == "cuda":
        notes.append(
            "as a CUDA graph: the same work without what Python and the driver add to every kernel; the ways "
            "that wait for the device can't be recorded"
        )
    if PYG not in collectors("nearest"):
        notes.append("torch_geometric is not installed: its softmax was not measured")
    return Findings(rows, [share_grid(rows)], notes)


def picture(rows: list[Row]) -> Figure:
    """Seconds of every way against the number of landings."""
    panels = [Panel(deposit, f"{deposit} deposit", SECONDS, "landings") for deposit in DEPOSITS]
    return figure_of_panels(rows, panels, "Softmax over the landings of every cell, forward and backward")


def make_problem(num_landings: int, deposit: Deposit, width: int, device: torch.device, seed: int) -> Problem:
    """One landing per flow and one flow per cell, on planes of `width` x `width` cells or fewer, a few cells away."""
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


def collectors(deposit: Deposit) -> dict[str, Collector]:
    """The ways there are for a deposit; PyG's where it is installed."""
    if deposit == "bilinear":
        return {UNIQUE: unique_scatter_weighted, OURS: ours, BOUNDED: ours_bounded}
    ways: dict[str, Collector] = {UNIQUE: unique_scatter, OURS: ours, BOUNDED: ours_bounded, SEGMENTS: sorted_segments}
    if importlib.util.find_spec("torch_geometric") is not None:
        ways[PYG] = pyg_softmax
    return ways


def ours(problem: Problem, bound: float | None = None) -> Tensor:
    """The framework's own."""
    inputs = (problem.scores, problem.values, problem.keys, problem.weights)
    return group_softmax_deposit(*inputs, num_groups=len(problem.grad), bound=bound)[0]


def ours_bounded(problem: Problem) -> Tensor:
    """The framework's own where a bound on the scores is known: no maximum per group."""
    return ours(problem, bound=LARGEST_SCORE)


def unique_scatter(problem: Problem) -> Tensor:
    """Groups found by `torch.unique`, softmax by `scatter_reduce` and `index_add`: the report's own proposal."""
    found, inverse = torch.unique(problem.keys[:, 0], return_inverse=True)
    none = problem.scores.new_full((len(found),), -torch.inf)
    maximum = none.scatter_reduce(0, inverse, problem.scores.detach(), "amax")
    share = (problem.scores - maximum[inverse]).exp()
    total = share.new_zeros(len(found)).index_add(0, inverse, share)
    weighted = (share / total[inverse])[:, None] * problem.values
    of_groups = weighted.new_zeros(len(found), 1).index_add(0, inverse, weighted)
    return torch.zeros_like(problem.grad).index_copy(0, found, of_groups)


def unique_scatter_weighted(problem: Problem) -> Tensor:
    """The same with weights, and with an empty member of score 0 where they don't sum to one."""
    found, inverse = torch.unique(problem.keys.flatten(), return_inverse=True)
    weights = problem.weights.flatten()
    scores, values = (
        tensor.repeat_interleave(problem.keys.shape[1]) for tensor in (problem.scores, problem.values[:, 0])
    )
    # The scores are positive: a member of weight 0 does no harm to the maximum, nor does the empty member.
    maximum = scores.new_zeros(len(found)).scatter_reduce(0, inverse, scores.detach(), "amax")
    share = weights * (scores - maximum[inverse]).exp()
    mass = weights.new_zeros(len(found)).index_add(0, inverse, weights)
    total = ((1 - mass).clamp(min=0) * (-maximum).exp()).index_add(0, inverse, share)
    of_groups = torch.zeros_like(total).index_add(0, inverse, share / total[inverse] * values)
    return torch.zeros_like(problem.grad).index_copy(0, found, of_groups[:, None])


def sorted_segments(problem: Problem) -> Tensor:
    """Landings sorted by key, groups reduced as segments."""
    keys, order = problem.keys[:, 0].sort()
    lengths = torch.bincount(keys, minlength=len(problem.grad))
    scores, values = problem.scores[order], problem.values[order]
    maximum = torch.segment_reduce(scores.detach(), "max", lengths=lengths, unsafe=True)
    share = (scores - maximum[keys]).exp()
    total = torch.segment_reduce(share, "sum", lengths=lengths, unsafe=True)
    return torch.segment_reduce((share / total[keys])[:, None] * values, "sum", lengths=lengths, unsafe=True)


def pyg_softmax(problem: Problem) -> Tensor:
    """torch_geometric's softmax over the neighbours of a node."""
    softmax = importlib.import_module("torch_geometric.utils").softmax
    keys = problem.keys[:, 0]
    share = softmax(problem.scores, keys, num_nodes=len(problem.grad))
    return torch.zeros_like(problem.grad).index_add(0, keys, share[:, None] * problem.values)


def forward_backward(way: Collector, problem: Problem) -> tuple[Tensor, ...]:
    """Values of all groups, and gradients of all leaves."""
    out = way(problem)
    return (out.detach(), *torch.autograd.grad(out, problem.leaves, problem.grad))


def recorded(work: Callable[[], Any]) -> Callable[[], None]:
    """The same work as a CUDA graph, to be run as often as one likes; what it gives is overwritten each time."""
    with torch.cuda.stream(torch.cuda.Stream()):  # libraries set themselves up outside of the recording
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def require_same(name: str, expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """Raises RuntimeError if values or gradients differ by more than rounding."""
    for what, left, right in zip(("values", "scores", "energies", "weights"), expected, found, strict=False):
        difference = float((left - right).abs().max() / left.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{name}: {what} (or their gradients) differ from ours by {difference:.3g}")


def _measure(
    problem: Problem, deposit: Deposit, device: torch.device, rate: float, options: dict[str, Any]
) -> list[Row]:
    ways = collectors(deposit)
    expected = forward_backward(ours, problem)
    for name, way in ways.items():
        require_same(name, expected, forward_backward(way, problem))
    del expected
    work: dict[str, Callable[[], Any]] = {
        name: functools.partial(forward_backward, way, problem) for name, way in ways.items()
    }
    peaks = {name: peak_memory(one, device) for name, one in work.items()}
    if device.type == "cuda":
        work |= {name + AS_GRAPH: recorded(work[name]) for name in RECORDABLE if name in work}
    seconds: dict[str, float | None] = dict(compare(work, device, **options))
    seconds[COPY] = problem.bytes_moved / rate
    case = f"{deposit}; ratio to {UNIQUE}"
    return rows_of("collect", case, len(problem.scores), seconds, UNIQUE, peaks)


def share_grid(rows: list[Row]) -> Grid:
    """How near every way comes to a copy of the bytes that it must move."""
    lines, columns = [], sizes(rows, "")
    for deposit in DEPOSITS:
        for way in dict.fromkeys(row.variant for row in rows if row.case.startswith(deposit) and row.variant != COPY):
            cells = []
            for size in columns:
                copy, own = (find(rows, deposit, size, variant).seconds for variant in (COPY, way))
                cells.append("-" if not copy or not own else f"{100 * copy / own:.2g}%")
            lines.append((f"{deposit}: {way}", *cells))
    return Grid("Share of the copy rate", ("way", *(f"{size:,} landings" for size in columns)), tuple(lines))


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
