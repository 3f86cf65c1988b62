"""Names of rows, from a .jsonl next to the embeddings: line i names row i."""

import json
from pathlib import Path
from typing import Any

from energy_flow.errors import DataError, brief

_KEYS = ("headword", "name", "text", "word", "target", "id")
_SOURCE_KEYS = ("definition", "source")


def read_names(files: tuple[Path, ...], num_rows: int) -> list[str] | None:
    """Read the names of rows from the .jsonl with the stem of one of `files`; None without such a file.

    Every line is an object. Line 1 decides which key holds the name: the first of headword, name, text, word, target
    and id.

    Raises:
        DataError: the number of lines is not `num_rows`, a line has no name, or the file is not UTF-8.
    """
    path = _names_file(files)
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text: {error}; repair or remove it") from error
    if len(lines) != num_rows:
        raise DataError(
            f"{path}: {len(lines):,} lines, but {num_rows:,} rows in {files[0].name}; line i must name row i; "
            "repair or remove it"
        )
    objects = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    key = next((key for key in _KEYS if key in objects[0]), None)
    if key is None:
        raise DataError(
            f"{path}: line 1 has the keys {brief(', '.join(objects[0]) or 'none')}; it needs one of {', '.join(_KEYS)}"
        )
    return [_name(path, number, entry, key) for number, entry in enumerate(objects, 1)]


def read_source_text(files: tuple[Path, ...], row: int) -> str | None:
    """Read the text of a row's source, `definition` or `source`, from the .jsonl of `read_names`; None if unknown."""
    path = _names_file(files)
    if path is None:
        return None
    entry = json.loads(path.read_text(encoding="utf-8").split("\n")[row])
    text = next((entry[key] for key in _SOURCE_KEYS if key in entry), None)
    return text if isinstance(text, str) else None


def _names_file(files: tuple[Path, ...]) -> Path | None:
    return next((path for file in files if (path := file.with_suffix(".jsonl")).is_file()), None)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: line {number} isn't JSON: {error}; repair or remove the file") from error
    if not isinstance(entry, dict):
        raise DataError(f"{path}: line {number} is a {type(entry).__name__}; every line must be an object {{...}}")
    return entry


def _name(path: Path, number: int, entry: dict[str, Any], key: str) -> str:
    name = entry.get(key)
    if not isinstance(name, str | int):
        raise DataError(
            f"{path}: line {number} has {key} = {brief(repr(name))}; it must be text, because line 1 is named by {key}"
        )
    return str(name)
