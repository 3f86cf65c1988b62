"""Check every command in README and docs as far as possible without running it."""

import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.docs.documents import ROOT, Block, Command, blocks, commands, split
from tests.docs.hydra_commands import check_program

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LANGUAGES = {"bash", "python", "json", "yaml"}  # of blocks; each has a test


class _Reached(Exception):
    """A campaign has read its arguments."""


def pip(words: Sequence[str]) -> None:
    install, *rest = words
    assert install == "install"
    for word in (word for word in rest if word != "-e"):
        found = re.fullmatch(r"\.(?:\[(\w+)\])?", word)
        assert found, f"unknown requirement {word}"
        assert found[1] is None or found[1] in PROJECT["project"]["optional-dependencies"], f"no extra {found[1]}"


def pytest_(words: Sequence[str]) -> None:
    known = {"-n": {"auto"}, "--dist": {"worksteal"}, "-m": {"gpu", "slow", "not slow"}}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert value in known[flag], f"{flag} {value}"


def sphinx(words: Sequence[str]) -> None:
    assert list(words) == ["-W", "-b", "html", "docs", "docs/_build/html"]
    assert (ROOT / "docs" / "conf.py").is_file()


def campaign(name: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the campaign read its arguments, and stop it there."""
    module = importlib.import_module(name)

    def stop(*_: object, **__: object) -> None:
        raise _Reached

    for function in ("campaign", "steps", "jobs"):
        monkeypatch.setattr(module, function, stop, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(_Reached):
        module.main()


def own_configs(folder: Path) -> Path:
    """Write the YAML blocks of the documents. Each gets the file name that the text before it gives."""
    for block in blocks():
        if block.language == "yaml":
            path = folder / _name_before(block)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    return folder


def _name_before(block: Block) -> str:
    return re.findall(r"`([\w/]+\.yaml)`", block.before)[-1]


def check(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail for a wrong command, and for a command without a check."""
    match command.words:
        case ("python", "-m", module, *rest):
            modules: dict[str, Callable[[Sequence[str]], None]] = {"pip": pip, "pytest": pytest_, "sphinx": sphinx}
            if command.words[2:] == ("energy_flow.config_reference",):
                assert importlib.util.find_spec(module)
            elif module.startswith("energy_flow."):
                check_program(module.removeprefix("energy_flow."), rest, own_configs(folder))
            elif module.startswith("tests.campaigns."):
                campaign(module, rest, monkeypatch)
            else:
                modules[module](rest)
        case ("python", script):
            assert (ROOT / script).is_file(), script
        case ("tensorboard", "--logdir", "logs"):
            assert "log_dir: logs " in (ROOT / "conf/paths/default.yaml").read_text()
        case (name,) if name in PROJECT["project"]["scripts"]:
            pass  # its name alone
        case (name, *rest) if name in PROJECT["project"]["scripts"]:
            check_program(name.removeprefix("energy-flow-"), rest, own_configs(folder))
        case _:
            pytest.fail(f"{command.where}: no check for this command: {' '.join(command.words)}")


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.where}: {' '.join(command.words)}"[:150])
def test_a_command_is_right(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python -m energy_flow.train lattice.dpeth=8",
        "python -m energy_flow.train size=huge",
        "python -m energy_flow.train lattice.depth=8,16",
        "python -m energy_flow.train lattice.depth=-1",
        "python -m energy_flow.evaluate data=transport",
        "python -m energy_flow.trian",
        "python -m energy_flow.train --frobnicate",
        "python -m pip install -e .[nothing]",
        "python -m pytest -m quick",
        "python -m tests.campaigns.kill_and_resume --rnus 30",
        "python docs/figure.py",
        "make docs",
    ],
)
def test_a_wrong_command_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = split("here", line)
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        check(command, tmp_path, monkeypatch)


def test_every_block_has_a_test() -> None:
    others = [b.where for b in blocks() if b.language not in LANGUAGES and not b.where.startswith("docs/benchmarks/")]
    assert not others, f"no test knows how to check these blocks: {others}"


def test_ci_finds_the_test_command() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "python -m pytest" in line]
    assert lines[0] == 'python -m pip install -e ".[test]" && python -m pytest -n auto --dist worksteal'


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
