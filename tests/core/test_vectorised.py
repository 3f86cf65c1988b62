"""The work of a pass doesn't depend on how many flows, cells or samples there are, and never waits for the device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import DIM, Case

# On a CPU, compaction waits for the number of active flows. A rollout on a GPU never waits.
ENGINES: dict[str, dict[str, Any]] = {
    name: {"engine": name, "compaction": False, "compile": False} for name in ("tape", "autograd")
}
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
EVERYTHING: dict[str, Any] = {
    "spawn.enabled": True,
    "filter.enabled": True,
    "convergence.enabled": True,
    "noise.std": 0.1,
    "max_steps": 3,
}


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(width: int, height: int, batch: int, deposit: str, engine: str) -> tuple[int, int]:
    """Number of operations of the forward and of the backward pass."""
    lattice = {**EVERYTHING, "width": width, "height": height, "deposit": deposit}
    case = Case(lattice, batch=batch, training=True, rollout=ENGINES[engine])
    processor, embedding, rows = case.processor(), case.embedding(), case.rows()
    processor(embedding, rows)  # caches and pools are filled
    with OperationCounter() as forward:
        output = processor(embedding, rows, record_trajectories=True)
    with OperationCounter() as backward:
        output.embedding.sum().backward()
    return forward.counts.total(), backward.counts.total()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("deposit", ["bilinear", "nearest"])
def test_no_loop_over_flows_cells_or_samples(deposit: str, engine: str) -> None:
    small = operations(2, 2, 2, deposit, engine)
    assert small[0] > 100
    assert small[1] > 50
    assert operations(6, 5, 7, deposit, engine) == small


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.skipif(TORCH < (2, 12), reason="a fake searchsorted of torch < 2.12 takes no batch of sequences")
def test_no_wait_inside_a_rollout(engine: str) -> None:
    """Tensors without values: `item`, `nonzero` or a bool index would raise."""
    case = Case(EVERYTHING, training=True, rollout=ENGINES[engine])
    processor, embedding, rows = case.processor(), case.embedding(), case.rows()
    processor(embedding, rows)  # the table of quantiles is made once, outside
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = processor(mode.from_tensor(embedding.detach()), mode.from_tensor(rows), record_trajectories=True)
        output.embedding.sum().backward()
    assert output.embedding.shape == (3, DIM)


def test_a_wait_is_found() -> None:
    with FakeTensorMode() as mode:
        value = mode.from_tensor(torch.ones(3))
        for wait in (lambda: value.sum().item(), lambda: bool(value.any())):
            with pytest.raises(DataDependentOutputException):
                wait()
        for wait in (lambda: value.nonzero(), lambda: value[value > 0]):
            with pytest.raises(DynamicOutputShapeException):
                wait()
