"""Config files with their comments: every key with its meaning, unit and default.

A comment belongs to a key by its place, and may begin with a unit:

    # The first lines of a file: the meaning of the option, or of the program with its indented examples.
    key: value      # [unit] The meaning
                    # goes on in the same column
    # [unit] The meaning in the lines above
    long_key: value
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from energy_flow.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """A key of the config, or a section (`default` is None)."""

    path: str  # lattice.movement.scale
    meaning: str
    unit: str  # "" for a key without a unit
    default: str | None  # as in the YAML, on one line
    target: str = ""  # the class that the section of the key builds
    limits: str = ""


@dataclass(frozen=True)
class Choice:
    """An entry of a defaults list: a group and its chosen option."""

    group: str  # "" for another option of the same group
    option: str | None
    meaning: str


@dataclass(frozen=True)
class ConfigFile:
    """A file of `conf/` with the texts of its comments. Paths of keys begin at the top of the config.

    The keys of an option of the group `model/carrier` begin with `model.carrier`.
    """

    meaning: str
    examples: tuple[str, ...]
    choices: tuple[Choice, ...]
    keys: tuple[Key, ...]
    target: str = ""  # the class that the whole file builds


def read_file(path: Path, group: str = "") -> ConfigFile:
    """Read a config file of a group, or of a program (""), with its comments.

    Raises:
        ConfigError: the file is no YAML, or holds something other than keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as YAML: {' '.join(str(error).split())}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: must hold keys with their values")
    comments = _Comments(text)
    package = "" if text.startswith("# @package _global_") else group.replace("/", ".")
    meaning, examples = comments.head()
    target = "" if root is None else _target_of(root)
    keys: list[Key] = []
    choices: list[Choice] = []
    for name, value in root.value if root is not None else ():
        if name.value == "defaults":
            choices += _choices(value, comments)
        else:
            keys += _keys(name, value, package, target, comments)
    return ConfigFile(meaning, examples, tuple(choices), tuple(keys), target)


def _choices(entries: yaml.SequenceNode, comments: "_Comments") -> Iterator[Choice]:
    for entry in entries.value:
        if isinstance(entry, yaml.MappingNode):
            ((name, option),) = entry.value
            chosen, group = _one_line(option, comments.text), re.sub("^((optional|override) )*/?", "", name.value)
            yield Choice(group, None if chosen == "null" else chosen, comments.of(name, option)[0])
        elif entry.value != "_self_":
            yield Choice("", entry.value, "")


def _keys(name: yaml.ScalarNode, value: yaml.Node, prefix: str, target: str, comments: "_Comments") -> Iterator[Key]:
    path = f"{prefix}.{name.value}" if prefix else name.value
    meaning, unit = comments.of(name, value)
    if not isinstance(value, yaml.MappingNode) or value.flow_style:
        if name.value != "_target_":
            yield Key(path, meaning, unit, _one_line(value, comments.text), target)
        return
    own = _target_of(value)
    yield Key(path, meaning, unit, None, own)
    for key, part in value.value:
        yield from _keys(key, part, path, own, comments)


def _target_of(section: yaml.MappingNode) -> str:
    """The class that a section names, or ""."""
    return next((part.value for key, part in section.value if key.value == "_target_"), "")


def _one_line(value: yaml.Node, text: str) -> str:
    """A value as the YAML has it, or on one line where the YAML needs several."""
    if isinstance(value, yaml.ScalarNode):
        written = text[value.start_mark.index : value.end_mark.index]
        return " ".join((value.value if value.style in ("|", ">") else written).split())
    plain = yaml.constructor.SafeConstructor().construct_object(value, deep=True)
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=math.inf).strip()


class _Comments:
    """The comments of a YAML text. PyYAML drops them, so they are the rest of a line behind its last token."""

    def __init__(self, text: str) -> None:
        self.text = text
        ends: dict[int, float] = {}
        for token in yaml.scan(text):
            start, end = token.start_mark, token.end_mark
            if start.index == end.index:  # the end of a section or of the file, which is no text
                continue
            ends |= dict.fromkeys(range(start.line, end.line), math.inf)  # lines within a value have no comments
            ends[end.line] = max(end.column, ends.get(end.line, 0))
        self._found: dict[int, tuple[int, str]] = {}  # line -> column, text
        self._alone: set[int] = set()  # lines with nothing else
        for number, line in enumerate(text.splitlines()):
            end = min(ends.get(number, 0), len(line))
            rest = line[int(end) :].lstrip()
            if rest.startswith("#"):
                self._found[number] = len(line) - len(rest), rest[1:].removeprefix(" ")
                if not line[: int(end)].strip():
                    self._alone.add(number)
        self._head = self._run(0, step=1, column=0)

    def head(self) -> tuple[str, tuple[str, ...]]:
        """The first lines of the file: a meaning and indented examples."""
        lines = [text for line in self._head if not (text := self._found[line][1]).startswith("@package")]
        examples = tuple(line.strip() for line in lines if line.startswith("  "))
        return " ".join(line for line in lines if line and not line.startswith("  ")), examples

    def of(self, name: yaml.Node, value: yaml.Node) -> tuple[str, str]:
        """Meaning and unit of a key."""
        is_block = value.style in ("|", ">") if isinstance(value, yaml.ScalarNode) else not value.flow_style
        line = name.start_mark.line if is_block else value.end_mark.line
        if line in self._found:
            lines = [line, *self._run(line + 1, step=1, column=self._found[line][0])]
        else:
            above = self._run(name.start_mark.line - 1, step=-1, column=name.start_mark.column)
            lines = [number for number in reversed(above) if number not in self._head]
        text = " ".join(self._found[number][1] for number in lines)
        unit, meaning = re.fullmatch(r"(?:\[(.+?)\](?: |$))?(.*)", text).groups()  # type: ignore[union-attr]  # matches all
        return meaning, unit or ""

    def _run(self, line: int, *, step: int, column: int) -> list[int]:
        """The lines from this one on, up or down, with nothing but a comment in this column."""
        lines = []
        while line in self._alone and self._found[line][0] == column:
            lines.append(line)
            line += step
        return lines
