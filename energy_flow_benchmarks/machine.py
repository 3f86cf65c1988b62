"""The machine, the versions and the date of a benchmark: figures mean nothing without them."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import psutil
import torch

from energy_flow.version import __version__

MachineValue = str | int | None


def describe_machine(device: torch.device, command: str) -> dict[str, MachineValue]:
    """Return CPU, cores, threads, GPU, versions, date and command; None for a missing part."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "energy_flow": __version__,
        "date": datetime.datetime.now().astimezone().date().isoformat(),
        "command": command,
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo")
    if lines.is_file():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
