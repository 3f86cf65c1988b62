"""Explain errors of Hydra, of the config and of the disk in this package's words."""

import errno
import re
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from energy_flow.config import config_dir
from energy_flow.errors import EnergyFlowError
from energy_flow.runs.job import run_folder
from energy_flow.settings import did_you_mean

# Reasons why a disk can't be written -> the remedy.
_UNWRITABLE = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room or have the quota raised",
    errno.EROFS: "Make it writable",
    errno.EACCES: "Change its permissions",
    errno.EPERM: "Change its permissions",
}


def user_error(error: Exception) -> Exception:
    """The error to report: with a message for the user where one can mend it, otherwise the error itself."""
    found = None if isinstance(error, EnergyFlowError) else unwritable(error)
    return error if found is None else EnergyFlowError(found)


def unwritable(error: BaseException | None) -> str | None:
    """Explain an error of a disk that can't be written: file, reason, remedy. None: it is another error."""
    while error is not None:
        if (
            isinstance(error, OSError)
            and error.errno in _UNWRITABLE
            and (error.filename or error.errno not in (errno.EACCES, errno.EPERM))  # without a file: of a process
        ):
            in_run = HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir")
            place = error.filename or (run_folder() if in_run else "the disk")
            return f"{place}: {error.strerror}. {_UNWRITABLE[error.errno]} and repeat the command"
        error = error.__cause__
    return None


def explain(error: Exception, config_name: str) -> str | None:
    """Explain why a config could not be composed or a folder not be made; None: no explanation is known."""
    for found in (error, error.__cause__):
        if isinstance(found, OSError) and found.filename is not None:  # Hydra raises some without a file
            return (
                f"paths.log_dir (or hydra.run.dir, hydra.sweep.dir): {found.filename}: can't be written "
                f"({found.strerror}). Give another folder: paths.log_dir=..."
            )
    if disk := unwritable(error):
        return disk
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group} = {name}: no such option; {did_you_mean(name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: can't be read as key=value ({message_lines(error)[-2]}); quote special characters"
    if isinstance(error, YAMLError):
        return f"a config file is not valid YAML: {' '.join(str(error).split())}. Mend the file"
    if "Config group override must be a string" in str(error):
        return "a group is set to null or has no name: name one of its options, or [] for none (logger=[])"
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        return f"{unknown[1]}: unknown key; {_closest(unknown[1], config_name)}"
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return None
    return "\n".join(message_lines(error)[:3])


def _closest(key: str, config_name: str) -> str:
    """A did-you-mean for a key, from the default config and the names of the groups."""
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        node: Any = hydra.compose(config_name)
    known = set(map(str, node))
    if config_name == "train":  # it has every group except one
        known |= {path.name for path in Path(config_dir()).iterdir() if path.is_dir()} - {"benchmark"}
    names = key.split(".")
    for depth, name in enumerate(names):
        if node is None:  # a part, whose keys its chosen option brings
            return _in_null(names[:depth], name)
        if not isinstance(node, DictConfig) or name not in node:
            return did_you_mean(name, known - {"_target_"})
        node = node[name]
        known = set(map(str, node)) if isinstance(node, DictConfig) else set()
    return "it is not in the chosen groups"


def _in_null(names: list[str], key: str) -> str:
    """The remedy for a key below a value that is null by default."""
    part = "/".join(names)
    options = list(Path(config_dir(), part).glob("*.yaml"))
    if not options:
        return f"{'.'.join(names)} has no such key here. Add it with +{'.'.join(names)}.{key}=VALUE"
    known = {name for path in options for name in yaml.safe_load(path.read_text())} - {"_target_", "defaults"}
    closest = f"{did_you_mean(key, known)}. " if known else ""
    return (
        f"{closest}An option brings its keys: {part}=OPTION. To name a class here, write +{'.'.join(names)}.{key}=VALUE"
    )


def message_lines(error: BaseException) -> list[str]:
    """The lines of an error's message that aren't empty, or its type."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
