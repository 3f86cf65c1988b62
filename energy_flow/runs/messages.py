"""Explain errors of Hydra, of the config and of the disk in the words of this package."""

import errno
import re
from pathlib import Path
from typing import Any, TypeGuard

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from energy_flow.config import config_dir
from energy_flow.errors import EnergyFlowError
from energy_flow.runs.job import run_folder
from energy_flow.settings import did_you_mean

# Errors of a disk that can't be written, and what helps.
_UNWRITABLE = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room or have the quota raised",
    errno.EROFS: "Make it writable",
    errno.EACCES: "Change its rights",
    errno.EPERM: "Change its rights",
}


def unwritable(error: BaseException | None) -> str | None:
    """If an error comes from a disk that can't be written: which file, why, and what helps."""
    while error is not None:
        of_a_file = isinstance(error, OSError) and (error.filename or error.errno not in (errno.EACCES, errno.EPERM))
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and of_a_file:
            in_run = HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir")
            somewhere = run_folder() if in_run else "the disk"
            remedy = f"{_UNWRITABLE[error.errno]} and repeat the command"
            return f"{error.filename or somewhere}: {error.strerror}. {remedy}"
        error = error.__cause__
    return None


def mendable(error: Exception) -> Exception:
    """What an error is to the user."""
    found = None if isinstance(error, EnergyFlowError) else unwritable(error)
    return error if found is None else EnergyFlowError(found)


def explain(error: Exception, config_name: str) -> str:
    """A config that Hydra could not compose, or a folder that it could not make, in the words of other messages."""
    for of_file in (error, error.__cause__):
        if file_of(of_file):
            return (
                f"paths.log_dir (or hydra.run.dir, hydra.sweep.dir): {of_file.filename}: can't be written "
                f"({of_file.strerror}). Give another folder: paths.log_dir=..."
            )
    found = unwritable(error)
    if found is not None:
        return found
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group} = {name}: no such option; {did_you_mean(name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: can't be read as key=value ({message_lines(error)[-2]}); quote special characters"
    if "Config group override must be a string" in str(error):
        return "a group is set to null or left without a name: name one of its options, or [] for none (logger=[])"
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if unknown:
        return f"{unknown[1]}: unknown key; {_closest(unknown[1], config_name)}"
    return "\n".join(message_lines(error)[:3])


def file_of(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether it is of a file; Hydra has errors of this type without one."""
    return isinstance(error, OSError) and error.filename is not None


def _closest(key: str, config_name: str) -> str:
    """Did-you-mean for a key, by the default config and the names of the groups."""
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        node: Any = hydra.compose(config_name)
    known = set(map(str, node))
    if config_name == "train":  # which takes every group but one
        known |= {path.name for path in Path(config_dir()).iterdir() if path.is_dir()} - {"benchmark"}
    for name in key.split("."):
        if not isinstance(node, DictConfig) or name not in node:
            return did_you_mean(name, known - {"_target_"})
        node = node[name]
        known = set(map(str, node)) if isinstance(node, DictConfig) else set()
    return "it is not in the groups that were chosen"


def message_lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
