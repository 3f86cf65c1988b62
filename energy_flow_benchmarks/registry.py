"""The benchmarks by name. To add one: a module with settings, `run` and `picture`, a config, and a line here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from energy_flow.errors import ConfigError
from energy_flow.settings import Settings, did_you_mean, read
from energy_flow_benchmarks import collect, memory, report, scaling, stability, step
from energy_flow_benchmarks.findings import Findings, Row


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its settings, `run(settings, device, seed, progress)` and `picture(rows)`."""

    settings: type[Settings]
    run: Callable[[Any, torch.device, int, Callable[[str], None]], Findings]
    picture: Callable[[list[Row]], Figure]


BENCHMARKS = {
    "report": Benchmark(report.ReportSettings, report.run, report.picture),
    "collect": Benchmark(collect.CollectSettings, collect.run, collect.picture),
    "step": Benchmark(step.StepSettings, step.run, step.picture),
    "memory": Benchmark(memory.MemorySettings, memory.run, memory.picture),
    "stability": Benchmark(stability.StabilitySettings, stability.run, stability.picture),
    "scaling": Benchmark(scaling.ScalingSettings, scaling.run, scaling.picture),
}


def read_benchmark(section: Mapping[str, Any]) -> tuple[Benchmark, Settings]:
    """Return the benchmark that the config group `benchmark` names, and its settings.

    Raises:
        ConfigError: there is no such benchmark, or a setting is wrong.
    """
    name = section.get("name")
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark.name = {name!r}: no such benchmark; {did_you_mean(str(name), BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    return benchmark, read(benchmark.settings, section, "benchmark")
