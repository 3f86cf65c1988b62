"""Read pairs of texts from a .jsonl or .csv; all unusable lines are found before encoding starts."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from energy_flow.data.storage.names import Line, jsonl_lines
from energy_flow.errors import DataError, brief

_LISTED = 3  # bad lines in a message


@dataclass(frozen=True)
class TextPairs:
    """N pairs of texts: row i of `source` and `target` is a pair."""

    source: list[str]
    target: list[str]

    def __len__(self) -> int:
        return len(self.source)

    def digest(self) -> str:
        """sha256 (hex) of all texts in order."""
        return hashlib.sha256(json.dumps([self.source, self.target]).encode()).hexdigest()


def read_texts(path: Path, source_key: str, target_key: str) -> TextPairs:
    """Read the pairs of a .jsonl (one object per line) or a .csv (with a header) in UTF-8.

    Args:
        path: the file.
        source_key, target_key: keys of the two texts.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or has an unknown suffix; or lines lack a text. The message has
            the first of these lines.
    """
    readers = {".jsonl": jsonl_lines, ".csv": _csv}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; give a .jsonl or a .csv with a header")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
        raise DataError(f"{path}: can't be read ({reason}); give a UTF-8 text file") from error
    keys, found, bad = (source_key, target_key), [], []
    for number, fields in readers[path.suffix](content):
        wrong = fields if isinstance(fields, str) else _wrong(fields, keys)
        if wrong is not None:
            bad.append(f"line {number} {wrong}")
        elif not isinstance(fields, str):
            found.append((fields[source_key], fields[target_key]))
    if bad:
        listed = "\n".join(f"  {line}" for line in bad[:_LISTED])
        raise DataError(
            f"{path}: unusable lines: {len(bad):,}; repair or remove them, or set source_key and target_key to the "
            f"keys of the texts:\n{listed}"
        )
    if not found:
        raise DataError(f"{path}: no pairs in it; give at least one line with {source_key} and {target_key}")
    return TextPairs([source for source, _ in found], [target for _, target in found])


def _csv(content: str) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(content), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"isn't CSV: {error}"
            return  # the start of the next line is unknown
        if header is None:
            header = fields
        elif len(fields) != len(header):
            yield number, f"has {len(fields)} fields, the header {len(header)}" if fields else "is empty"
        else:
            yield number, dict(zip(header, fields, strict=True))


def _wrong(fields: dict[str, Any], keys: tuple[str, str]) -> str | None:
    for key in keys:
        if key not in fields:
            return f"has no {key}; it has {brief(', '.join(map(str, fields)) or 'nothing')}"
        text = fields[key]
        if not isinstance(text, str):
            return f"has {key} = {brief(json.dumps(text))}; it must be text"
        if not text.strip():
            return f"has an empty {key}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"has a lone surrogate, which is half a character, in {key}"
    return None
