"""Verify a checkpoint file before anything in it is loaded.

With `weights_only=True` torch runs no code, but it trusts the sizes that a file claims: a few hundred bytes can ask for
GiBs, and not every version compares the length of a record with the size of its tensor. So torch's own restricted
unpickler reads the pickle first, with tensors that have no memory.
"""

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler
from torch.storage import TypedStorage, UntypedStorage

from energy_flow.errors import CheckpointError

# Names that a checkpoint of tensors and plain containers can hold: a part of those that torch allows.
_GLOBALS = re.compile(
    r"torch (\w+Storage|Size|device|bool|u?int\d+|b?float\d+|complex\d+)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\.serialization _get_layout|torch\.storage UntypedStorage"
    r"|collections (OrderedDict|Counter)|(__builtin__|builtins) set"
)
_MAX_VALUES, _MAX_DEPTH = 1_000_000, 50  # of containers; a value in several places counts once for each


def read_archive(path: Path, *, outline: bool = False) -> Any:
    """Verify a file that `torch.save` wrote, and load it on the CPU; as an outline with tensors on `meta`, unread.

    Raises:
        CheckpointError: wrong sizes, names of code, or values that are no plain tree.
        Exception: of any type, from a corrupt file: zip and unpickler run on corrupt bytes.
    """
    with path.open("rb") as file:  # opened once: no other file can take its place between the checks and the loading
        contents = _outline(file)
        if not outline:
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True)
    check_tree(contents)
    return contents


def _outline(file: BinaryIO) -> Any:
    """The contents with tensors on `meta`, after every check that needs no tensor."""
    with zipfile.ZipFile(file) as archive:
        records, root = _records(archive, os.fstat(file.fileno()).st_size)
        broken = archive.testzip()  # torch compares no checksums: corrupt weights would load as other weights
        if broken is not None:
            raise CheckpointError(f"wrong checksum of {broken}")
        pickled = archive.read(f"{root}/data.pkl")
    for opcode, name, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(name)):
            raise CheckpointError(
                f"names {str(name)[:80]!r}, which no checkpoint of energy_flow does; nothing of it was run"
            )
    reader = _OutlineReader(pickled, {name.removeprefix(f"{root}/data/"): size for name, size in records.items()})
    contents = reader.load()
    if any(storage.nbytes() != size for storage, size in reader.storages):  # torch lets a storage grow
        raise CheckpointError("has tensors that are larger than their records")
    return contents


def _records(archive: zipfile.ZipFile, file_size: int) -> tuple[dict[str, int], str]:
    """Name -> bytes of all records, and the folder inside the archive that holds them.

    Python and torch each read the archive, and must see the same: nothing in front of it, no name twice (torch ignores
    case). Records are uncompressed and don't overlap, so together they can't hold more bytes than the file.
    """
    members = archive.infolist()
    sizes = {member.filename: member.file_size for member in members}
    if not members or min(member.header_offset for member in members) != 0:
        raise CheckpointError("there are bytes in front of its records")
    if len({name.lower() for name in sizes}) < len(members):
        raise CheckpointError("has records of the same name")
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise CheckpointError("has compressed or encrypted records; torch.save writes neither")
    if any(m.file_size != m.compress_size for m in members) or sum(sizes.values()) > file_size:
        raise CheckpointError("claims more bytes than it has")
    root = members[0].filename.partition("/")[0]
    if f"{root}/data.pkl" not in sizes or not all(name.startswith(f"{root}/") for name in sizes):
        raise CheckpointError("has no data.pkl, or records outside its folder")
    return sizes, root


class _OutlineReader(Unpickler):
    """Read a pickle with storages of the right size and no memory."""

    def __init__(self, pickled: bytes, records: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._records = records
        self.storages: list[tuple[UntypedStorage, int]] = []  # with sizes; also those that the contents drop

    def persistent_load(self, pid: Any) -> TypedStorage:
        _, storage_type, key, location, count = pid
        dtype = torch.uint8 if storage_type is UntypedStorage else storage_type.dtype
        size = count * dtype.itemsize
        if not isinstance(location, str) or self._records.get(key) != size:
            raise CheckpointError(
                f"record {str(key)[:80]} holds {self._records.get(key)} bytes, its tensor needs {size}"
            )
        storage = UntypedStorage(size, device="meta")
        self.storages.append((storage, size))
        return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def check_tree(contents: Any) -> None:
    """Raise a CheckpointError unless values are a tree of bounded size, with tensors that have all their numbers.

    A list that holds another one twice, and so on, is small in a file and endless for code that walks through it.
    """
    level, count = [contents], 0
    for _ in range(_MAX_DEPTH):
        count += len(level)
        if count > _MAX_VALUES:
            raise CheckpointError(f"holds more than {_MAX_VALUES:,} values")
        for value in level:
            if isinstance(value, Tensor) and value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise CheckpointError(f"has a tensor of shape {list(value.shape)} with fewer numbers than that")
        level = list(islice((part for value in level for part in _parts(value)), _MAX_VALUES + 1))
        if not level:
            return
    raise CheckpointError(f"holds values more than {_MAX_DEPTH} levels deep")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        return chain(value, value.values())
    return iter(value) if isinstance(value, list | tuple | set) else iter(())
