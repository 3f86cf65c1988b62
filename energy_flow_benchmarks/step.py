"""`benchmark=step`: one training step of the flow processor, against the machine and against plain PyTorch.

Letters: N flows, H hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from energy_flow.settings import Settings
from energy_flow_benchmarks.bars import figure_of_bars
from energy_flow_benchmarks.findings import Findings, Grid, Row
from energy_flow_benchmarks.modes import allow_deterministic_products, rows_of_modes
from energy_flow_benchmarks.turns import Build, measure_in_turns
from energy_flow_benchmarks.user_step import Recurrence, UserModel, graphed_step, parameters_of
from energy_flow_benchmarks.workload import (
    SHORT,
    Count,
    Dtype,
    Seconds,
    Shape,
    SizeSettings,
    Step,
    Workload,
    autocast,
    free,
    product,
    product_rate,
    step_of,
    training_step,
)

EAGER, GRU, CELLS, COMPILED, GRAPHED = "eager", "nn.GRU", "nn.GRUCell", "step compiled", "step compiled, CUDA graph"
TAPE, TAPE_COMPILED, LEAN, LEAN_COMPILED = "tape", "tape, compiled", "tape, lean", "tape, lean, compiled"
CHUNKS = "tape, 2 chunks"
USERS = (GRU, CELLS, COMPILED, GRAPHED)
LIMIT = "arithmetic at the rate of"
PRODUCT = "product"
# Largest difference, relative to the largest entry: float32's rounding in some hundred operations, bfloat16's in all.
TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 1e-1}


class BatchSettings(SizeSettings):
    """A size, and samples per batch."""

    batch: Count


class StepOnDevice(Settings):
    """What is measured on a kind of device."""

    sizes: Annotated[list[BatchSettings], Field(min_length=1)]
    dtypes: Annotated[list[Dtype], Field(min_length=1)]
    check_samples: Count
    product: Count
    repeats: Count
    min_seconds: Seconds


class StepSettings(Settings):
    """Config group `benchmark`, option `step`."""

    name: Literal["step"]
    dim: Count
    cpu: StepOnDevice
    cuda: StepOnDevice


@dataclass(frozen=True)
class Product:
    """A product of matrices, and how long it took."""

    shape: Shape
    dtype: Dtype
    seconds: float

    @property
    def name(self) -> str:
        m, k, n = self.shape
        return f"[{m} x {k}] · [{k} x {n}], {SHORT[self.dtype]}"

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return product_rate(self.shape, self.seconds)

    def row(self, size: int) -> Row:
        return Row("step", PRODUCT, size, self.name, self.seconds)


def run(settings: StepSettings, device: torch.device, seed: int, say: Callable[[str], None]) -> Findings:
    """All variants at all sizes.

    Raises:
        RuntimeError: a variant gave other outputs or gradients than plain autograd, or flows ended early.
    """
    own = settings.cuda if device.type == "cuda" else settings.cpu
    allow_deterministic_products()
    dtypes, notes = usable_dtypes(own.dtypes, device)
    rows: list[Row] = []
    rates, shares = [], []
    for size in own.sizes:
        workload = Workload.read(size, settings.dim, device, seed).where_no_flow_ends()
        flows = f"{workload.num_flows(size.batch):,} flows"
        say(f"{flows}: comparing outputs and gradients")
        check(workload, min(size.batch, own.check_samples))
        say(f"{flows}: timing")
        products, steps = _measure(workload, size, dtypes, own)
        rows += [one.row(workload.num_flows(size.batch)) for one in products] + steps
        say(f"{flows}: deterministic algorithms, and flows that end early")
        rows += rows_of_modes(
            workload, f"{size.size}, {flows}", size.batch, dtypes[-1], repeats=own.repeats, min_seconds=own.min_seconds
        )
        rates += [(flows, one.name, f"{one.rate / 1e12:,.3g} TFLOP/s") for one in products]
        shares.append(share_grid(steps, products, f"{size.size}, {flows}"))
        notes.append(_about(size, workload))
    notes.append(
        "a step is forward and backward with both maps, gradients set to None before; arithmetic: three times the "
        "forward pass's recurrent products; ratios are to the first dtype's eager step"
    )
    rate_grid = Grid("Rate of products, timed in turn with the steps", ("beside", "product", "rate"), tuple(rates))
    return Findings(rows, [rate_grid, *shares], notes)


def picture(rows: list[Row]) -> Figure:
    """Seconds and peak memory of every variant, per size."""

    def colour(variant: str) -> int:
        return 3 if variant.startswith(LIMIT) else 2 if variant.startswith(TAPE) else int(not variant.startswith(EAGER))

    cases = list(dict.fromkeys(row.case for row in rows if row.share is not None))
    kinds = ("plain autograd", "what a user would write", "tape", "arithmetic alone")
    return figure_of_bars(rows, cases, "One training step: forward and backward", kinds, colour)


def usable_dtypes(wanted: list[Dtype], device: torch.device) -> tuple[list[Dtype], list[str]]:
    """The dtypes that this machine has matrix units for, and a note where one is left out."""
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return list(wanted), []
    left: list[Dtype] = [dtype for dtype in wanted if dtype != "bfloat16"]
    return left, ["bf16 was not measured: this CPU has no AMX"] if left != wanted else []


def steps_of(workload: Workload, batch: int, dtype: Dtype) -> dict[str, Callable[[], Step]]:
    """What builds each variant: plain autograd first, what a user would write, the tape in its forms."""
    data, on_gpu = workload.batch(batch), workload.device.type == "cuda"

    def ours(**rollout: Any) -> Callable[[], Step]:
        return lambda: step_of(workload.processor(**rollout), *data, dtype)

    def users(recurrence: Recurrence, compiled: bool = False) -> Callable[[], Step]:
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
    if on_gpu:
        steps[GRAPHED] = lambda: graphed_step(UserModel(workload.processor(), "formula", compiled=True), *data, dtype)
        steps |= {TAPE: ours(engine="tape"), LEAN: ours(engine="tape", recompute=True)}
    else:  # there "auto" compiles large models alone
        for name, compiled_name, lean in ((TAPE, TAPE_COMPILED, False), (LEAN, LEAN_COMPILED, True)):
            steps[name] = ours(engine="tape", recompute=lean, compile=False)
            steps[compiled_name] = ours(engine="tape", recompute=lean, compile=True)
    if batch > 1:
        steps[CHUNKS] = ours(engine="tape", chunk=-(-batch // 2))
    return steps


def check(workload: Workload, batch: int) -> None:
    """All variants against plain autograd, in float32.

    Raises:
        RuntimeError: outputs or gradients differ by more than rounding.
    """
    steps = steps_of(workload, batch, "float32")
    # cuDNN's recurrent network may round to TF32 unless told not to.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = _outcome(steps[EAGER]())
        for name, build in steps.items():
            for what, value in _outcome(build()).items():
                require_near(f"{name}: {what}", expected[what], value, "float32")
    free(workload.device)


def require_near(what: str, expected: Tensor, found: Tensor, dtype: Dtype) -> None:
    """Raises RuntimeError if tensors differ by more than the dtype's tolerance, relative to the largest entry."""
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(f"{what} differs from that of plain autograd by {difference:.3g} of the largest entry")


