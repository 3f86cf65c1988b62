"""Records of tensors: one way to map them, and one way to list their tensors.

A record is a tensor, or a dataclass, `NamedTuple`, tuple, list or dict of records. Everything else in it, such as
None, numbers and strings, is a plain value.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record")


def map_tensors(function: Callable[..., Tensor], *records: Record) -> Record:
    """Apply a function to the tensors that stand at the same place of several records.

    `map_tensors(Tensor.detach, record)` detaches a record; `map_tensors(torch.add, left, right)` adds two.

    Args:
        function: takes one tensor of every record.
        records: one or more, of one structure.

    Returns:
        A new record of the same structure. Plain values are those of the first record.

    Raises:
        ValueError: the records differ in their types, keys, lengths or plain values.
    """
    first = records[0]
    if all(isinstance(record, Tensor) for record in records):
        return function(*records)  # type: ignore[return-value]
    if any(type(record) is not type(first) for record in records):
        raise ValueError(f"records of different types: {', '.join(type(record).__name__ for record in records)}")
    parts = [_parts(record) for record in records]
    if parts[0] is None:
        if any(record != first for record in records):
            raise ValueError(f"records with different values: {', '.join(map(repr, records))}")
        return first
    if any(list(part) != list(parts[0]) for part in parts):
        raise ValueError(f"records with different keys: {', '.join(str(list(part)) for part in parts)}")
    return _rebuild(first, {key: map_tensors(function, *(part[key] for part in parts)) for key in parts[0]})


def tensors_of(record: Any) -> list[Tensor]:
    """All tensors of a record, in the order of its fields."""
    if isinstance(record, Tensor):
        return [record]
    return [tensor for part in (_parts(record) or {}).values() for tensor in tensors_of(part)]


def held_bytes(record: Any) -> int:
    """Bytes of the memory blocks that the tensors of a record hold; tensors that share a block count once."""
    blocks = [tensor.untyped_storage() for tensor in tensors_of(record)]
    return sum({block.data_ptr(): block.nbytes() for block in blocks}.values())


def _parts(record: Any) -> Any:
    """The parts of a record by their key; None for a plain value."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    if isinstance(record, dict):
        return record
    if isinstance(record, tuple | list):
        return dict(enumerate(record))
    return None


def _rebuild(record: Any, parts: dict[Any, Any]) -> Any:
    """A record of the same type from new parts."""
    if dataclasses.is_dataclass(record):
        return type(record)(**parts)  # type: ignore[operator]
    if isinstance(record, dict):
        return parts
    values = parts.values()
    return type(record)(*values) if hasattr(record, "_fields") else type(record)(values)
