"""Comments of the config files: every key has one, and each belongs to the key beside or below it."""

import re
import shutil
from pathlib import Path

import pytest

from energy_flow.config import config_dir
from energy_flow.config_comments import ConfigFile, read_file

CONF = Path(config_dir())
FILES = sorted(CONF.rglob("*.yaml"))


def read_whole(path: Path, conf: Path = CONF) -> ConfigFile:
    return read_file(path, group_of(path, conf))


def group_of(path: Path, conf: Path = CONF) -> str:
    """`model/carrier` for an option of a nested group, "" for a program."""
    return "" if path.parent == conf else path.parent.relative_to(conf).as_posix()


def without_meaning(conf: Path) -> list[str]:
    """Keys, options and programs of a folder of configs that lack a comment.

    A preset may set a key of another file without a comment, and an option may set a key of the option it builds on.
    """
    files = {path: read_whole(path, conf) for path in sorted(conf.rglob("*.yaml"))}
    known = {key.path for file in files.values() for key in file.keys if key.meaning}
    missing = [str(path.relative_to(conf)) for path, file in files.items() if not file.meaning]
    for path, file in files.items():
        package = f"{group_of(path, conf).replace('/', '.')}."
        for key in file.keys:
            brings = path.parent == conf or (not file.choices and key.path.startswith(package))
            section = key.default is None and not brings  # a section of a preset, whose keys are below it
            if not key.meaning and not section and (brings or key.path not in known):
                missing.append(f"{path.relative_to(conf)}: {key.path}")
        if path.parent == conf:
            missing += [
                f"{path.name}: {choice.group}" for choice in file.choices if choice.group and not choice.meaning
            ]
    return missing


def lost_comments(path: Path, conf: Path = CONF) -> list[str]:
    """Comments of a file without a key, option or example."""
    file = read_whole(path, conf)
    known = [file.meaning, *file.examples, *(part.meaning for part in (*file.choices, *file.keys))]
    texts = " | ".join(known)
    found = re.findall(r"(?:^|\s)# ?(.*)$", path.read_text(), flags=re.MULTILINE)
    bare = (re.sub(r"^\[.+?\] ", "", text).strip() for text in found if not text.startswith("@package"))
    return [text for text in bare if text not in texts]


def test_every_key_has_a_meaning() -> None:
    assert without_meaning(CONF) == []


@pytest.mark.parametrize(
    ("file", "line", "missing"),
    [
        ("lattice/default.yaml", "\nnew: 1\n", "lattice/default.yaml: lattice.new"),
        ("data/transport.yaml", "\n  new: 1\n", "data/transport.yaml: data.new"),
        ("debug/limit.yaml", "\nnew: 1\n", "debug/limit.yaml: new"),
        ("benchmark/step.yaml", "\n  new: 1  # [unit]\n", "benchmark/step.yaml: benchmark.cuda.new"),
        ("train.yaml", "\nnew: 1\n", "train.yaml: new"),
    ],
)
def test_a_key_without_a_comment_is_found(tmp_path: Path, file: str, line: str, missing: str) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    with (conf / file).open("a") as target:
        target.write(line)
    assert without_meaning(conf) == [missing]


def test_every_file_that_brings_a_key_needs_a_comment(tmp_path: Path) -> None:
    """This holds even if another option of the group explains a key of the same name."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    option = conf / "data" / "transport.yaml"
    option.write_text(re.sub(r"(  normalize: false) .*", r"\1", option.read_text()))
    assert without_meaning(conf) == ["data/transport.yaml: data.normalize"]


def test_an_option_and_a_group_without_a_comment_are_found(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "size" / "new.yaml").write_text("# @package _global_\nlattice:\n  depth: 4\n")
    program = conf / "check.yaml"
    program.write_text(re.sub(r"( - data: \w+) .*", r"\1", program.read_text()))
    assert without_meaning(conf) == ["size/new.yaml", "check.yaml: data"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_no_comment_is_lost(path: Path) -> None:
    assert lost_comments(path) == []


def test_a_lost_comment_is_found(tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    path = tmp_path / "group" / "option.yaml"
    path.write_text("# The option.\na: 1   # [cells] One\n    # in another column\nb: 2   # Two\n")
    assert lost_comments(path, tmp_path) == ["in another column"]


def test_places_of_comments(tmp_path: Path) -> None:
    path = tmp_path / "program.yaml"
    path.write_text(
        "# The program\n# in two lines.\n#\n#   python -m it key=1   # an example\n"
        "defaults:\n  - _self_\n  - other\n  - group: null   # The group\n  - override /more: one\n\n"
        'quoted: "a # b"    # [rows] Text with a hash\n'
        "bare: 1\n"
        "flow: {a: 1,\n       b: [2, 3]}   # At the end of the value\n"
        "section:   # Keys below\n"
        "  # [m/s] Above,\n  # in two lines\n"
        "  speed: 1.0e-3\n"
        "  text: |   \n    no # comment\n"
        "  next: null       # Beside,\n                   # and below\n"
        "last:    # No value and no new line"
    )
    file = read_file(path)
    assert file.meaning == "The program in two lines."
    assert file.examples == ("python -m it key=1   # an example",)
    assert [(choice.group, choice.option, choice.meaning) for choice in file.choices] == [
        ("", "other", ""),
        ("group", None, "The group"),
        ("more", "one", ""),
    ]
    assert [(key.path, key.default, key.unit, key.meaning) for key in file.keys] == [
        ("quoted", '"a # b"', "rows", "Text with a hash"),
        ("bare", "1", "", ""),
        ("flow", "{a: 1, b: [2, 3]}", "", "At the end of the value"),
        ("section", None, "", "Keys below"),
        ("section.speed", "1.0e-3", "m/s", "Above, in two lines"),
        ("section.text", "no # comment", "", ""),
        ("section.next", "null", "", "Beside, and below"),
        ("last", "", "", "No value and no new line"),
    ]
