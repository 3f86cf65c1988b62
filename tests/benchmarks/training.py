"""Tiny settings of the training benchmarks, as overrides of the command line."""

from typing import Any

SIZE = "{size: debug, %s, lattice: {width: 4, height: 3}, model: {hidden_size: 8}}"
STEP = (
    "benchmark=step",
    "benchmark.dim=6",
    f"benchmark.cpu.sizes=[{SIZE % 'batch: 2'}]",
    "benchmark.cpu.dtypes=[float32]",
    "benchmark.cpu.product=16",
    "benchmark.cpu.repeats=1",
    "benchmark.cpu.min_seconds=0.0",
)
MEMORY = (
    "benchmark=memory",
    "benchmark.dim=6",
    f"benchmark.cpu.sweeps=[{SIZE % 'batches: [1, 3], chunk: 1'}]",
    "benchmark.cpu.product=16",
    "benchmark.cpu.repeats=1",
    "benchmark.cpu.min_seconds=0.0",
)
STABILITY = (
    "benchmark=stability",
    "benchmark.dim=6",
    "benchmark.steps=14",
    "benchmark.warmup_steps=5",
    "benchmark.window=4",
    "benchmark.validate_every=6",
    "benchmark.cleanup_every=4",
    "benchmark.cpu.batches=[2,1]",
)
SCALING = (
    "benchmark=scaling",
    "benchmark.dim=6",
    "benchmark.lattice={width: 4, height: 3, depth: 4}",
    "benchmark.model.hidden_size=8",
    "benchmark.cpu.batches=[1,3]",
    "benchmark.cpu.repeats=1",
    "benchmark.cpu.min_seconds=0.0",
)
TRAINING = (STEP, MEMORY, STABILITY, SCALING)


def tiny_size(lattice: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """A section as `SizeSettings` reads it."""
    return {"size": "debug", "lattice": lattice, "model": model}
