"""`benchmark=step`: one training step of the flow processor, against the machine and against plain PyTorch.

Letters: N flows, H hidden size.
"""

import functools
import os
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from energy_flow.settings import Settings
from energy_flow_benchmarks.figures import figure_of_bars
from energy_flow_benchmarks.findings import Findings, Grid, Measured, Row, rows_of
from energy_flow_benchmarks.measure import Build, Count, Effort, free, measure, recorded, require_near
from energy_flow_benchmarks.step_modes import rows_of_modes
from energy_flow_benchmarks.user_step import Recurrence, UserModel, parameters_of
from energy_flow_benchmarks.workload import (
    SHORT,
    Dtype,
    Product,
    SizeSettings,
    Step,
    Workload,
    autocast,
    training_step,
)

EAGER, GRU, CELLS, COMPILED, GRAPHED = "eager", "nn.GRU", "nn.GRUCell", "step compiled", "step compiled, CUDA graph"
TAPE, TAPE_COMPILED, LEAN, LEAN_COMPILED = "tape", "tape, compiled", "tape, lean", "tape, lean, compiled"
CHUNKS = "tape, 2 chunks"
# The engine for parts of one's own, here with the shipped ones.
ANY_COMPILED, ANY_CHUNKS = "any parts, compiled", "any parts, compiled, 2 chunks"
LIMIT = "arithmetic at the rate of"
PRODUCT = "product"
KINDS = {
    EAGER: "plain autograd",
    "any parts": "engine for any parts",
    "": "a user's own loop",
    TAPE: "tape",
    LIMIT: "arithmetic alone",
}
# Largest difference, relative to the largest entry: rounding of some hundred operations.
TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 1e-1}


class BatchSettings(SizeSettings):
    """A size, and samples per batch."""

    batch: Count


class StepOnDevice(Effort):
    """The measurements on one kind of device."""

    sizes: Annotated[list[BatchSettings], Field(min_length=1)]
    dtypes: Annotated[list[Dtype], Field(min_length=1)]
    check_samples: Count
    product: Count


class StepSettings(Settings):
    """Config group `benchmark`, option `step`."""

    name: Literal["step"]
    dim: Count
    cpu: StepOnDevice
    cuda: StepOnDevice


def run(settings: StepSettings, device: torch.device, seed: int, progress: Callable[[str], None]) -> Findings:
    """Measure all variants at all sizes.

    Raises:
        RuntimeError: a variant gave other outputs or gradients than plain autograd, or flows ended early.
    """
    own: StepOnDevice = getattr(settings, device.type)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products, before the first one
    dtypes, notes = usable_dtypes(own.dtypes, device)
    rows: list[Row] = []
    rates, shares = [], []
    for size in own.sizes:
        workload = Workload.read(size, settings.dim, device, seed).where_no_flow_ends()
        num_flows = workload.num_flows(size.batch)
        flows = f"{num_flows:,} flows"
        title = f"{size.size}, {flows}"
        progress(f"{flows}: comparing outputs and gradients")
        check(workload, min(size.batch, own.check_samples))
        progress(f"{flows}: timing")
        measured, product_rates = _measure(workload, size, dtypes, own)
        rows += measured
        progress(f"{flows}: deterministic algorithms, and flows that end early")
        rows += rows_of_modes(workload, title, size.batch, dtypes[-1], own)
        rates += [(flows, one.name, f"{rate / 1e12:,.3g} TFLOP/s") for one, rate in product_rates.items()]
        shares.append(share_grid(measured, product_rates, title))
        notes.append(_about(size, workload))
    notes.append(
        "a step is forward and backward with both maps, gradients set to None before; arithmetic: three times the "
        "forward pass's recurrent products; ratios are to the first dtype's eager step"
    )
    rate_grid = Grid("Rate of products, which alternate with the steps", ("flows", "product", "rate"), tuple(rates))
    return Findings(rows, [rate_grid, *shares], notes)


def picture(rows: list[Row]) -> Figure:
    """Draw time and peak memory of every variant, per size."""
    steps = [row for row in rows if row.share is not None]
    return figure_of_bars(steps, "One training step: forward and backward", KINDS)


def usable_dtypes(wanted: list[Dtype], device: torch.device) -> tuple[list[Dtype], list[str]]:
    """Return the dtypes that this machine has matrix units for, and a note where bf16 is left out."""
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return list(wanted), []
    left: list[Dtype] = [dtype for dtype in wanted if dtype != "bfloat16"]
    return left, ["bf16 was not measured: this CPU has no AMX"] if left != wanted else []


