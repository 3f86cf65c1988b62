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
    if len(records) > 1:
        _check_structure(records)
    if isinstance(first, Tensor):
        return function(*records)  # type: ignore[return-value]
    parts = [_parts(record) for record in records]
    if parts[0] is None:
        return first
    return _rebuild(first, {key: map_tensors(function, *[part[key] for part in parts]) for key in parts[0]})


def tensors_of(record: Any) -> list[Tensor]:
    """All tensors of a record, in the order of its fields."""
    if isinstance(record, Tensor):
        return [record]
    return [tensor for part in (_parts(record) or {}).values() for tensor in tensors_of(part)]


def held_bytes(record: Any) -> int:
    """Bytes of the memory blocks that the tensors of a record hold; tensors that share a block count once."""
    blocks = [tensor.untyped_storage() for tensor in tensors_of(record)]
    return sum({block.data_ptr(): block.nbytes() for block in blocks}.values())


def _check_structure(records: tuple[Any, ...]) -> None:
    """Check that records agree in all but their tensors, without looking into their parts."""
    types = [Tensor if isinstance(record, Tensor) else type(record) for record in records]
    if any(other is not types[0] for other in types):
        raise ValueError(f"records of different types: {', '.join(other.__name__ for other in types)}")
    if types[0] is Tensor:
        return
    parts = [_parts(record) for record in records]
    if parts[0] is None:
        if any(record != records[0] for record in records):
            raise ValueError(f"records with different values: {', '.join(map(repr, records))}")
    elif any(list(part) != list(parts[0]) for part in parts):
        raise ValueError(f"records with different keys: {', '.join(str(list(part)) for part in parts)}")


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
    kind = type(record)
    if dataclasses.is_dataclass(kind):
        return kind(**parts)
    if isinstance(record, dict):
        return parts
    return kind(*parts.values()) if hasattr(kind, "_fields") else kind(parts.values())
