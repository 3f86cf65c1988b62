"""Check the overrides of command lines by composing the config, without running the program."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from energy_flow.config import config_dir
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import ModelSettings
from energy_flow.data import read_data_settings
from energy_flow.settings import read

PROGRAMS = ("train", "evaluate", "predict", "encode", "export", "check", "benchmark")
_NO_RUN = {"--help", "--cfg"}  # these work without required keys


def check_program(program: str, words: Sequence[str], own_configs: Path | None = None) -> None:
    """Compose every job of a command line and check the settings that describe model and data.

    Raises:
        AssertionError, HydraException, EnergyFlowError: a wrong flag, key, option or value.
    """
    assert program in PROGRAMS, f"no program {program}"
    flags, overrides = _parse(list(words))
    if "--config-dir" in flags:
        assert own_configs is not None, "no document shows a config of one's own"
        overrides.append(f"hydra.searchpath=[file://{own_configs}]")
    for job in _jobs(overrides, sweep="-m" in flags):
        config = composed(program, *job)
        missing = "???" in OmegaConf.to_yaml(config)
        assert not missing or flags & _NO_RUN, "a value is missing"
        _check_values(config)


def composed(program: str, *overrides: str) -> DictConfig:
    """The config of a program."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose(program, overrides=list(overrides))


def _parse(words: list[str]) -> tuple[set[str], list[str]]:
    flags, overrides = set(), []
    while words:
        word = words.pop(0)
        if word in ("-m", "--help"):
            flags.add(word)
        elif word in ("--cfg", "--config-dir"):
            flags.add(word)
            value = words.pop(0)
            assert word != "--cfg" or value in ("job", "hydra", "all"), value
        else:
            assert not word.startswith("-"), f"unknown flag {word}"
            overrides.append(word)
    return flags, overrides


def _jobs(overrides: Sequence[str], *, sweep: bool) -> Iterator[list[str]]:
    """Every combination of a sweep; without a sweep the overrides themselves."""
    choices = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        assert override.input_line is not None
        if override.is_sweep_override():
            assert sweep, f"{override.input_line}: several values need -m"
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line])
    return map(list, itertools.product(*choices))


def _check_values(config: DictConfig) -> None:
    for name, settings in (("lattice", LatticeSettings), ("model", ModelSettings)):
        if name in config and "depth" in config.lattice:  # evaluate and predict only give a size
            read(settings, _plain(config, name), name)
    if "data" in config:
        read_data_settings(_plain(config, "data"))


def _plain(config: DictConfig, section: str) -> Any:
    return OmegaConf.to_container(config[section], resolve=True)
