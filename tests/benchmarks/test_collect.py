"""All methods of collection give the same values and gradients; a method with a difference is found."""

from typing import Any

import pytest
import torch

from energy_flow.core.geometry import Deposit
from energy_flow.settings import read
from energy_flow_benchmarks import collect
from energy_flow_benchmarks.collect import CollectSettings, forward_backward, make_problem, methods, require_same

CPU = torch.device("cpu")
METHODS = [(deposit, name) for deposit in collect.DEPOSITS for name in methods(deposit)]


@pytest.mark.parametrize("num_landings", [1, 50, 700])
@pytest.mark.parametrize(("deposit", "name"), METHODS)
def test_all_methods_are_equal(deposit: Deposit, name: str, num_landings: int) -> None:
    problem = make_problem(num_landings, deposit, 10, CPU, seed=4)
    expected = forward_backward(collect.ours, problem)
    found = forward_backward(methods(deposit)[name], problem)
    assert len(found) == (4 if deposit == "bilinear" else 3)
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)
    require_same(name, expected, found)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_difference_is_found(part: int) -> None:
    problem = make_problem(50, "nearest", 5, CPU, seed=4)
    expected = forward_backward(collect.ours, problem)
    wrong = [tensor.clone() for tensor in expected]
    wrong[part].view(-1)[7] += 0.1
    with pytest.raises(RuntimeError, match=("values", "scores", "energies")[part]):
        require_same("it", expected, tuple(wrong))


def test_groups_are_shared_and_some_are_empty() -> None:
    problem = make_problem(700, "nearest", 10, CPU, seed=4)
    counts = torch.bincount(problem.keys.flatten(), minlength=len(problem.grad))
    assert len(problem.grad) == len(counts) == 700
    assert int(counts.max()) > 1
    assert int(counts.min()) == 0
    sample = torch.arange(700) // 100
    assert torch.equal(problem.keys[:, 0] // 100, sample), "landings stay in their sample"


def test_bytes_that_must_move() -> None:
    problem = make_problem(100, "nearest", 10, CPU, seed=4)
    # Score 4, energy 4, key 8, weight 4, twice; values and mass of 100 groups out, their gradient in; 2 gradients out.
    assert problem.bytes_moved == 100 * (2 * 20 + 8 + 4 + 8)
    problem = make_problem(100, "bilinear", 10, CPU, seed=4)
    assert problem.bytes_moved == 100 * (2 * (8 + 4 * 12) + 8 + 4 + 8 + 16)


def run(**changes: Any) -> list[Any]:
    section = {"name": "collect", "landings": [30], "cuda_landings": [10**9], "lattice_width": 4, "repeats": 1}
    settings = read(CollectSettings, {**section, "min_seconds": 0.0, **changes}, "benchmark")
    progress: list[str] = []
    return [collect.run(settings, CPU, 1, progress.append), progress]


def test_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "COPIED", 1000)
    findings, progress = run()
    assert progress == ["copy rate", "nearest, 30 landings", "bilinear, 30 landings"], "a billion is for a GPU"
    for deposit in collect.DEPOSITS:
        rows = [row for row in findings.rows if row.case.startswith(deposit)]
        assert [row.variant for row in rows] == [*methods(deposit), collect.COPY]
        base = next(row for row in rows if row.variant == collect.UNIQUE)
        for row in rows:
            assert row.size == 30
            assert row.ratio == pytest.approx(base.seconds / row.seconds)
    (grid,) = findings.grids
    assert grid.columns == ("method", "30 landings")
    assert len(grid.lines) == len(METHODS)


def test_pyg_is_left_out_if_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "COPIED", 1000)
    monkeypatch.setattr(collect.importlib.util, "find_spec", lambda name: None)
    findings, _ = run()
    assert collect.PYG not in {row.variant for row in findings.rows}
    assert any("torch_geometric is not installed" in note for note in findings.notes)


def test_results_that_differ_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "COPIED", 1000)
    monkeypatch.setattr(collect, "unique_scatter", lambda problem: collect.ours(problem) * 2)
    with pytest.raises(RuntimeError, match=r"unique \+ scatter: values"):
        run()
