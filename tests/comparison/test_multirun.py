"""Comparison of the models of a multirun: groups, pairs, missing jobs, files and the table."""

import csv
from pathlib import Path

import pytest
import torch
from rich.console import Console

from energy_flow.comparison.compare import ALONE, Comparison, Method
from energy_flow.comparison.jobs import distinguishing_overrides, read_jobs
from energy_flow.comparison.multirun import compare_jobs
from energy_flow.comparison.report import comparison_table, write_comparison
from energy_flow.metrics.bootstrap import Interval
from energy_flow.metrics.task import REGRESSION, RETRIEVAL
from tests.comparison.sweeps import NUM_ROWS, paired_difference, ranks_about, write_job


def found_in(folder: Path) -> Comparison:
    comparison = compare_jobs(read_jobs(folder))
    assert comparison is not None
    return comparison


def by_name(comparison: Comparison) -> dict[str, Method]:
    return {method.name: method for method in comparison.methods.values()}


def to_reference(comparison: Comparison, method: Method) -> Interval | None:
    return comparison.difference(method.key, comparison.reference.key)


def write_ablation(folder: Path) -> None:
    """full with two baselines and no_flows, two seeds each, jobs in the order of a sweep."""
    for number, (seed, name, middle) in enumerate(
        [(1, "full", 8.0), (1, "no_flows", 12.0), (2, "full", 8.0), (2, "no_flows", 12.0)]
    ):
        values = {"model": ranks_about(middle, 100 + number)}
        if name == "full":
            values |= {"ridge": ranks_about(15.0, 3), "identity": ranks_about(20.0, 4)}
        write_job(folder, number, f"experiment=ablation seed={seed} ablation={name}", values)


def test_jobs_that_differ_by_their_seed_are_one_model(tmp_path: Path) -> None:
    write_ablation(tmp_path)
    comparison = found_in(tmp_path)
    assert (comparison.task, comparison.reference.name) == (RETRIEVAL, "full")
    methods = comparison.methods.values()
    assert [method.name for method in methods] == ["full", "no_flows", "identity", "ridge"]
    assert [method.is_baseline for method in methods] == [False, False, True, True]
    full = comparison.reference
    assert full.seeds == (1, 2)
    assert full.primary == tuple((1 / ranks_about(8.0, 100 + n)).mean().item() for n in (0, 2))
    mean = comparison.interval(full.key)
    assert mean is not None
    assert mean.mean == pytest.approx(sum(full.primary) / 2)
    assert full.metrics["params"] == 1001.0
    assert full.metrics["fit_seconds"] == 3.5
    assert full.metrics["recall@10"] is None


def test_differences_are_paired(tmp_path: Path) -> None:
    write_ablation(tmp_path)
    comparison = found_in(tmp_path)
    methods = by_name(comparison)
    ours, theirs = (
        torch.stack([1 / ranks_about(m, s) for s in pair]) for m, pair in ((12, (101, 103)), (8, (100, 102)))
    )
    expected, found = paired_difference(ours, theirs), to_reference(comparison, methods["no_flows"])
    assert found is not None
    assert found.mean == pytest.approx(expected.mean)
    # Other samples of the same distribution.
    assert (found.low, found.high) == pytest.approx(
        (expected.low, expected.high), abs=0.1 * (expected.high - expected.low)
    )
    ridge, full = to_reference(comparison, methods["ridge"]), comparison.interval(methods["full"].key)
    assert ridge is not None
    assert full is not None
    assert ridge.mean == pytest.approx(methods["ridge"].primary[0] - full.mean)


def test_seeds_of_one_model_and_its_baselines(tmp_path: Path) -> None:
    for number in range(2):
        write_job(tmp_path, number, f"seed={number + 4}", {"model": ranks_about(8, number), "ridge": ranks_about(9, 7)})
    comparison = found_in(tmp_path)
    assert [(method.name, method.seeds) for method in comparison.methods.values()] == [
        (ALONE, (4, 5)),
        ("ridge", (4, 5)),
    ]


def test_one_job_gives_no_comparison(tmp_path: Path) -> None:
    write_job(tmp_path, 0, "seed=1", {"model": ranks_about(8, 1), "ridge": ranks_about(9, 7)})
    assert compare_jobs(read_jobs(tmp_path)) is None


def test_jobs_without_rows_are_missing_seeds(tmp_path: Path) -> None:
    write_ablation(tmp_path)
    write_job(tmp_path, 4, "experiment=ablation seed=3 ablation=full", None)
    write_job(tmp_path, 5, "experiment=ablation seed=3 ablation=no_flows", {"model": ranks_about(8, 1)})
    (tmp_path / "5" / "test_rows.safetensors").write_bytes(b"damaged")
    write_job(tmp_path, 6, "experiment=ablation seed=1 ablation=nearest", None)
    comparison = found_in(tmp_path)
    methods = by_name(comparison)
    assert methods["full"].missing == ("seed 3 (job 4)",)
    assert methods["full"].seeds == (1, 2)
    assert methods["no_flows"].missing[0].startswith("seed 3 (job 5, ")
    assert "damaged" in methods["no_flows"].missing[0]
    nearest = methods["nearest"]
    assert (nearest.primary, comparison.interval(nearest.key), to_reference(comparison, nearest)) == ((), None, None)
    assert nearest.note == "no job has row scores"


