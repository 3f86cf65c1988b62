"""Measure the framework on this machine: python -m energy_flow.benchmark benchmark=NAME [key=value ...]"""

import logging
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from hydra.core.hydra_config import HydraConfig
from pydantic import Field
from rich.console import Console

from energy_flow.errors import ConfigError
from energy_flow.runs.application import application
from energy_flow.settings import ProgramSettings, read
from energy_flow.tables import print_text
from energy_flow_benchmarks import output
from energy_flow_benchmarks.machine import describe_machine
from energy_flow_benchmarks.registry import read_benchmark

log = logging.getLogger(__name__)


class BenchmarkSettings(ProgramSettings):
    """The whole config of a benchmark. The benchmark itself checks its section."""

    device: Literal["cpu", "cuda"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    benchmark: dict[str, Any]


def measure(config: dict[str, Any]) -> None:
    """Run one benchmark; write and show its tables and its picture.

    Raises:
        ConfigError: a setting is wrong, or the device is missing.
        RuntimeError: two variants that must agree gave different results.
    """
    settings = read(BenchmarkSettings, config, "")
    benchmark, own = read_benchmark(settings.benchmark)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no GPU here. Set device=cpu")
    device = torch.device(settings.device)
    console, folder = Console(), Path(settings.paths.output_dir)
    command = shlex.join(["python", "-m", "energy_flow.benchmark", *HydraConfig.get().overrides.task])
    machine = describe_machine(device, command)
    try:
        with console.status("measuring") as status:

            def progress(text: str) -> None:
                status.update(f"measuring: {text}")
                log.info("measuring: %s", text)  # the log file shows how long each part took

            findings = benchmark.run(own, device, settings.seed, progress)
        output.write(folder, machine, findings)
        benchmark.picture(findings.rows).savefig(folder / "benchmark.png")
        output.show(console, machine, findings)
    finally:
        print_text(console, f"run folder: {folder}")


main = application("benchmark")(measure)

if __name__ == "__main__":
    main()
