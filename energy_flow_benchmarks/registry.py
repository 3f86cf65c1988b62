"""The benchmarks there are. Another one: a module with settings, `run` and `picture`, and a line here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from energy_flow.errors import ConfigError
from energy_flow.settings import Settings, did_you_mean, read
from energy_flow_benchmarks import collect, memory, report, scaling, stability, step
from energy_flow_benchmarks.findings import Findings, Row

Run = Callable[[Any, torch.device, int, Callable[[str], None]], Findings]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    `run(settings, device, seed, say)` measures; `say(text)` tells the user what it is at. `picture(rows)` draws.
    """

    settings: type[Settings]
    run: Run
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
    """The benchmark that the config group `benchmark` names, and its settings.

    Raises:
        ConfigError: no such benchmark, or settings that can't work.
    """
    name = section.get("name")
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark.name = {name!r}: no such benchmark; {did_you_mean(str(name), BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    return benchmark, read(benchmark.settings, section, "benchmark")
