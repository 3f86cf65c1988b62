"""The config reference: meaning, unit, default and limits of every key, read from `conf/` and its comments.

Limits come from the `Settings` class of a section, or from the constructor that `_target_` names.
`--help` prints `help_text`. `python -m energy_flow.config_reference` prints `markdown` for the documentation.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter

from energy_flow.config import config_dir
from energy_flow.config_comments import Choice, Key, read_file
from energy_flow.errors import ConfigError
from energy_flow.settings import annotations
from energy_flow.tables import markdown_table

PROGRAMS = ("train", "evaluate", "predict", "encode", "export", "check", "benchmark")
HYDRA = "hydra"  # Hydra's own group: `--hydra-help` is about it

# The class that checks a program's own keys, a group or an option of a group.
_OWNERS = {
    **{name: f"energy_flow.{name}:{name.title()}Settings" for name in PROGRAMS},
    "lattice/": "energy_flow.core.energy_lattice:LatticeSettings",
    "model/": "energy_flow.core.networks:ModelSettings",
    "loss/": "energy_flow.training.losses:LossSettings",
    "optimizer/": "energy_flow.training.optimizer:OptimizerSettings",
    "rollout/": "energy_flow.core.rollout:RolloutSettings",
    "trainer/": "energy_flow.runs.trainer:TrainerSettings",
    "baselines/": "energy_flow.comparison.baselines:BaselineSettings",
    "paths/": "energy_flow.settings:PathSettings",
    "data/reverse_dictionary": "energy_flow.data:FileSettings",
    "data/transport": "energy_flow.data:TransportSettings",
    **{
        f"benchmark/{name}": f"energy_flow_benchmarks.{name}:{name.title()}Settings"
        for name in ("collect", "memory", "report", "scaling", "stability", "step")
    },
}

_WIDTH = 100  # columns of the help
_COLUMN = 40  # where meanings begin in the help


@dataclass(frozen=True)
class Option:
    """An option of a group: the keys that it brings, and the keys of other files that it sets."""

    name: str
    meaning: str
    keys: tuple[Key, ...]
    sets: tuple[Key, ...]
    choices: tuple[Choice, ...]  # options that it builds on, and options of other groups that it chooses
    target: str = ""  # the class that it builds


@dataclass(frozen=True)
class Group:
    """A config group as a program uses it."""

    name: str  # a nested one has a slash: model/carrier
    meaning: str
    default: str | None
    options: tuple[Option, ...]  # the default comes first


@dataclass(frozen=True)
class Program:
    """An entry point with its own keys and its groups, in the order of its defaults list."""

    name: str
    meaning: str
    examples: tuple[str, ...]
    keys: tuple[Key, ...]
    groups: tuple[Group, ...]


def read_program(name: str, folders: Sequence[Path] | None = None) -> Program:
    """Read a program with its groups and options from folders of config files (default: `conf/`); the first counts."""
    folders = folders or [Path(config_dir())]
    file = read_file(Path(config_dir(), f"{name}.yaml"))
    known = {*(key.path.split(".")[0] for key in file.keys), *(choice.group for choice in file.choices)}
    groups = (_read_group(choice, folders, known) for choice in file.choices)
    return Program(name, file.meaning, file.examples, _with_limits(file.keys, name, depth=0), tuple(groups))


def _read_group(choice: Choice, folders: Sequence[Path], known: set[str]) -> Group:
    paths = {path.stem: path for folder in reversed(folders) for path in Path(folder, choice.group).glob("*.yaml")}
    names = sorted(paths, key=lambda name: (name != choice.option, name))
    options = [_read_option(choice.group, name, paths[name]) for name in names]
    # The program refuses an option that sets keys of unknown sections.
    taken = (option for option in options if all(key.path.split(".")[0] in known for key in option.sets))
    return Group(choice.group, choice.meaning, choice.option, tuple(taken))


def _read_option(group: str, name: str, path: Path) -> Option:
    try:
        file = read_file(path, group)
    except ConfigError as error:  # a user's file: the help of all others is still wanted
        return Option(name, str(error), (), (), ())
    # An option that builds on another one brings no keys: it changes values.
    package = group.replace("/", ".")
    own = () if file.choices else tuple(key for key in file.keys if f"{key.path}.".startswith(f"{package}."))
    rest = tuple(key for key in file.keys if key not in own)
    keys = tuple(key for key in own if key.path != package)  # the section of the group itself is a heading, no key
    return Option(name, file.meaning, _with_limits(keys, f"{group}/{name}", depth=1), rest, file.choices, file.target)


def _with_limits(keys: Iterable[Key], place: str, *, depth: int) -> tuple[Key, ...]:
    """Fill in the limits. `depth`: the names in a path that the class of this place does not have."""
    owner = _OWNERS.get(place) or _OWNERS.get(f"{place.split('/')[0]}/")

    def limits(key: Key) -> str:
        if key.default is None:
            return f"class {key.target}" if key.target else ""
        if key.target:
            return _limits_of_argument(key.target, key.path.split(".")[-1])
        return "" if owner is None else _limits_of_field(owner, key.path, depth)

    return tuple(replace(key, limits=limits(key)) for key in keys)


def _load(owner: str) -> Any:
    module, name = re.split(r"[:.](?=\w+$)", owner)
    return getattr(import_module(module), name)


@cache
def _schema(owner: str) -> dict[str, Any]:
    schema: dict[str, Any] = _load(owner).model_json_schema()
    return schema


def _limits_of_field(owner: str, path: str, depth: int) -> str:
    schema = _schema(owner)
    found, defs = schema, schema.get("$defs", {})
    for name in path.split(".")[depth:]:
        found = _resolved(found, defs)
        if name not in found.get("properties", {}):
            if found.get("additionalProperties", True):
                return ""  # an argument of Lightning's Trainer, or of a class that the config doesn't name
            raise LookupError(f"{path}: {owner} has no such field")
        found = found["properties"][name]
    return _in_words(found, defs)


def _limits_of_argument(target: str, name: str) -> str:
    try:
        hints = annotations(_load(target).__init__)
        if name not in hints:
            return ""
        schema = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    except Exception:  # noqa: BLE001  # of a user's module, on import, or a type without a schema: the help goes on
        return ""
    return _in_words(schema, schema.get("$defs", {}))


def _resolved(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    return defs[schema["$ref"].rsplit("/")[-1]] if "$ref" in schema else schema


def _in_words(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """The values that a JSON schema allows; "" where it allows all."""
    schema = _resolved(schema, defs)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_in_words(member, defs) for member in schema["anyOf"]))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values:
        *others, last = (yaml.safe_dump(value).removesuffix("\n...\n") for value in values)
        return f"{', '.join(others)} or {last}" if others else last
    if schema.get("type") == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        length = f" of {least}" if least == most else f" of {least} or more" if least else ""
        return f"list{length} ({_in_words(schema['items'], defs)})"
    if schema.get("type") == "object":
        names = schema.get("properties")
        return f"section with {', '.join(names)}" if names else "section"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    # Whole numbers in full, 2/3 with four digits.
    digits = {name: ".12g" if schema[name] == int(schema[name]) else ".4g" for name in bounds if name in schema}
    limits = [f"{bounds[name]} {schema[name]:{shown}}" for name, shown in digits.items()]
    words = {"boolean": "true or false", "string": "text"}
    kind = schema.get("type", "")
    return " ".join(filter(None, [words.get(kind, kind), ", ".join(limits)]))


def help_text(program: str, folders: Sequence[Path] | None = None) -> str:
    """The text of `--help`: the keys and groups of `read_program`, in plain text of 100 columns."""
    found = read_program(program, folders)
    groups = [group for group in found.groups if group.name != HYDRA]
    lines = [found.meaning, "", *(f"  {example}" for example in found.examples), "", *_INTRODUCTION, "", "Groups:"]
    for group in groups:
        names = ", ".join(sorted(option.name for option in group.options))
        default = f"(default: {group.default or 'none'})" if len(group.options) > 1 else ""
        lines += _wrapped(f"{group.name}: {names} {_kept_together(default)}", 2)
    lines += ["", f"Keys of {program}:", *_entries(found.keys, 2)]
    for group in groups:
        several = len(group.options) > 1  # else the option says all
        lines += ["", f"Group {group.name}: {group.meaning}" if several else f"Group {group.name}"]
        for option in group.options:
            default = " (default)" if several and option.name == group.default else ""
            built = f" [{_kept_together(f'class {option.target}')}]" if option.target else ""
            lines += _entry(f"{group.name}={option.name}{default}", option.meaning + built, 2)
            lines += _entries(option.keys, 4)
    return "\n".join(lines)


_INTRODUCTION = (
    "Set a key with KEY=VALUE; choose an option with GROUP=OPTION. Brackets hold unit and limits.",
    "--cfg job prints the config of a command, -m runs a sweep, --hydra-help lists all flags.",
)


def _entries(keys: Iterable[Key], indent: int) -> list[str]:
    lines = []
    for key in keys:
        limits = ", ".join(filter(None, (_kept_together(key.unit), _kept_together(key.limits))))
        name = f"{key.path}:" if key.default is None else f"{key.path}={key.default}"
        lines += _entry(name, f"{key.meaning} [{limits}]" if limits else key.meaning, indent)
    return lines


def _entry(name: str, meaning: str, indent: int) -> list[str]:
    """A name and its meaning side by side, or the meaning below a long name."""
    names, meanings = _wrapped(name, indent), _wrapped(meaning, _COLUMN)
    if len(names) > 1 or len(names[0]) > _COLUMN - 2 or not meanings:
        return names + meanings
    return [names[0].ljust(_COLUMN) + meanings[0].lstrip(), *meanings[1:]]


_HARD_SPACE = "\xa0"  # where a line does not break


def _kept_together(text: str) -> str:
    return text.replace(" ", _HARD_SPACE) if len(text) < _WIDTH // 3 else text


def _wrapped(text: str, indent: int) -> list[str]:
    """Lines of at most 100 columns. A longer word, such as a path, gets a line of its own."""
    first, rest = " " * indent, " " * (indent if indent == _COLUMN else indent + 4)
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_HARD_SPACE, " ") for line in lines]


def markdown() -> str:
    """The whole reference as a page of MyST Markdown: programs first, then groups."""
    programs = [read_program(name) for name in PROGRAMS]
    lines = ["# Config reference", "", *_PREFACE, "", "## Programs", ""]
    for program in programs:
        lines += [f"### {program.name}", "", program.meaning, "", "```bash", *program.examples, "```", ""]
        lines += [*_table(program.keys), "", "Groups:", ""]
        for group in program.groups:
            default = f"`{group.default}`" if group.default else "none"
            lines.append(f"- [`{group.name}`](#{_anchor(group)}) (default {default}): {group.meaning}")
        lines.append("")
    lines += ["## Groups", ""]
    seen = {group.name: group for program in reversed(programs) for group in program.groups}
    for group in sorted(seen.values(), key=lambda group: group.name):
        users = ", ".join(program.name for program in programs if group.name in (own.name for own in program.groups))
        lines += [f"({_anchor(group)})=", f"### `{group.name}`", "", f"{group.meaning}. Used by {users}.", ""]
        for option in group.options:
            lines += _section(group, option)
    return "\n".join(lines).rstrip() + "\n"


_PREFACE = (
    "Set a key with `KEY=VALUE`; choose an option of a group with `GROUP=OPTION`. `--help` prints the keys and groups",
    "of one program. `--cfg job` prints the config of a command.",
)


def _anchor(group: Group) -> str:
    return f"config-{group.name.replace('/', '-')}"


def _section(group: Group, option: Option) -> list[str]:
    """An option of a group in Markdown."""
    default = " (default)" if option.name == group.default else ""
    lines = [f"#### `{group.name}={option.name}`{default}", "", option.meaning, ""]
    if option.target:
        lines += [f"Class `{option.target}`.", ""]
    chosen = [f"`{choice.group or group.name}={choice.option}`" for choice in option.choices]
    if chosen:
        lines += [f"Builds on {', '.join(chosen)}.", ""]
    values = [key for key in option.sets if key.default is not None]
    if values:
        notes = [f"- `{key.path}={key.default}`{f': {key.meaning}' if key.meaning else ''}" for key in values]
        lines += ["Sets:", "", *notes, ""]
    return [*lines, *_table(option.keys), ""] if option.keys else lines


def _table(keys: Iterable[Key]) -> list[str]:
    rows = [
        (f"`{key.path}`", key.meaning, key.unit, "" if key.default is None else f"`{key.default}`", key.limits)
        for key in keys
    ]
    return markdown_table(("key", "meaning", "unit", "default", "limits"), rows).splitlines()


if __name__ == "__main__":
    print(markdown(), end="")
