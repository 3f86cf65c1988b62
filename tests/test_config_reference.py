"""The config reference: complete, equal to the configs that Hydra composes, and in `--help` of each program."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pydantic import Field

from energy_flow.config import config_dir
from energy_flow.config_comments import Key
from energy_flow.config_reference import HYDRA, PROGRAMS, Group, Option, Program, help_text, markdown, read_program

CONF = Path(config_dir())
FILES = sorted(CONF.rglob("*.yaml"))
SETTINGS = {
    "train": "energy_flow.runs.settings:TrainSettings",
    "evaluate": "energy_flow.evaluate:EvaluateSettings",
    "predict": "energy_flow.predict:PredictSettings",
    "encode": "energy_flow.encode:EncodeSettings",
    "export": "energy_flow.export:ExportSettings",
    "check": "energy_flow.check:CheckSettings",
    "benchmark": "energy_flow.benchmark:BenchmarkSettings",
}


def options(program: Program) -> Iterator[tuple[Group, Option]]:
    for group in program.groups:
        yield from ((group, option) for option in group.options)


def raw_config(program: str, *overrides: str) -> dict[str, Any]:
    """The composed config with unresolved interpolations."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(program, overrides=list(overrides)), resolve=False)
    assert isinstance(config, dict)
    return config


def entries(config: dict[str, Any], leaves: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every key. A section that is itself a value is not entered."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in leaves:
            yield from entries(value, leaves, f"{path}.")
        elif name != "_target_":
            yield path, value


def values(keys: Iterable[Key]) -> dict[str, str]:
    return {key.path: key.default for key in keys if key.default is not None}


@pytest.mark.parametrize("name", PROGRAMS)
def test_keys_and_defaults_equal_the_composed_config(name: str) -> None:
    program = read_program(name)
    stated = values(program.keys)
    for group in program.groups:
        if group.name != HYDRA and group.default:
            stated |= values(group.options[0].keys)
    composed = dict(entries(raw_config(name), set(stated)))
    assert stated.keys() == composed.keys()
    assert {path: yaml.safe_load(text) for path, text in stated.items()} == composed


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_of_other_options_equal_the_composed_config(name: str) -> None:
    required = ["input=a", "output=b"] if name == "encode" else []
    for group, option in options(read_program(name)):
        stated = values((*option.keys, *option.sets))
        stated = {path: text for path, text in stated.items() if not path.startswith(f"{HYDRA}.")}
        if group.name == HYDRA or not stated:
            continue
        override = f"{group.name}={option.name}"
        composed = dict(entries(raw_config(name, *required, override), set(stated)))
        for path, text in stated.items():
            assert composed[path] == yaml.safe_load(text), (override, path)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_takes_every_listed_option(name: str) -> None:
    """A program refuses a config with a key that its Settings do not have."""
    module, cls = SETTINGS[name].split(":")
    fields = set(getattr(importlib.import_module(module), cls).model_fields)
    chosen = [next(iter(entry)) for entry in yaml.safe_load((CONF / f"{name}.yaml").read_text())["defaults"][1:]]
    program = read_program(name)
    assert [group.name for group in program.groups] == chosen
    for group in program.groups:
        if group.name == HYDRA:
            continue
        taken = {
            path.stem
            for path in (CONF / group.name).glob("*.yaml")
            if set(raw_config(name, f"{group.name}={path.stem}")) <= fields
        }
        assert {option.name for option in group.options} == taken
        assert (group.default is None) or group.options[0].name == group.default


def test_predict_does_not_list_transport() -> None:
    listed = {f"{group.name}={option.name}" for group, option in options(read_program("predict"))}
    assert "data=files" in listed
    assert "data=transport" not in listed


@pytest.mark.parametrize(
    ("program", "path", "unit", "limits"),
    [
        ("train", "seed", "", "integer >= 0, < 4294967296"),
        ("train", "resume", "", "auto or null"),
        ("evaluate", "ckpt_path", "", "text or list of 1 or more (text)"),
        ("evaluate", "lattice.width", "cells", "integer >= 1 or null"),
        ("predict", "split", "", "train, val or test"),
        ("encode", "dtype", "", "int8, float16 or float32"),
        ("check", "seed", "", "integer >= 0"),
        ("benchmark", "device", "", "cpu or cuda"),
        ("train", "lattice.convergence.threshold", "share", "number > 0, <= 1"),
        ("train", "lattice.deposit", "", "bilinear or nearest"),
        ("train", "model.map_hidden", "numbers", "integer >= 1 or null"),
        ("train", "model.carrier", "", "section or null"),
        ("train", "data.timeout", "seconds", "number > 0"),
        ("train", "loss.temperature", "", "number > 0"),
        ("train", "optimizer.betas", "", "list of 2 (number >= 0, < 1)"),
        ("train", "rollout.chunk", "samples", "auto or integer >= 1 or null"),
        ("train", "rollout.compile", "", "auto or true or false"),
        ("train", "trainer.precision", "", "32-true, 64-true, bf16-mixed or 16-mixed"),
        ("train", "trainer.strategy", "", ""),  # arguments of Lightning alone
        ("train", "callbacks.early_stopping", "", "class lightning.pytorch.callbacks.EarlyStopping"),
        ("train", "callbacks.early_stopping.patience", "validations", "integer"),
        ("train", "callbacks.learning_rate.logging_interval", "", "step or epoch or null"),
        ("train", "baselines.training.epochs", "epochs", "integer >= 1"),
        ("train", "logger.tensorboard.default_hp_metric", "", "true or false"),
        ("train", "paths.log_dir", "", "text"),
        ("benchmark", "benchmark.flows", "flows", "list of 1 or more (integer >= 1)"),
    ],
)
def test_units_and_limits(program: str, path: str, unit: str, limits: str) -> None:
    found = read_program(program)
    keys = [*found.keys, *(key for _, option in options(found) for key in option.keys)]
    key = next(key for key in keys if key.path == path)
    assert (key.unit, key.limits) == (unit, limits)


@pytest.mark.parametrize(
    ("group", "option", "path", "limits"),
    [
        ("data", "transport", "data.field", "rotation_swirl or shear"),
        ("benchmark", "collect", "benchmark.min_seconds", "number >= 0"),
        ("benchmark", "memory", "benchmark.cpu.dtype", "float32 or bfloat16"),
        ("benchmark", "scaling", "benchmark.cuda.batches", "list of 1 or more (integer >= 1)"),
        ("benchmark", "stability", "benchmark.steps", "integer >= 1"),
        ("benchmark", "step", "benchmark.cpu.sizes", "list of 1 or more (section with size, lattice, model, batch)"),
        ("logger", "csv", "logger.csv.name", "text"),
        ("model/carrier", "attention", "model.carrier.num_heads", "integer >= 1"),
        ("model/map_in", "conv", "model.map_in.hidden", "integer >= 1 or null"),
    ],
)
def test_limits_of_an_option(group: str, option: str, path: str, limits: str) -> None:
    program = read_program("benchmark" if group == "benchmark" else "train")
    own = next(found for owner, found in options(program) if (owner.name, found.name) == (group, option))
    assert next(key.limits for key in own.keys if key.path == path) == limits


class Example:
    """A callback with annotated arguments."""

    def __init__(self, interval: Annotated[int, Field(ge=1)]) -> None: ...


def test_limits_of_an_annotated_argument(tmp_path: Path) -> None:
    (tmp_path / "callbacks").mkdir()
    lines = ["# Own.", "own:   # Mine", f"  _target_: {__name__}.Example", "  interval: 5   # [batches] How often"]
    (tmp_path / "callbacks" / "own.yaml").write_text("\n".join(lines))
    program = read_program("train", [tmp_path, CONF])
    own = next(option for group, option in options(program) if (group.name, option.name) == ("callbacks", "own"))
    assert [(key.path, key.unit, key.limits) for key in own.keys] == [
        ("callbacks.own", "", f"class {__name__}.Example"),
        ("callbacks.own.interval", "batches", "integer >= 1"),
    ]


@pytest.mark.parametrize("content", [None, "class Own(:\n", "import nowhere_else\n", "raise RuntimeError('broken')\n"])
def test_a_class_that_cannot_be_imported_does_not_end_the_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "nowhere.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model" / "carrier").mkdir(parents=True)
    (tmp_path / "model" / "carrier" / "own.yaml").write_text("# Mine.\n_target_: nowhere.Own\nsize: 5   # Its size\n")
    program = read_program("train", [tmp_path, CONF])
    own = next(option for group, option in options(program) if (group.name, option.name) == ("model/carrier", "own"))
    assert own.target == "nowhere.Own"
    assert [(key.path, key.default, key.meaning, key.limits) for key in own.keys] == [
        ("model.carrier.size", "5", "Its size", "")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_the_named_classes_exist(path: Path) -> None:
    for target in re.findall(r"^ *_target_: (\S+)$", path.read_text(), flags=re.MULTILINE):
        module, name = target.rsplit(".", 1)
        assert isinstance(getattr(importlib.import_module(module), name), type), target


@pytest.mark.parametrize("content", ["# @package _global_\nlattice: [", "- a\n- b\n"])
def test_a_broken_user_file_is_named_and_other_help_still_works(tmp_path: Path, content: str) -> None:
    (tmp_path / "experiment").mkdir()
    broken = tmp_path / "experiment" / "broken.yaml"
    broken.write_text(content)
    (experiment,) = [group for group in read_program("train", [tmp_path, CONF]).groups if group.name == "experiment"]
    meanings = {option.name: option.meaning for option in experiment.options}
    assert meanings["broken"].startswith(f"{broken}: ")
    assert "transport" in meanings


def test_a_key_that_its_settings_do_not_have_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "default.yaml").write_text("# Broken.\nnew: 1   # A key\n")
    with pytest.raises(LookupError, match=r"rollout\.new.*RolloutSettings has no such field"):
        read_program("evaluate", [tmp_path, CONF])


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_the_groups_of_the_program_and_all_keys(name: str) -> None:
    text = help_text(name)
    program = read_program(name)
    chosen = {next(iter(entry)) for entry in yaml.safe_load((CONF / f"{name}.yaml").read_text())["defaults"][1:]}
    assert set(re.findall(r"^Group ([\w/]+)", text, flags=re.MULTILINE)) == chosen - {HYDRA}
    shown = set(re.findall(r"^ +([\w.]+)[=:]", text, flags=re.MULTILINE))
    own = {key.path.split(".")[0] for key in program.keys}
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    for other in folders - chosen - own:
        assert not [path for path in shown if path.split(".")[0] == other], other
    assert {path for path, _ in entries(raw_config(name), set(values(program.keys)))} <= shown
    for group, option in options(program):
        if group.name != HYDRA:
            assert re.search(rf"^  {group.name}={option.name}( |$)", text, flags=re.MULTILINE)
            assert {key.path for key in option.keys} <= shown


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_into_a_hundred_columns(name: str) -> None:
    long = [line for line in help_text(name).splitlines() if len(line) > 100]
    assert [line for line in long if len(line.split()) > 1] == []


