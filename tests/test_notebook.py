"""The notebook runs in any folder, and its stored outputs come from a clean run."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "picture_book.ipynb"
MAX_BYTES = 1_500_000
MACHINE_PATH = re.compile(r"/(home|root|tmp|work|Users|usr|opt|var|mnt)/|[A-Z]:\\\\|site-packages")


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    for cell in code_cells(notebook):
        yield from cell.outputs


def figures(notebook: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def printed(output: NotebookNode) -> str:
    """All text of an output, without pictures."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return str({**output, "data": data})


def test_the_stored_outputs_are_a_clean_run() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run top to bottom"
    assert figures(notebook) == 9
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not MACHINE_PATH.search(printed(output)), printed(output)


def test_no_machine_path_in_the_cells() -> None:
    for cell in read().cells:
        assert not MACHINE_PATH.search(cell.source), cell.source


def test_every_figure_has_a_caption() -> None:
    cells = read().cells
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert following is not None
            assert following.cell_type == "markdown"
            assert following.source.startswith("*"), following.source


@pytest.mark.slow
def test_it_runs_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel starts in another folder, so it needs the path of a checkout that isn't installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = read()
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert re.fullmatch(r"STEPS = \d+  # .*", parameters.source)
    parameters.source = "STEPS = 3"
    stored = figures(notebook)
    # This raises at the first cell with an error. The notebook has assertions of its own.
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert figures(notebook) == stored
    assert list(tmp_path.iterdir()) == [], "the notebook wrote files"
