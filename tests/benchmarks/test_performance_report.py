"""The document that answers the performance analysis names code, tests and benchmark cases that exist."""

import ast
import re
from pathlib import Path

import pytest

from energy_flow_benchmarks import registry, report

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance-report.md").read_text()
FIELDS = ["Asked", "Answer", "Code", "Tests", "Benchmark"]
ITEMS = {
    heading: dict(re.findall(r"^- (\w+): (.*?)(?=^- |\Z)", body, re.M | re.S))
    for heading, body in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
}
COUNTS = {"Finding": 5, "Root cause": 5, "Solution": 5, "Decision": 3, "Priority": 3, "Metric": 3, "Criterion": 3}


def exists(place: str) -> bool:
    """Whether `path` or `path::Class.function` (a test: `path::Class::function`) exists."""
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


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_item_has_an_answer() -> None:
    expected = [f"{kind} {number + 1}" for kind, count in COUNTS.items() for number in range(count)]
    assert [heading.split(":")[0] for heading in ITEMS] == expected


@pytest.mark.parametrize("heading", ITEMS)
def test_code_tests_and_cases_exist(heading: str) -> None:
    item = ITEMS[heading]
    assert list(item) == FIELDS
    code, tests = quoted(item["Code"]), quoted(item["Tests"])
    assert code
    assert tests
    for place in code + tests:
        assert exists(place), place
    assert all(re.search(r"::test_\w+$", test) for test in tests)
    if item["Benchmark"].strip() != "none; the tests hold it":
        assert quoted(item["Benchmark"])[0] == "benchmark=report"
        cases = re.findall(r"case `([^`]+)`", item["Benchmark"])
        assert cases
        assert set(cases) <= set(report.CASES)


def test_other_names_on_the_page_exist() -> None:
    assert set(re.findall(r"benchmark=(\w+)", PAGE)) <= set(registry.BENCHMARKS)
    table = re.findall(r"^\| (\w+.*?) \| `([^`]+)` \| (.*?) \|", PAGE, re.M)
    assert table[:-1] == [(line, case, expected) for line, expected, case in report.EXPECTED]
    assert table[-1][1] in report.CASES


def test_a_missing_name_is_found() -> None:
    assert exists("energy_flow/core/energy_lattice.py::EnergyLattice.collect")
    assert not exists("energy_flow/core/energy_lattice.py::EnergyLattice.colect")
    assert not exists("energy_flow/core/energy_lattices.py")
    assert not exists("tests/core/test_memory.py::test_memory_is_reused"), "it is in a class"
