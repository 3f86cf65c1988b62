"""Both sides of the report's benchmark are equal, and differences are found."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.tensorized_flow_storage import FlowStatus
from energy_flow.errors import ConfigError
from energy_flow.settings import read
from energy_flow_benchmarks import before, end_of_batch, report
from energy_flow_benchmarks.end_of_batch import EndOfBatch
from energy_flow_benchmarks.findings import Row
from energy_flow_benchmarks.flows import as_list, as_tensors, finished_flows, plane_of, report_lattice, under_way
from energy_flow_benchmarks.measure import ready
from energy_flow_benchmarks.report import ReportSettings, loss_curves, training_step
from tests.helpers import Case, assert_near

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "name": "report",
    "flows": [64],
    "samples": 4,
    "energy_dim": 2,
    "hidden_size": 3,
    "training_flows": [8],
    "curve_steps": 3,
    "repeats": 1,
    "min_seconds": 0.0,
}


def tiny(**changes: Any) -> ReportSettings:
    return read(ReportSettings, {**TINY, **changes}, "benchmark")


def batch_of(num_flows: int = 96, seed: int = 3) -> EndOfBatch:
    return EndOfBatch(num_flows, 4, 2, 3, CPU, seed)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("num_flows", [4, 64, 400])
def test_both_sides_give_the_same(num_flows: int, seed: int) -> None:
    batch = batch_of(num_flows, seed)
    cases = batch.cases()
    assert tuple(cases) == end_of_batch.TIME_CASES
    for pair in cases.values():
        pair.check(ready(pair.before)(), ready(pair.now)())
    surface = ready(cases["end of batch"].now)()
    assert surface.shape == (4, num_flows // 4, 2)
    assert surface.requires_grad, "training collects with a graph"
    assert surface.any()


def test_both_sides_give_the_same_gradients() -> None:
    batch = batch_of()
    listed, tensors = as_list(batch.flows), as_tensors(batch.flows)
    old = batch._aggregate_before(batch._collect_before(listed))
    new = batch._aggregate_now(batch._collect_now(tensors))
    cotangent = torch.randn_like(old)
    energies, places = ([getattr(flow, name) for flow in listed.values()] for name in ("energy", "position"))
    found = torch.autograd.grad(old, energies + places, cotangent, allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, energies + places, strict=True)]
    leaves = [tensors.storage.state.energy, tensors.storage.state.position]
    for index, gradient in enumerate(torch.autograd.grad(new, leaves, cotangent)):
        mine = torch.stack(found[index * 96 : (index + 1) * 96])
        assert_near(gradient.reshape(96, -1), mine, 1e-5, ("energy", "position")[index])


def test_every_kind_of_flow_is_there() -> None:
    batch = batch_of(400)
    states = [flow.status for flow in as_list(batch.flows).values()]
    assert {before.REACHED, before.PROJECTED, before.REMOVED} == set(states)
    assert states.count(before.REMOVED) < 60
    moving = under_way(batch.flows)
    assert int((moving.status == FlowStatus.ACTIVE).sum()) == states.count(before.PROJECTED)
    reached = batch.flows.position[..., 2].abs() == 1
    assert torch.equal(reached, batch.flows.status == FlowStatus.REACHED)


def test_the_list_version_leaves_active_flows_alone() -> None:
    flows = as_list(under_way(batch_of().flows))
    active = [key for key, flow in flows.items() if flow.status == before.ACTIVE]
    before.cleanup(flows, CPU)
    assert list(flows) == active
    assert active


@pytest.mark.parametrize("case", ["collection", "aggregation", "data processing", "end of batch"])
def test_a_difference_between_the_sides_is_found(case: str) -> None:
    batch = batch_of()
    pair = batch.cases()[case]
    old = ready(pair.before)()
    batch.flows = finished_flows(4, batch.settings, 2, 3, CPU, seed=99)
    new = ready(batch.cases()[case].now)()
    with pytest.raises(RuntimeError, match=case):
        pair.check(old, new)


def test_two_flows_in_exchanged_cells_are_found() -> None:
    """The cell of every flow counts: the energies are equal, so no average differs."""
    batch = batch_of()
    batch.flows = batch.flows._replace(energy=torch.ones_like(batch.flows.energy))
    pair = batch.cases()["collection"]
    old, deposits = ready(pair.before)(), ready(pair.now)()
    pair.check(old, deposits)
    first, *others = (deposits.weights[:, 0] > 0).nonzero()[:, 0].tolist()
    second = next(flow for flow in others if deposits.keys[flow, 0] != deposits.keys[first, 0])
    deposits.keys[[first, second]] = deposits.keys[[second, first]]
    with pytest.raises(RuntimeError, match="collection: the two sides found different landings or cells"):
        pair.check(old, deposits)


@pytest.mark.parametrize(
    ("case", "allowed", "refused"),
    [("aggregation", 9e-6, 2e-5), ("end of batch", 9e-6, 2e-5), ("data processing", 0, 1e-4)],
)
def test_the_tolerance_is_absolute(case: str, allowed: float, refused: float) -> None:
    """Results far above 1 get no wider limit; active flows must be equal."""
    pair = batch_of().cases()[case]
    result = torch.full((2, 3), 100.0, dtype=torch.float64)

    def outcome(value: torch.Tensor) -> Any:
        return (value, value) if case == "data processing" else value

    pair.check(outcome(result), outcome(result + allowed))
    with pytest.raises(RuntimeError, match=f"{case}: .* differs from the reference by"):
        pair.check(outcome(result), outcome(result + refused))


def test_a_training_step_of_another_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"before": torch.tensor(100.0), "now": torch.tensor(100.0001)}
    monkeypatch.setattr(report, "training_step", lambda side, *_: lambda: losses[side])
    with pytest.raises(RuntimeError, match="training step: loss differs from the reference by"):
        report._training_rows(tiny(), 8, CPU, 1)


def test_a_cleanup_that_frees_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlowProcessor, "cleanup_memory_safe", lambda self: 0)
    pair = batch_of().cases()["cleanup"]
    with pytest.raises(RuntimeError, match="cleanup: 0 flows left before; 0 bytes freed and the last output kept now"):
        pair.check(ready(pair.before)(), ready(pair.now)())


def test_a_cleanup_that_keeps_the_last_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlowProcessor, "cleanup_memory_safe", lambda self: 8)
    pair = batch_of().cases()["cleanup"]
    with pytest.raises(RuntimeError, match="8 bytes freed and the last output kept now"):
        pair.check(ready(pair.before)(), ready(pair.now)())


@pytest.mark.parametrize(("num_flows", "plane"), [(125, (25, 5)), (2500, (50, 50)), (6250, (125, 50)), (7, (7, 1))])
def test_planes_are_as_square_as_can_be(num_flows: int, plane: tuple[int, int]) -> None:
    assert plane_of(num_flows) == plane


@pytest.mark.parametrize("changes", [{}, {"residual_energy": True, "num_layers": 2, "energy_dim": 3}])
def test_the_list_version_is_a_flow_lattice(changes: dict[str, Any]) -> None:
    case = Case(lattice={"deposit": "nearest", "width": 4, "height": 3}, model=changes, displacement=1.5)
    processor, embedding = case.processor(), case.embedding()
    output = processor(embedding)
    assert float(output.statistics["share_projected"]) not in (0, 1)
    assert_near(before.forward(processor, embedding), output.embedding, 1e-10, "embedding")


def test_the_loss_curves_are_equal_and_fall() -> None:
    curves, seconds = loss_curves(("before", "now"), 24, CPU, seed=1)
    assert torch.equal(curves["before"][:1], curves["before"][:1].abs()), "losses are positive"
    assert_near(curves["now"], curves["before"], report.CURVE_LIMIT, "loss curves")
    assert curves["now"][-1] < 0.9 * curves["now"][0]
    assert all(taken for taken in seconds.values())


def test_curves_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = {"before": torch.zeros(3), "now": torch.tensor([0.0, 0.0, 1e-7])}
    monkeypatch.setattr(report, "loss_curves", lambda *_: (curves, {"before": 1.0, "now": 1.0}))
    with pytest.raises(RuntimeError, match="differ by 1e-07"):
        report._curve_rows(tiny(), CPU, 1)


def test_steps_of_both_sides_start_alike_and_keep_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lattice = report_lattice(2, 2, depth=4)
    losses = [training_step(side, lattice, 1, 4, CPU, seed=8)() for side in ("before", "now")]
    assert_near(losses[0], losses[1], 1e-6, "first loss")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"flows": [10]}, ("benchmark.flows[0] = 10", "multiple of 4", "set it to 8")),
        ({"flows": [64, 8]}, ("benchmark.flows = [64, 8]", "ascending")),
        ({"flows": []}, ("benchmark.flows", "at least 1 item")),
        ({"training_flows": [3]}, ("benchmark.training_flows[0] = 3", "multiple of 2")),
        ({"flows": [8.5]}, ("benchmark.flows[0] = 8.5", "integer")),
        ({"repeats": 0}, ("benchmark.repeats = 0", "greater than or equal to 1")),
        ({"fows": 1}, ("benchmark.fows", "did you mean flows?")),
    ],
)
def test_invalid_settings(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    for part in parts:
        assert part in str(error.value)


def measured(seconds: dict[str, float], peaks: dict[str, int]) -> list[Row]:
    rows = []
    for size in (1000, 20000, 50000):
        for side in ("before", "now"):
            cases = (*end_of_batch.TIME_CASES, "training step")
            rows += [Row("report", f"{case}; ratio to before", size, side, seconds[side]) for case in cases]
            rows.append(Row("report", end_of_batch.MEMORY, size, side, None, peak_bytes=peaks[side]))
    return rows


def test_figures_say_how_much_less_or_more() -> None:
    rows = measured({"before": 1.0, "now": 0.0004}, {"before": 100, "now": 150})
    impact = report.impact_grid(rows, 3e-16)
    lines = {line[0]: line[1:] for line in impact.lines}
    assert lines["Solution 1: collection time"] == ("50-70% less", *("99.96% less",) * 3)
    assert lines["Criterion: peak memory usage"][1] == "50.0% more"
    assert lines["Criterion: training accuracy and convergence"][1] == "losses differ by 3e-16"
    assert impact.columns[:3] == ("line of the analysis", "expected", "1,000 flows")
    rows = [replace(row, seconds=None) for row in rows]
    assert report.impact_grid(rows, 0).lines[0][2] == "not measured"


def test_the_earlier_version_takes_only_parameters_from_the_framework() -> None:
    text = (ROOT / "energy_flow_benchmarks" / "before.py").read_text()
    imports = re.findall(r"^\s*(?:from|import) (energy_flow\S*.*)$", text, re.MULTILINE)
    assert imports == ["energy_flow.core.flow_processor import FlowProcessor"]


def test_nothing_else_imports_the_earlier_version() -> None:
    allowed = {"flows.py", "report.py", "end_of_batch.py"}
    paths = [path for folder in ("energy_flow", "energy_flow_benchmarks") for path in (ROOT / folder).rglob("*.py")]
    importers = {path.name for path in paths if re.search(r"benchmarks(\.| import )before", path.read_text())}
    assert importers == allowed
