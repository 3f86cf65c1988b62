"""Names of rows: a .jsonl beside the embeddings, line i for row i."""

import json
from pathlib import Path
from typing import Any

from energy_flow.errors import DataError, brief

_KEYS = ("headword", "name", "text", "word", "target", "id")
_SOURCE_KEYS = ("definition", "source")


def read_names(files: tuple[Path, ...], num_rows: int) -> list[str] | None:
    """The names of `num_rows` rows from the .jsonl that has the stem of one of `files`; None where there is none.

    A line is an object; its name is the value of the first key of headword, name, text, word, target,
    id that line 1 has.

    Raises:
        DataError: another number of lines than rows, a line that isn't such an object, not UTF-8.
    """
    path = _beside(files)
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text: {error}; mend or remove it") from error
    if len(lines) != num_rows:
        raise DataError(
            f"{path}: {len(lines):,} lines, but {num_rows:,} rows in {files[0].name}; line i must name row i; "
            "mend or remove it"
        )
    objects = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    key = next((key for key in _KEYS if key in objects[0]), None)
    if key is None:
        raise DataError(
            f"{path}: line 1 has the keys {brief(', '.join(objects[0]) or 'none')}; one must be {', '.join(_KEYS)}"
        )
    return [_name(path, number, entry, key) for number, entry in enumerate(objects, 1)]


def read_source_text(files: tuple[Path, ...], row: int) -> str | None:
    """The text of a row's source, where the .jsonl that `read_names` reads says it: as `definition` or `source`."""
    path = _beside(files)
    if path is None:
        return None
    entry = json.loads(path.read_text(encoding="utf-8").split("\n")[row])
    text = next((entry[key] for key in _SOURCE_KEYS if key in entry), None)
    return text if isinstance(text, str) else None


def _beside(files: tuple[Path, ...]) -> Path | None:
    return next((path for file in files if (path := file.with_suffix(".jsonl")).is_file()), None)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: line {number} isn't JSON: {error}; mend or remove the file") from error
    if not isinstance(entry, dict):
        raise DataError(f"{path}: line {number} is a {type(entry).__name__}; every line must be an object {{...}}")
    return entry


def _name(path: Path, number: int, entry: dict[str, Any], key: str) -> str:
    name = entry.get(key)
    if not isinstance(name, str | int):
        raise DataError(
            f"{path}: line {number} has {key} = {brief(repr(name))}; it must be text, as every line is named by {key}"
        )
    return str(name)
