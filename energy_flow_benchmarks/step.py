"""`benchmark=step`: one training step of the flow processor, against the machine and against plain PyTorch.

Letters: N flows, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from energy_flow.settings import Settings
from energy_flow_benchmarks.figures import figure_of_bars
from energy_flow_benchmarks.findings import Findings, Grid, Measured, Row, rows_of
from energy_flow_benchmarks.measure import Count, Effort, free, measure
from energy_flow_benchmarks.step_modes import allow_deterministic_products, rows_of_modes
from energy_flow_benchmarks.user_step import Recurrence, UserModel, graphed_step, parameters_of
from energy_flow_benchmarks.workload import (
    SHORT,
    Dtype,
    Shape,
    SizeSettings,
    Step,
    Workload,
    autocast,
    of_device,
    product,
    product_flops,
    training_step,
)

EAGER, GRU, CELLS, COMPILED, GRAPHED = "eager", "nn.GRU", "nn.GRUCell", "step compiled", "step compiled, CUDA graph"
TAPE, TAPE_COMPILED, LEAN, LEAN_COMPILED = "tape", "tape, compiled", "tape, lean", "tape, lean, compiled"
CHUNKS = "tape, 2 chunks"
LIMIT = "arithmetic at the rate of"
PRODUCT = "product"
KINDS = ("plain autograd", "a user's own loop", "tape", "arithmetic alone")
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


@dataclass(frozen=True)
class Product:
    """A measured matrix product."""

    shape: Shape
    dtype: Dtype
    measured: Measured

    @property
    def name(self) -> str:
        """Such as `[16 x 16] · [16 x 16], fp32`."""
        m, k, n = self.shape
        return f"[{m} x {k}] · [{k} x {n}], {SHORT[self.dtype]}"

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.measured.rate(product_flops(self.shape))


def run(settings: StepSettings, device: torch.device, seed: int, progress: Callable[[str], None]) -> Findings:
    """Measure all variants at all sizes.

    Raises:
        RuntimeError: a variant gave other outputs or gradients than plain autograd, or flows ended early.
    """
    own = of_device(device, settings.cpu, settings.cuda)
    allow_deterministic_products()
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
        products, steps = _measure(workload, size, dtypes, own)
        rows += [row for one in products for row in rows_of("step", PRODUCT, num_flows, {one.name: one.measured})]
        rows += steps
        progress(f"{flows}: deterministic algorithms, and flows that end early")
        rows += rows_of_modes(workload, title, size.batch, dtypes[-1], own)
        rates += [(flows, one.name, f"{one.rate / 1e12:,.3g} TFLOP/s") for one in products]
        shares.append(share_grid(steps, products, title))
        notes.append(_about(size, workload))
    notes.append(
        "a step is forward and backward with both maps, gradients set to None before; arithmetic: three times the "
        "forward pass's recurrent products; ratios are to the first dtype's eager step"
    )
    rate_grid = Grid("Rate of products, which alternate with the steps", ("flows", "product", "rate"), tuple(rates))
    return Findings(rows, [rate_grid, *shares], notes)


def picture(rows: list[Row]) -> Figure:
    """Draw time and peak memory of every variant, per size."""

    def kind_of(variant: str) -> int:
        for index, prefix in ((3, LIMIT), (2, TAPE), (0, EAGER)):
            if variant.startswith(prefix):
                return index
        return 1

    cases = list(dict.fromkeys(row.case for row in rows if row.share is not None))
    return figure_of_bars(rows, cases, "One training step: forward and backward", KINDS, kind_of)


def usable_dtypes(wanted: list[Dtype], device: torch.device) -> tuple[list[Dtype], list[str]]:
    """Return the dtypes that this machine has matrix units for, and a note where bf16 is left out."""
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return list(wanted), []
    left: list[Dtype] = [dtype for dtype in wanted if dtype != "bfloat16"]
    return left, ["bf16 was not measured: this CPU has no AMX"] if left != wanted else []


def steps_of(workload: Workload, batch: int, dtype: Dtype) -> dict[str, Callable[[], Step]]:
    """Return functions that build the variants: plain autograd first, then a user's own loops, then the tape."""

    def ours(**rollout: Any) -> Callable[[], Step]:
        return workload.step(batch, dtype, **rollout)

    def users(recurrence: Recurrence, compiled: bool = False) -> Callable[[], Step]:
        data = workload.batch(batch)

        def build() -> Step:
            model = UserModel(workload.processor(), recurrence, compiled)
            return training_step(model, parameters_of(model), *data, dtype)

        return build

    steps = {
        EAGER: ours(engine="autograd"),
        GRU: users("gru"),
        CELLS: users("cells"),
        COMPILED: users("formula", compiled=True),
    }
    if workload.device.type == "cuda":
        data = workload.batch(batch)
        steps[GRAPHED] = lambda: graphed_step(UserModel(workload.processor(), "formula", compiled=True), *data, dtype)
        steps |= {TAPE: ours(engine="tape"), LEAN: ours(engine="tape", recompute=True)}
    else:  # on a CPU, "auto" compiles only large models
        for name, compiled_name, lean in ((TAPE, TAPE_COMPILED, False), (LEAN, LEAN_COMPILED, True)):
            steps[name] = ours(engine="tape", recompute=lean, compile=False)
            steps[compiled_name] = ours(engine="tape", recompute=lean, compile=True)
    if batch > 1:
        steps[CHUNKS] = ours(engine="tape", chunk=-(-batch // 2))
    return steps


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
                require_near(f"{name}: {what}", expected[what], value, "float32")
    free(workload.device)


def require_near(what: str, expected: Tensor, found: Tensor, dtype: Dtype) -> None:
    """Compare two tensors.

    Raises:
        RuntimeError: they differ by more than the dtype's tolerance, relative to the largest entry.
    """
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"{what} differs from plain autograd by {difference:.3g} of the largest entry, allowed {TOLERANCE[dtype]:g}"
        )


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
) -> tuple[list[Product], list[Row]]:
    """Measure products and steps; return rows of the steps, and of their arithmetic at the square product's rate.

    For each dtype there are two products: a large square one, and one with a row per flow. Products and steps
    alternate: the machine's rate changes while other programs use it, and shares would mean nothing.
    """
    flows, hidden, device = workload.num_flows(size.batch), workload.model.hidden_size, workload.device
    shapes: list[Shape] = [(own.product,) * 3, (flows, hidden, 3 * hidden)]
    builds: dict[Any, Callable[[], Callable[[], Tensor]]] = {}
    for dtype in dtypes:
        builds |= {(shape, dtype): product(shape, dtype, device) for shape in shapes}
        expected = _expected(workload, size.batch, dtype)
        for name, build in steps_of(workload, size.batch, dtype).items():
            builds[f"{name}, {SHORT[dtype]}"] = _checked(name, build, expected, dtype)
    found = measure(builds, device, own)
    products = [Product(shape, dtype, found.pop((shape, dtype))) for shape in shapes for dtype in dtypes]
    baseline, rows = f"{EAGER}, {SHORT[dtypes[0]]}", []
    for square in products[: len(dtypes)]:
        least = workload.arithmetic(size.batch) / square.rate
        limit = {f"{LIMIT} {own.product}³, {SHORT[square.dtype]}": Measured(least)}
        all_rows = rows_of("step", f"{size.size}, {flows:,} flows", flows, found | limit, baseline, least)
        rows += [row for row in all_rows if row.variant.endswith(SHORT[square.dtype])]
    return products, rows


