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
from energy_flow.settings import PathSettings, Settings, read
from energy_flow.tables import print_text
from energy_flow_benchmarks import output
from energy_flow_benchmarks.machine import describe_machine
from energy_flow_benchmarks.registry import read_benchmark

log = logging.getLogger(__name__)


class BenchmarkSettings(Settings):
    """The whole config of a benchmark. The chosen benchmark checks the section `benchmark`."""

    task_name: str
    device: Literal["cpu", "cuda"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    benchmark: dict[str, Any]
    paths: PathSettings


def measure(config: dict[str, Any]) -> None:
    """Run a benchmark; show its tables, write its picture and files."""
    settings = read(BenchmarkSettings, config, "")
    benchmark, own = read_benchmark(settings.benchmark)
    device = _device(settings.device)
    console, folder = Console(), Path(settings.paths.output_dir)
    machine = describe_machine(device, _command())
    try:
        with console.status("measuring") as status:

            def report(step: str) -> None:
                status.update(f"measuring: {step}")
                log.info("measuring: %s", step)  # the log file shows the duration of each step

            findings = benchmark.run(own, device, settings.seed, report)
        output.write(folder, machine, findings)
        benchmark.picture(findings.rows).savefig(folder / "benchmark.png")
        output.show(console, machine, findings)
    finally:
        print_text(console, f"run folder: {folder}")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no GPU here. Set device=cpu")
    return torch.device(name)


def _command() -> str:
    return shlex.join(["python", "-m", "energy_flow.benchmark", *HydraConfig.get().overrides.task])


@application("benchmark")
def main(config: dict[str, Any]) -> None:
    """Entry point."""
    measure(config)


if __name__ == "__main__":
    main()