def _outcome(step: Step) -> dict[str, Tensor]:
    """Output and gradients; after two steps more, so that what was recorded is replayed."""
    for _ in range(2):
        step.run()
    found = {"output": step.run().clone()}
    for name, parameter in step.parameters.items():
        assert parameter.grad is not None, name
        found[f"gradient of {name}"] = parameter.grad.clone()
    return found


def _measure(
    workload: Workload, size: BatchSettings, dtypes: list[Dtype], own: StepOnDevice
) -> tuple[list[Product], list[Row]]:
    """Products, large and square first, then with a row per flow; rows of steps, and of their arithmetic at that rate.

    The machine's rate changes while others use it: products and steps take turns, or shares would mean nothing.
    """
    flows, hidden, device = workload.num_flows(size.batch), workload.model.hidden_size, workload.device
    shapes: list[Shape] = [(own.product,) * 3, (flows, hidden, 3 * hidden)]
    builds: dict[Any, Build] = {}
    for dtype in dtypes:
        builds |= {(shape, dtype): product(shape, dtype, device) for shape in shapes}
        expected = _output(workload, size.batch, dtype)
        for name, build in steps_of(workload, size.batch, dtype).items():
            builds[f"{name}, {SHORT[dtype]}"] = _checked(name, build, expected, dtype)
    found = measure_in_turns(builds, device, repeats=own.repeats, min_seconds=own.min_seconds)
    products = [Product(shape, dtype, found[shape, dtype].seconds or math.inf) for shape in shapes for dtype in dtypes]
    baseline = f"{EAGER}, {SHORT[dtypes[0]]}"
    case, base = f"{size.size}, {flows:,} flows; ratio to {baseline}", found[baseline].seconds
    rows = []
    for square in products[: len(dtypes)]:
        least = workload.arithmetic(size.batch) / square.rate
        own_names = [name for name in found if isinstance(name, str) and name.endswith(SHORT[square.dtype])]
        timed = [(name, found[name].seconds, found[name].peak_bytes) for name in own_names]
        timed.append((f"{LIMIT} {own.product}³, {SHORT[square.dtype]}", least, None))
        for name, seconds, peak in timed:
            ratio, share = (base / seconds if base and seconds else None, least / seconds if seconds else None)
            rows.append(Row("step", case, flows, name, seconds, peak, ratio, share))
    return products, rows


def _output(workload: Workload, batch: int, dtype: Dtype) -> Tensor:
    """What plain autograd gives; all flows must be active in all steps, or there is less to do than is said."""
    processor = workload.processor(engine="autograd")
    with torch.no_grad(), autocast(dtype, workload.device):
        output = processor(workload.batch(batch)[0])
    if float(output.statistics["active_share"]) != 1:
        raise RuntimeError(f"only {float(output.statistics['active_share']):.1%} of all flows were active in all steps")
    return output.embedding.float()


def _checked(name: str, build: Callable[[], Step], expected: Tensor, dtype: Dtype) -> Build:
    """Builds a step whose output, also in the dtype and at the size that are timed, is the expected one."""

    def built() -> Callable[[], Tensor]:
        step = build()
        require_near(f"{name}, {SHORT[dtype]}: output", expected, step.run().float(), dtype)
        return step.run

    return built


def share_grid(rows: list[Row], products: list[Product], title: str) -> Grid:
    """How near every variant comes to its arithmetic at the rate of either product."""
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