def _expected(workload: Workload, batch: int, dtype: Dtype) -> Tensor:
    """Return the output of plain autograd.

    Raises:
        RuntimeError: flows ended early, so that there is less arithmetic than the shares assume.
    """
    processor = workload.processor(engine="autograd")
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
        require_near(f"{name}, {SHORT[dtype]}: output", expected, step().float(), dtype)
        return step

    return built


def share_grid(rows: list[Row], products: list[Product], title: str) -> Grid:
    """Show the share of either product's rate that the arithmetic of every variant reaches."""
    lines = []
    for row in rows:
        own = [one for one in products if row.variant.endswith(SHORT[one.dtype])]
        if row.share is not None and not row.variant.startswith(LIMIT):
            shares = (row.share * own[0].rate / one.rate for one in own)
            lines.append((row.variant, *(f"{100 * share:.3g}%" for share in shares)))
    columns = ("variant", "of the square product's rate", "of the flows' product's rate")
    return Grid(f"Share of the rate: {title}", columns, tuple(lines))


def _about(size: BatchSettings, workload: Workload) -> str:
    flows, model = workload.num_flows(size.batch), workload.model
    return (
        f"{size.size}, batch {size.batch}: {flows:,} flows, {workload.lattice.num_steps} steps, {model.num_layers} x "
        f"{model.hidden_size} GRU, {workload.arithmetic(size.batch) / 1e12:.3g} TFLOP; active share 100% (checked): "
        f"moves of at most {workload.lattice.movement.max_displacement:.3g}, so that no flow ends early"
    )
