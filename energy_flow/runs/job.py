"""The Hydra job that runs in this process: its folder, its mode, the command that resumes it."""

import re
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


def run_folder() -> Path:
    """The folder that Hydra made for the job."""
    return Path(HydraConfig.get().runtime.output_dir)


def resume_command(checkpoint: Path) -> str:
    """The command line that resumes a run from a checkpoint, in its own folder, with the user's config folders."""
    config = HydraConfig.get()
    folders = [source.path for source in config.runtime.config_sources if source.provider == "command-line"]
    overrides = [o for o in config.overrides.hydra if o.lstrip("+").startswith("hydra.searchpath=")]
    overrides += [o for o in config.overrides.task if not o.startswith(("ckpt_path=", "resume="))]
    paths = {"ckpt_path": str(checkpoint), "hydra.run.dir": config.runtime.output_dir}
    overrides += [f"{key}={hydra_quoted(path)}" for key, path in paths.items()]
    words = [*(f"--config-dir={folder}" for folder in folders), *overrides]
    return " ".join(["python -m energy_flow.train", *map(shlex.quote, words)])


def hydra_quoted(value: str) -> str:
    """Quote a value for Hydra's grammar, which gives `=`, `,` and spaces a meaning."""
    return value if re.fullmatch(r"[\w/.+-]*", value) else '"' + value.replace('"', '\\"') + '"'


def is_multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN
