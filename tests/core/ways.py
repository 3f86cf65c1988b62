"""Ways of running a rollout, and comparisons of their outputs and gradients."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowProcessor
from tests.helpers import Case, gradients, tensors_of

PLAIN: dict[str, Any] = {"engine": "autograd", "chunk": None, "compile": False}


def tape(*, recompute: bool = False, chunk: Any = None, compaction: bool = False, compile: bool = False) -> dict:
    """Rollout settings that don't depend on size or machine."""
    return {
        "engine": "tape",
        "recompute": recompute,
        "chunk": chunk,
        "compaction": compaction,
        "compile": compile,
        "cuda_graph": False,
    }


# One of each kind, for both engines.
ENGINES: dict[str, dict[str, Any]] = {
    "autograd": PLAIN,
    "tape": tape(),
    "compaction": tape(compaction=True),
    "recompute": tape(recompute=True),
    "chunks": tape(chunk=2),
    "chunks, all of it": tape(chunk=2, recompute=True, compaction=True),
}


SMALLEST = 1e-4  # an entry that should be 0 is the rounding of terms of order 1


def processor_of(case: Case, way: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> FlowProcessor:
    return dataclasses.replace(case, rollout=way).processor().to(dtype)


def embedding_of(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    return case.embedding().detach().to(dtype).requires_grad_()


def everything(
    case: Case, way: Mapping[str, Any], dtype: torch.dtype = torch.float64, processor: FlowProcessor | None = None
) -> dict[str, Tensor]:
    """All outputs of a case, and all gradients, the embedding's included, for random cotangents."""
    processor = processor_of(case, way, dtype) if processor is None else processor
    embedding = embedding_of(case, dtype)
    output = processor(embedding, case.rows(), record_trajectories=True)
    found = {f"gradient of {name}": value for name, value in gradients(processor, embedding, output).items()}
    return {**tensors_of(output.detached()), **found}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` times the largest entry of each expected tensor; whole numbers and masks exactly."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        found = actual[name]
        assert (found.shape, found.dtype) == (value.shape, value.dtype), name
        if not value.is_floating_point():
            assert torch.equal(found, value), name
        elif value.numel():
            assert torch.isfinite(value).all(), name
            difference, largest = (found - value).abs().max().item(), max(SMALLEST, value.abs().max().item())
            assert difference <= tolerance * largest, f"{name}: {difference:.3g} of {largest:.3g}"


def assert_identical(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
