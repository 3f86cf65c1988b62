"""Compaction by counts with kernels that skip slots: products in float16, in Triton's interpreter on a CPU.

tests/ops/test_triton_kernels.py runs it there. Without the interpreter the other slots are computed for nothing.
"""

import pytest
import torch
from torch import Tensor

from energy_flow.core import tensor_pool
from energy_flow.core.engine import tape as tapes
from energy_flow.core.engine.engine import TapeEngine
from tests.core.ways import assert_same, everything, tape
from tests.helpers import Case

# Flows end one after the other, children are born in between, and rounding changes none of it.
CASE = Case(
    {"width": 4, "spawn.enabled": True, "spawn.threshold": 0.3, "max_steps": 5, "movement.max_displacement": 0.83},
    {"num_layers": 2, "energy_dim": 2, "hidden_size": 16, "features": 14},
    batch=4,
    seed=0,
)
BOUND = 0.01


def in_halves(way: dict[str, object], monkeypatch: pytest.MonkeyPatch, compaction: str) -> dict[str, Tensor]:
    monkeypatch.setattr(TapeEngine, "_compaction", lambda *_: compaction)
    with torch.autocast("cpu", dtype=torch.float16):
        return everything(CASE, way, torch.float32)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("period", [1, 2])
def test_skipped_slots_are_never_read(recompute: bool, period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start as NaN: values that no kernel writes must not be read."""
    empty = tensor_pool._plain_buffer

    def poisoned(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = empty(size, dtype, device)
        return buffer.fill_(torch.nan) if dtype.is_floating_point else buffer

    monkeypatch.setattr(tensor_pool, "_plain_buffer", poisoned)
    monkeypatch.setattr(tapes, "_PERIOD", period)
    every_row = in_halves(tape(recompute=recompute), monkeypatch, "none")
    active, created = every_row[".by_step.active"], every_row[".by_step.created"]
    assert 0 < active[-1] < active[0], "flows end early"
    assert created[0] < created[1] < created[2], "children are born"
    left_out = in_halves(tape(recompute=recompute), monkeypatch, "active_first")
    for name in every_row:
        if name.startswith(("gradient", ".embedding", ".surface", ".by_step")):
            assert_same({name: left_out[name]}, {name: every_row[name]}, BOUND)
