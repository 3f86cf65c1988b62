"""Ways of running, tiny cases, and two independent checks: a plain forward pass, and finite differences."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from tests.core.habits.plain import PlainOutput, plain_forward, plain_parts
from tests.core.ways import tape
from tests.helpers import Case

TOLERANCE = 1e-10  # float64 rounding of a few hundred operations
SLOPE_TOLERANCE = 1e-6  # of central differences with a step of 1e-6
SEED = 11

CASE = Case(
    {"noise.std": 0.1, "max_steps": 3, "movement.warmup_steps": 4},
    {"num_layers": 2, "energy_dim": 2},
    training=True,
    optimizer_step=2,
    displacement=0.8,
)

# Engines for any part. With 3 samples, chunks of 2 leave a smaller one at the end.
GENERIC: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, chunk 2": {"chunk": 2},
    "autograd": {"engine": "autograd", "chunk": None},
    "autograd, chunk 1": {"engine": "autograd", "chunk": 1},
    "autograd, chunk 2": {"engine": "autograd", "chunk": 2},
}
# Two of them that differ the most, for tests with many cases.
FEW = {name: GENERIC[name] for name in ("auto", "autograd, chunk 2")}
# Engines for the shipped parts.
EVERY: dict[str, dict[str, Any]] = {
    "tape": tape(),
    "tape, chunk 1": tape(chunk=1),
    "tape, chunk 2": tape(chunk=2, recompute=True, compaction=True),
    **{name: way for name, way in GENERIC.items() if way.get("engine") == "autograd"},
}
CHUNKED = {name: way for name, way in EVERY.items() if "chunk" in name}


def processor_of(way: Mapping[str, Any], case: Case = CASE) -> FlowProcessor:
    return dataclasses.replace(case, rollout=way).processor()


def inputs_of(case: Case = CASE) -> tuple[Tensor, Tensor]:
    """An embedding [B, D] that requires gradients, and the rows [B]."""
    return case.embedding(), case.rows()


def scalar(output: FlowOutput | PlainOutput, seed: int = 7) -> Tensor:
    """A loss: random cotangents of embedding and surface."""
    generator = torch.Generator().manual_seed(seed)
    values = (output.embedding, output.surface)
    return sum(
        ((value * torch.randn(value.shape, dtype=torch.float64, generator=generator)).sum() for value in values),
        torch.zeros((), dtype=torch.float64),
    )


def trained(module: nn.Module) -> dict[str, Tensor]:
    """All parameters that require gradients."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def gradients_of(loss: Tensor, leaves: Mapping[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
    """Gradients by name; zeros where the loss doesn't depend on a leaf."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=again)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def results(
    run: Callable[..., FlowOutput | PlainOutput], processor: FlowProcessor, case: Case = CASE
) -> dict[str, Tensor]:
    """Outputs and gradients of one pass, from the same random numbers and buffers each time."""
    embedding, rows = inputs_of(case)
    buffers = copies(processor.named_buffers())
    torch.manual_seed(SEED)
    output = run(processor, embedding, rows)
    found = gradients_of(scalar(output), {**trained(processor), "input": embedding})
    put_back(processor.named_buffers(), buffers)
    return {"embedding": output.embedding.detach(), "surface": output.surface.detach(), **found}


def plain_results(processor: FlowProcessor, case: Case = CASE) -> dict[str, Tensor]:
    with plain_parts():
        return results(plain_forward, processor, case)


def own_results(processor: FlowProcessor, case: Case = CASE) -> dict[str, Tensor]:
    return results(FlowProcessor.__call__, processor, case)


def assert_right(processor: FlowProcessor, case: Case = CASE) -> None:
    """Outputs and all gradients equal those of the plain forward pass through the same parts."""
    assert_close(own_results(processor, case), plain_results(processor, case))


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Equal up to `tolerance` times the largest entry (at least 1)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert torch.isfinite(value).all(), name
        difference = (actual[name] - value).abs().max().item()
        limit = tolerance * max(1.0, value.abs().max().item())
        assert difference <= limit, f"{name}: differs by {difference:.3g}, allowed {limit:.3g}"


def assert_slope(
    loss: Callable[[], Tensor], leaves: Sequence[Tensor], found: Sequence[Tensor], width: float = 1e-6
) -> None:
    """Gradients equal central differences along a random direction of all leaves together.

    Args:
        loss: repeatable: it draws the same random numbers and starts from the same buffers each time.
        leaves: all that the loss depends on and that may change.
        found: their gradients, to be checked.
    """
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator) for leaf in leaves]
    start = [leaf.detach().clone() for leaf in leaves]
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for leaf, value, along in zip(leaves, start, direction, strict=True):
                leaf.copy_(value + sign * width * along)
            values.append(float(loss()))
        for leaf, value in zip(leaves, start, strict=True):
            leaf.copy_(value)
    numeric = (values[0] - values[1]) / (2 * width)
    slope = sum(float((gradient * along).sum()) for gradient, along in zip(found, direction, strict=True))
    limit = SLOPE_TOLERANCE * max(1.0, abs(numeric))
    assert abs(slope - numeric) <= limit, f"slope {slope:.9g}, finite differences {numeric:.9g}"


def assert_slope_of(processor: FlowProcessor, case: Case = CASE) -> None:
    """Gradients of a processor with random numbers or buffers that change: finite differences with a fixed start."""
    embedding, rows = inputs_of(case)
    buffers = copies(processor.named_buffers())
    leaves = [*trained(processor).values(), embedding]

    def loss() -> Tensor:
        put_back(processor.named_buffers(), buffers)
        torch.manual_seed(SEED)
        return scalar(processor(embedding, rows))

    found = gradients_of(loss(), dict(enumerate(leaves)))  # type: ignore[arg-type]
    assert_slope(loss, leaves, list(found.values()))


def copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named}


def put_back(named: Iterable[tuple[str, Tensor]], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in named:
            value.copy_(values[name])


def disturb(module: nn.Module) -> None:
    """Change all parameters in place, as an optimiser does: what was computed from the old values is stale now."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator), alpha=0.05)
