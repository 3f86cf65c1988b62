"""Names of rows, from a .jsonl next to the embeddings: line i names row i."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from energy_flow.errors import DataError, brief

_KEYS = ("headword", "name", "text", "word", "target", "id")
_SOURCE_KEYS = ("definition", "source")

Line = tuple[int, dict[str, Any] | str]  # line number, and the fields or the fault


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
        lines = list(jsonl_lines(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text: {error}; repair or remove it") from error
    if len(lines) != num_rows:
        raise DataError(
            f"{path}: {len(lines):,} lines, but {num_rows:,} rows in {files[0].name}; line i must name row i; "
            "repair or remove it"
        )
    names: list[str] = []
    key: str | None = None
    for number, fields in lines:
        if isinstance(fields, str):
            raise DataError(f"{path}: line {number} {fields}; repair or remove the file")
        key = key or next((known for known in _KEYS if known in fields), None)
        if key is None:
            raise DataError(
                f"{path}: line 1 has the keys {brief(', '.join(fields) or 'none')}; it needs one of {', '.join(_KEYS)}"
            )
        name = fields.get(key)
        if not isinstance(name, str | int):
            raise DataError(
                f"{path}: line {number} has {key} = {brief(repr(name))}; it must be text, because line 1 is named by "
                f"{key}"
            )
        names.append(str(name))
    return names


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


def jsonl_lines(content: str) -> Iterator[Line]:
    """Parse the lines of a .jsonl; a line that is not a JSON object is returned as its fault."""
    lines = content.removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield number, "is empty"
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"isn't JSON: {error}"
            continue
        yield number, fields if isinstance(fields, dict) else f"is a {type(fields).__name__}, not an object {{...}}"
