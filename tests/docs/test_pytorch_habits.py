"""The tests that docs/howto/pytorch_habits.md names exist, and every test of that folder has its row."""

import ast
import re

import pytest

from tests.docs.documents import ROOT, read

PAGE = ROOT / "docs" / "howto" / "pytorch_habits.md"
FOLDER = ROOT / "tests" / "core" / "habits"
ROWS = [line for line in read(PAGE).splitlines() if re.match(r"\| (?!you do this|---)", line) and "test_" in line]
NAMED = set(re.findall(r"`(test_\w+\.py::test_\w+)`", read(PAGE)))
OF_THE_CHECKS = {"test_helpers.py"}  # tests of the checks themselves
OF_THE_CASES = {"test_modes.py::test_the_case_is_calm"}


def written() -> set[str]:
    """All tests of the folder, as `file::test`."""
    return {
        f"{path.name}::{node.name}"
        for path in FOLDER.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_named_tests_exist() -> None:
    assert not NAMED - written()


def test_every_test_has_a_row() -> None:
    expected = {test for test in written() if test.split("::")[0] not in OF_THE_CHECKS} - OF_THE_CASES
    assert not expected - NAMED


@pytest.mark.parametrize("row", ROWS)
def test_every_row_names_a_test(row: str) -> None:
    habit, happens, tests = (cell.strip() for cell in row.strip("| ").split(" | "))
    assert habit
    assert happens
    assert re.fullmatch(r"`[\w.:]+`(, `[\w.:]+`)*", tests)


def test_there_are_rows_for_all_groups() -> None:
    assert len(ROWS) > 40
