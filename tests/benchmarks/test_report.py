"""Both sides of the report's benchmark are equal, differences are found, and the answers are where they are said."""

import ast
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
from energy_flow_benchmarks import answers, before, report
from energy_flow_benchmarks.curves import loss_curves, training_step
from energy_flow_benchmarks.findings import Row
from energy_flow_benchmarks.flows import (
    as_list,
    as_tensors,
    finished_flows,
    lattice_settings,
    plane_of,
    under_way,
)
from energy_flow_benchmarks.measure import Prepared, Work
from energy_flow_benchmarks.report import EndOfBatch, ReportSettings, require_equal
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


def end_of_batch(num_flows: int = 96, seed: int = 3) -> EndOfBatch:
    return EndOfBatch(tiny(), num_flows, CPU, seed)


def once(work: Work) -> Any:
    return work.run(work.setup()) if isinstance(work, Prepared) else work()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("num_flows", [4, 64, 400])
def test_both_sides_give_the_same(num_flows: int, seed: int) -> None:
    batch = end_of_batch(num_flows, seed)
    cases = batch.cases()
    assert tuple(cases) == answers.TIME_CASES
    for pair in cases.values():
        pair.check(once(pair.before), once(pair.now))
    surface = once(cases["end of batch"].now)
    assert surface.shape == (4, num_flows // 4, 2)
    assert surface.requires_grad, "training collects with a graph"
    assert surface.any()


def test_both_sides_give_the_same_gradients() -> None:
    batch = end_of_batch()
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
    batch = end_of_batch(400)
    states = [flow.status for flow in as_list(batch.flows).values()]
    assert {before.REACHED, before.PROJECTED, before.REMOVED} == set(states)
    assert states.count(before.REMOVED) < 60
    moving = under_way(batch.flows)
    assert int((moving.status == FlowStatus.ACTIVE).sum()) == states.count(before.PROJECTED)
    reached = batch.flows.position[..., 2].abs() == 1
    assert torch.equal(reached, batch.flows.status == FlowStatus.REACHED)


def test_the_list_version_leaves_active_flows_alone() -> None:
    flows = as_list(under_way(end_of_batch().flows))
    active = [key for key, flow in flows.items() if flow.status == before.ACTIVE]
    before.cleanup(flows, CPU)
    assert list(flows) == active
    assert active


@pytest.mark.parametrize("case", ["collection", "aggregation", "data processing", "end of batch"])
def test_a_difference_between_the_sides_is_found(case: str) -> None:
    batch = end_of_batch()
    pair = batch.cases()[case]
    old = once(pair.before)
    batch.flows = finished_flows(4, batch.lattice_settings, 2, 3, CPU, seed=99)
    new = once(batch.cases()[case].now)
    with pytest.raises(RuntimeError, match=case):
        pair.check(old, new)


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.tensor([1.0, 2.0, 3.1]), torch.full((3,), torch.nan)])
def test_require_equal_refuses(wrong: torch.Tensor) -> None:
    right = torch.tensor([1.0, 2.0, 3.0])
    require_equal("it", right, right + 1e-7)
    with pytest.raises(RuntimeError, match="it: "):
        require_equal("it", right, wrong)


def test_a_cleanup_that_frees_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlowProcessor, "cleanup_memory_safe", lambda self: 0)
    pair = end_of_batch().cases()["cleanup"]
    with pytest.raises(RuntimeError, match="cleanup"):
        pair.check(once(pair.before), once(pair.now))


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


def test_steps_of_both_sides_start_alike_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lattice = lattice_settings(2, 2, depth=4)
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
def test_settings_that_can_not_work(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    for part in parts:
        assert part in str(error.value)


def measured(seconds: dict[str, float], peaks: dict[str, int]) -> list[Row]:
    rows = []
    for size in (1000, 20000, 50000):
        for side in ("before", "now"):
            cases = (*answers.TIME_CASES, "training step")
            rows += [Row("report", f"{case}; ratio to before", size, side, seconds[side]) for case in cases]
            rows.append(Row("report", answers.MEMORY, size, side, None, peak_bytes=peaks[side]))
    return rows


def test_figures_say_how_much_less_or_more() -> None:
    rows = measured({"before": 1.0, "now": 0.0004}, {"before": 100, "now": 150})
    impact = answers.impact_grid(rows, 3e-16)
    lines = {line[0]: line[1:] for line in impact.lines}
    assert lines["Solution 1: collection time"] == ("50-70% less", *("99.96% less",) * 3)
    assert lines["Criterion: peak memory usage"][1] == "50.0% more"
    assert lines["Criterion: training accuracy and convergence"][1] == "losses equal to 3e-16"
    rows = [replace(row, seconds=0.5) if row.size == 20000 and row.variant == "now" else row for row in rows]
    table = {line[0]: line[-1] for line in answers.answers_grid(rows, 3e-16).lines}
    assert table["Finding 1: flow collection at batch end"] == "collection: 50.0% less time at 20,000 flows"
    assert table["Root cause 3: CPU-GPU synchronisation"] == "held by the tests"


def test_every_item_of_the_report_has_an_answer() -> None:
    kinds = ["Finding", "Root cause", "Solution", "Decision 2025-08-12", "Criterion", "Metric"]
    counts = [sum(answer.item.startswith(f"{kind}") for answer in answers.ANSWERS) for kind in kinds]
    assert counts == [5, 5, 5, 3, 3, 3]
    numbers = [int(found[1]) for answer in answers.ANSWERS if (found := re.match(r"[A-Z][a-z ]+ (\d):", answer.item))]
    assert numbers == [1, 2, 3, 4, 5] * 3
    assert len({answer.item for answer in answers.ANSWERS}) == len(answers.ANSWERS)


def exists(place: str) -> bool:
    """Whether `path` or `path::Class.function` (of tests `path::Class::function`) is there."""
    path, _, names = place.partition("::")
    if not (ROOT / path).is_file():
        return False
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    for name in re.split(r"::|\.", names) if names else []:
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize("answer", answers.ANSWERS, ids=lambda answer: answer.item)
def test_answers_are_where_they_are_said(answer: answers.Answer) -> None:
    assert answer.where
    assert answer.tests
    for place in (*answer.where, *answer.tests):
        assert exists(place), place
    assert all(re.search(r"::test_\w+$", test) for test in answer.tests)


def test_a_place_that_is_not_there_is_found() -> None:
    assert exists("energy_flow/core/energy_lattice.py::EnergyLattice.collect")
    assert not exists("energy_flow/core/energy_lattice.py::EnergyLattice.colect")
    assert not exists("energy_flow/core/energy_lattices.py")
    assert not exists("tests/core/test_memory.py::test_memory_is_reused_and_zeroed"), "it is in a class"


def test_nothing_else_imports_the_earlier_version() -> None:
    own = ROOT / "energy_flow" / "benchmarks"
    for path in (ROOT / "energy_flow").rglob("*.py"):
        if path.parent != own:
            assert "benchmarks.before" not in path.read_text(), path
            assert "benchmarks import before" not in path.read_text(), path