def steps_of(workload: Workload, batch: int, dtype: Dtype) -> dict[str, Callable[[], Step]]:
    """Return functions that build the variants: plain autograd first, then a user's own loops, then the tape."""

    ours = functools.partial(workload.step, batch, dtype)

    def users(recurrence: Recurrence, compiled: bool = False) -> Callable[[], Step]:
        data = workload.batch(batch)

        def build() -> Step:
            model = UserModel(workload.processor(), recurrence, compiled)
            return training_step(model, parameters_of(model), *data, dtype)

        return build

    steps = {
        EAGER: ours(engine="autograd", chunk=None, compile=False),
        ANY_COMPILED: ours(engine="autograd", chunk=None, compile=True),
        GRU: users("gru"),
        CELLS: users("cells"),
        COMPILED: users("formula", compiled=True),
    }
    if workload.device.type == "cuda":
        compiled = steps[COMPILED]
        steps[GRAPHED] = lambda: _graphed(compiled())
        steps |= {TAPE: ours(engine="tape"), LEAN: ours(engine="tape", recompute=True)}
    else:  # on a CPU, "auto" compiles only large models
        for name, compiled_name, lean in ((TAPE, TAPE_COMPILED, False), (LEAN, LEAN_COMPILED, True)):
            steps[name] = ours(engine="tape", recompute=lean, compile=False)
            steps[compiled_name] = ours(engine="tape", recompute=lean, compile=True)
    if batch > 1:
        half = -(-batch // 2)
        steps[CHUNKS] = ours(engine="tape", chunk=half)
        steps[ANY_CHUNKS] = ours(engine="autograd", chunk=half, compile=True)
    return steps


def _graphed(step: Step) -> Step:
    """Record forward and backward as one CUDA graph; every replay writes its gradients to the same place."""
    return Step(recorded(step.run), step.parameters)


def check(workload: Workload, batch: int) -> None:
    """Compare all variants with plain autograd, in float32.

    Raises:
        RuntimeError: outputs or gradients differ by more than rounding.
    """
    steps = steps_of(workload, batch, "float32")
    # cuDNN's recurrent network rounds to TF32 by default.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = _outcome(steps[EAGER]())
        for name, build in steps.items():
            for what, value in _outcome(build()).items():
                require_near(f"{name}: {what}", expected[what], value, TOLERANCE["float32"])
    free(workload.device)


def _outcome(step: Step) -> dict[str, Tensor]:
    """Return output and gradients of the third run: the first two record CUDA graphs, the third replays them."""
    for _ in range(2):
        step()
    found = {"output": step().clone()}
    for name, parameter in step.parameters.items():
        assert parameter.grad is not None, name
        found[f"gradient of {name}"] = parameter.grad.clone()
    return found


def _measure(
    workload: Workload, size: BatchSettings, dtypes: list[Dtype], own: StepOnDevice
) -> tuple[list[Row], dict[Product, float]]:
    """Measure products and steps; return their rows, with the steps' arithmetic, and the products' rates in FLOP/s.

    For each dtype there are two products: a large square one, and one with a row per flow. Products and steps
    alternate: the machine's rate changes while other programs use it, and shares would mean nothing.
    """
    flows, hidden, device = workload.num_flows(size.batch), workload.model.hidden_size, workload.device
    squares = [Product(own.product, own.product, own.product, dtype) for dtype in dtypes]
    products = squares + [Product(flows, hidden, 3 * hidden, dtype) for dtype in dtypes]
    builds: dict[str, Build] = {}
    for dtype in dtypes:
        builds |= {one.name: functools.partial(one.build, device) for one in products if one.dtype == dtype}
        expected = _expected(workload, size.batch, dtype)
        for name, build in steps_of(workload, size.batch, dtype).items():
            builds[f"{name}, {SHORT[dtype]}"] = _checked(name, build, expected, dtype)
    found = measure(builds, device, own)
    measured = {one: found.pop(one.name) for one in products}
    rates = {one: measured[one].rate(one.flops) for one in products}
    rows = rows_of("step", PRODUCT, flows, {one.name: measured[one] for one in products})
    for square in squares:
        dtype_name, least = SHORT[square.dtype], workload.arithmetic(size.batch) / rates[square]
        all_steps = found | {f"{LIMIT} {own.product}³, {dtype_name}": Measured(least)}
        case, baseline = f"{size.size}, {flows:,} flows", f"{EAGER}, {SHORT[dtypes[0]]}"
        rows += [
            row for row in rows_of("step", case, flows, all_steps, baseline, least) if row.variant.endswith(dtype_name)
        ]
    return rows, rates


def _expected(workload: Workload, batch: int, dtype: Dtype) -> Tensor:
    """Return the output of plain autograd.

    Raises:
        RuntimeError: flows ended early, so that there is less arithmetic than the shares assume.
    """
    processor = workload.processor(engine="autograd", chunk=None, compile=False)
    with torch.no_grad(), autocast(dtype, workload.device):
        output = processor(workload.batch(batch)[0])
    active = float(output.statistics["active_share"])
    if active != 1:
        raise RuntimeError(f"only {active:.1%} of all flows were active in all steps; all of them must be")
    return output.embedding.float()


def _checked(name: str, build: Callable[[], Step], expected: Tensor, dtype: Dtype) -> Callable[[], Step]:
    """Build a step only if its output is the expected one, in the dtype and at the size of the measurement."""

    def built() -> Step:
        step = build()
        require_near(f"{name}, {SHORT[dtype]}: output", expected, step().float(), TOLERANCE[dtype])
        return step

    return built


def share_grid(rows: list[Row], rates: dict[Product, float], title: str) -> Grid:
    """Show the share of either product's rate that the arithmetic of every variant reaches."""
    lines = []
    for row in rows:
        if row.share is not None and not row.variant.startswith(LIMIT):
            square, *others = [rate for one, rate in rates.items() if row.variant.endswith(SHORT[one.dtype])]
            lines.append((row.variant, *(f"{100 * row.share * square / rate:.3g}%" for rate in (square, *others))))
    columns = ("variant", "of the square product's rate", "of the flows' product's rate")
    return Grid(f"Share of the rate: {title}", columns, tuple(lines))


def _about(size: BatchSettings, workload: Workload) -> str:
    flows, model = workload.num_flows(size.batch), workload.model
    return (
        f"{size.size}, batch {size.batch}: {flows:,} flows, {workload.lattice.num_steps} steps, {model.num_layers} x "
        f"{model.hidden_size} GRU, {workload.arithmetic(size.batch) / 1e12:.3g} TFLOP; active share 100% (checked): "
        f"moves of at most {workload.lattice.movement.max_displacement:.3g}, so that no flow ends early"
    )
