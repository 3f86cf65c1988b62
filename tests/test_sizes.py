"""No file and no function is too long."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("energy_flow", "energy_flow_benchmarks", "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
MAX_FILE, MAX_FUNCTION = 350, 60  # lines


def too_long(source: str) -> Iterator[str]:
    num_lines = source.count("\n")
    if num_lines > MAX_FILE:
        yield f"{num_lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path: Path) -> None:
    assert list(too_long(path.read_text())) == []


def test_a_long_function_is_found() -> None:
    assert list(too_long("x = 1\n" * (MAX_FILE + 1))) == [f"{MAX_FILE + 1} lines"]
    assert list(too_long("def f():\n" + "    x = 1\n" * MAX_FUNCTION)) == [f"f: {MAX_FUNCTION + 1} lines"]
    assert list(too_long("def f():\n" + "    x = 1\n" * (MAX_FUNCTION - 1))) == []