def test_the_first_model_with_rows_is_the_reference(tmp_path: Path) -> None:
    write_job(tmp_path, 0, "lattice.depth=0", None)
    write_job(tmp_path, 1, "lattice.depth=4", {"model": ranks_about(8, 1)})
    write_job(tmp_path, 2, "lattice.depth=6", {"model": ranks_about(8, 2)})
    comparison = found_in(tmp_path)
    assert comparison.reference.name == "lattice.depth=4"
    failed, _, other = comparison.models
    assert to_reference(comparison, failed) is None
    assert to_reference(comparison, other) is not None


def test_no_tested_job(tmp_path: Path) -> None:
    for number in range(2):
        write_job(tmp_path, number, f"seed={number}", None)
    assert compare_jobs(read_jobs(tmp_path)) is None


def test_models_with_other_test_data_are_not_compared(tmp_path: Path) -> None:
    write_job(tmp_path, 0, "data.test=a", {"model": ranks_about(8, 1)})
    write_job(tmp_path, 1, "data.test=b", {"model": ranks_about(8, 2)[:50]}, fingerprint="other")
    write_job(tmp_path, 2, "data.test=c seed=1", {"model": ranks_about(8, 2)}, fingerprint="one")
    write_job(tmp_path, 3, "data.test=c seed=2", {"model": ranks_about(8, 2)}, fingerprint="two")
    write_job(tmp_path, 4, "data.test=d", {"model": ranks_about(8, 2)}, measure="mse")
    comparison = found_in(tmp_path)
    _, other, varying, errors = comparison.models
    assert (other.note, to_reference(comparison, other)) == ("other test data: no difference", None)
    assert comparison.interval(other.key) is not None
    assert varying.note == "test data differ between seeds: no interval, no difference"
    assert comparison.interval(varying.key) is None
    assert len(varying.primary) == 2
    assert (errors.note, errors.primary) == ("measured by another metric: not comparable", ())
    assert comparison.interval(errors.key) is None


def test_errors_are_compared_without_ranks(tmp_path: Path) -> None:
    for number, size in enumerate((0.1, 0.3)):
        values = {"model": size * torch.linspace(0.9, 1.1, NUM_ROWS, dtype=torch.float64)}
        write_job(tmp_path, number, f"lattice.depth={number}", values, measure="mse")
    comparison = found_in(tmp_path)
    assert comparison.task is REGRESSION
    difference = to_reference(comparison, comparison.models[1])
    assert difference is not None
    assert difference.mean == pytest.approx(0.2)


def test_distinguishing_overrides() -> None:
    assert distinguishing_overrides([("a=1", "b=2"), ("a=1", "b=3 4")]) == ["b=2", "'b=3 4'"]
    assert distinguishing_overrides([("a=1",)]) == ["a=1"]


def test_files(tmp_path: Path) -> None:
    write_ablation(tmp_path)
    write_job(tmp_path, 4, "experiment=ablation seed=3 ablation=full", None)
    comparison = found_in(tmp_path)
    write_comparison(tmp_path, comparison)
    text = (tmp_path / "comparison.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| method | seeds | MRR | each seed | difference to full | R@1 | R@10 | parameters |")
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert "missing: seed 3 (job 4)" in lines[2]
    no_flows = to_reference(comparison, by_name(comparison)["no_flows"])
    assert no_flows is not None
    assert f"{no_flows.mean:+.4f} [{no_flows.low:+.4f}, {no_flows.high:+.4f}]" in lines[3]
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [row["kind"] for row in rows] == ["model", "model", "baseline", "baseline"]
    assert float(rows[1]["difference_low"]) == no_flows.low
    assert rows[0]["seeds"] == "1 2"
    assert rows[0]["difference"] == ""
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_on_the_screen(tmp_path: Path) -> None:
    write_ablation(tmp_path)
    write_job(tmp_path, 4, "experiment=ablation seed=3 ablation=full", None)
    console = Console(width=84, record=True, quiet=False, file=(tmp_path / "screen").open("w"))
    console.print(comparison_table(found_in(tmp_path)))
    shown = console.export_text()
    assert "Comparison of 2 models" in shown
    assert "full: missing: seed 3 (job 4)" in shown
    (line,) = [line for line in shown.splitlines() if "│ no_flows" in line]
    assert "[-0." in line
    assert "…" not in shown