@pytest.mark.parametrize(
    ("name", "example"), [(name, example) for name in PROGRAMS for example in read_program(name).examples]
)
def test_examples_can_be_composed(name: str, example: str) -> None:
    python, flag, module, *words = shlex.split(example, comments=True)
    assert (python, flag, module) == ("python", "-m", f"energy_flow.{name}")
    overrides = []
    for override in OverridesParser.create().parse_overrides([word for word in words if word != "-m"]):
        assert not override.is_sweep_override() or "-m" in words
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_string()]
        overrides.append(f"{override.key_or_group}={next(iter(values))}")
    raw_config(name, *overrides)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_command_prints_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"energy_flow.{name}").main()
    assert end.value.code == 0
    out, err = capfd.readouterr()
    assert out.startswith(help_text(name))
    assert "output_dir=${hydra:runtime.output_dir}" in out
    assert err == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_options_of_a_user_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("# My pairs.\ndefaults:\n  - files\n  - _self_\n")
    monkeypatch.setattr(sys, "argv", ["check", "--config-dir", str(tmp_path), "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("energy_flow.check").main()
    assert re.search(r"^  data=mine +My pairs\.$", capfd.readouterr().out, flags=re.MULTILINE)


def test_the_page_has_everything() -> None:
    page = markdown()
    lines = page.splitlines()
    for name in PROGRAMS:
        assert f"### {name}" in lines
        for key in read_program(name).keys:
            assert any(line.startswith(f"| `{key.path}` | {key.meaning} |") for line in lines)
    for path in FILES:
        if path.parent != CONF:
            group = path.parent.relative_to(CONF).as_posix()
            assert re.search(rf"^#### `{group}={path.stem}`", page, flags=re.MULTILINE), path
            assert f"(config-{group.replace('/', '-')})=" in lines
    assert not re.search(r"^\| `[^|]+ \|  \|", page, flags=re.MULTILINE), "a key without a meaning"
    tables = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {6}
    assert "| `data.timeout` |" in page
    assert "`60` | number > 0 |" in page


def test_all_programs_are_there() -> None:
    assert set(PROGRAMS) == {path.stem for path in CONF.glob("*.yaml")}
    assert tuple(SETTINGS) == PROGRAMS
