"""Imports run one way, from the entry points down to ops. Rollouts don't wait for the device."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "energy_flow"
BENCHMARKS = PACKAGE.parent / "energy_flow_benchmarks"
ENTRY_POINT = 8
TIERS = {
    "ops": 0,
    "core": 1,
    "metrics": 2,
    "config": 3,
    "config_comments": 3,
    "config_reference": 3,
    "checkpoints": 3,
    "data": 4,
    "viz": 4,
    "pretrained": 4,
    "training": 5,
    "comparison": 6,
    "runs": 7,
}
# Packages that must not import the lattice.
WITHOUT_CORE = {"metrics", "checkpoints", "config"}
# `core` is what a lattice is, `core.engine` the same numbers, faster: one module chooses between them.
MAY_USE_ENGINE = [["core", "flow_processor"]]
FREE = {"atomic", "errors", "settings", "signals", "tables", "targets", "version"}
HEAVY = {"lightning", "hydra", "omegaconf", "matplotlib", "tensorboard"}
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "synchronize"}
# These may wait: they run between batches, for users who read a result, or only on a CPU.
MAY_WAIT = {"collect_completed_flows_surface_direct", "seconds", "_with_active_only", "_witness_step"}

SOURCES = sorted([*PACKAGE.rglob("*.py"), *BENCHMARKS.rglob("*.py")])


def relative(path: Path) -> Path:
    """The module relative to the package. The benchmarks have the tier of the entry points."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else PACKAGE.parent)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of all imported modules; `package` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                if node.level
                else node.module
            )
            assert base is not None
            yield from (f"{base}.{alias.name}" for alias in node.names)


def tier(parts: list[str]) -> int | None:
    """The tier of a module by its parts below the package. None: every module may import it."""
    if not parts or parts[0] in FREE:
        return None
    return TIERS.get(parts[0], ENTRY_POINT)


def wrong_imports(source: str, relative: Path) -> list[str]:
    own_parts = [*relative.parent.parts, relative.stem]
    own = tier(own_parts)
    wrong = []
    for name in imports(ast.parse(source), ".".join(["energy_flow", *relative.parent.parts])):
        top, *below = name.split(".")
        if top == "tests" or (top in HEAVY and own is not None and own < 2):
            wrong.append(name)
        if top == "energy_flow_benchmarks" and own != ENTRY_POINT:
            wrong.append(name)
        if top != "energy_flow" or own_parts == ["__init__"]:
            continue
        other = tier(below)
        upward = other is not None and (own is None or other > own)
        lattice = own_parts[0] in WITHOUT_CORE and below[:1] in (["core"], ["ops"])
        engine = below[:2] == ["core", "engine"] and own_parts not in MAY_USE_ENGINE and own_parts[1:2] != ["engine"]
        if upward or lattice or (engine and own != ENTRY_POINT):
            wrong.append(name)
    return wrong


def waits(source: str) -> list[str]:
    """Calls that make the host wait for the device, except in functions that may wait."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name in MAY_WAIT:
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
            found.append(f"{node.func.attr} in line {node.lineno}")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(relative(path)))
def test_imports_run_one_way(path: Path) -> None:
    assert wrong_imports(path.read_text(), relative(path)) == []


@pytest.mark.parametrize(
    "path",
    # A copy to the host waits, and only its user calls it.
    [
        path
        for path in SOURCES
        if path.parent.name in ("core", "engine", "ops") and path.name not in ("host_copy.py", "faults.py")
    ],
    ids=lambda path: str(relative(path)),
)
def test_core_and_ops_do_not_wait_for_the_device(path: Path) -> None:
    assert waits(path.read_text()) == []


def test_there_is_something_to_test() -> None:
    assert {path.parent.name for path in SOURCES} >= {"core", "engine", "ops", "runs", "data", "viz"}


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("from energy_flow.core.geometry import fold", "ops/rollout.py"),
        ("import energy_flow.training.losses", "core/flow_processor.py"),
        ("from energy_flow import train", "training/module.py"),
        ("from ..training import losses", "core/geometry.py"),
        ("from energy_flow_benchmarks import measure", "training/module.py"),
        ("from energy_flow.runs.checks import check_loss", "training/module.py"),
        ("from energy_flow.core.geometry import fold", "metrics/retrieval.py"),
        ("from energy_flow.core.engine.tape import Tape", "core/rollout.py"),
        ("from energy_flow.core.engine.tape import Tape", "training/module.py"),
        ("from energy_flow.core import geometry", "errors.py"),
        ("import lightning", "core/geometry.py"),
        ("def f():\n    from tests.reference import fold", "core/geometry.py"),
    ],
)
def test_wrong_imports_are_found(source: str, where: str) -> None:
    assert len(wrong_imports(source, Path(where))) == 1


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("from energy_flow.ops.gru_cell import gru_cell", "core/energy_carrier.py"),
        ("from energy_flow.errors import ConfigError", "ops/rollout.py"),
        ("from energy_flow.training.losses import weighted", "train.py"),
        ("from energy_flow.viz.style import new_figure", "energy_flow_benchmarks/figures.py"),
        ("from energy_flow.core.engine.engine import TapeEngine", "core/flow_processor.py"),
        ("from energy_flow.core.engine.chunking import ChunkSizes", "core/engine/engine.py"),
        ("import lightning, torch", "training/module.py"),
    ],
)
def test_right_imports_pass(source: str, where: str) -> None:
    assert wrong_imports(source, Path(where)) == []


def test_waits_are_found() -> None:
    assert waits("def f(x):\n    return x.sum().item()") == ["item in line 2"]
    assert waits("def collect_completed_flows_surface_direct(x):\n    return x.tolist()") == []
