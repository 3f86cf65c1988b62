"""What a checkpoint file says of itself, checked before anything of it is loaded.

torch runs no code with `weights_only=True`, but it believes what a file says of sizes: a few hundred bytes can ask for
GiBs, and not every version compares a record's length with what its tensor needs. So the pickle is read once without
numbers first, by torch's own restricted unpickler.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler
from torch.storage import TypedStorage, UntypedStorage

from energy_flow.errors import CheckpointError

# Names that a checkpoint of tensors and plain containers can hold: a part of what torch allows.
_GLOBALS = re.compile(
    r"torch (\w+Storage|Size|device|bool|u?int\d+|b?float\d+|complex\d+)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\.serialization _get_layout|torch\.storage UntypedStorage"
    r"|collections (OrderedDict|Counter)|(__builtin__|builtins) set"
)
_MAX_VALUES, _MAX_DEPTH = 1_000_000, 50  # of containers, values that stand in several places counted in each


def read_archive(path: Path) -> Any:
    """The contents of a file that `torch.save` wrote, on the CPU.

    Raises:
        CheckpointError: sizes that aren't true, names of code, or values that are no plain tree.
        Exception: of any type, from a damaged file: zip and unpickler run on damaged bytes.
    """
    with zipfile.ZipFile(path) as archive:
        records, root = _records(archive, path.stat().st_size)
        broken = archive.testzip()  # torch doesn't compare the checksums: damaged weights would load as other weights
        if broken is not None:
            raise CheckpointError(f"wrong checksum of {broken}")
        pickled = archive.read(f"{root}/data.pkl")
    for opcode, name, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(name)):
            raise CheckpointError(
                f"names {str(name)[:80]!r}, which no checkpoint of energy_flow does; nothing of it was run"
            )
    _Sizes(pickled, {name.removeprefix(f"{root}/data/"): size for name, size in records.items()}).check()
    contents = torch.load(path, map_location="cpu", weights_only=True)
    check_tree(contents)
    return contents


def _records(archive: zipfile.ZipFile, file_size: int) -> tuple[dict[str, int], str]:
    """Name -> bytes of all records, and the folder in the archive that they stand in.

    The two readers of the file, Python's and torch's, must see the same: nothing in front of the archive, no name twice
    (torch takes upper and lower case for the same). Records are stored as they are, side by side, so that they can't
    hold more bytes than the file.
    """
    members = archive.infolist()
    sizes = {member.filename: member.file_size for member in members}
    if not members or min(member.header_offset for member in members) != 0:
        raise CheckpointError("something stands in front of its records")
    if len({name.lower() for name in sizes}) < len(members):
        raise CheckpointError("has records of the same name")
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise CheckpointError("has records that are packed or encrypted; torch.save stores them as they are")
    if any(m.file_size != m.compress_size for m in members) or sum(sizes.values()) > file_size:
        raise CheckpointError("claims more bytes than it has")
    root = members[0].filename.partition("/")[0]
    if f"{root}/data.pkl" not in sizes or not all(name.startswith(f"{root}/") for name in sizes):
        raise CheckpointError("has no data.pkl, or records beside its folder")
    return sizes, root


class _Sizes(Unpickler):
    """Reads a pickle with storages of the right size and no memory."""

    def __init__(self, pickled: bytes, records: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._records = records
        self._storages: list[tuple[UntypedStorage, int]] = []

    def check(self) -> None:
        """Raises CheckpointError where a tensor asks for more than its record holds, also one that isn't kept."""
        self.load()
        if any(storage.nbytes() != size for storage, size in self._storages):  # torch lets a storage grow
            raise CheckpointError("has tensors that are larger than their records")

    def persistent_load(self, pid: Any) -> TypedStorage:
        _, storage_type, key, location, count = pid
        dtype = torch.uint8 if storage_type is UntypedStorage else storage_type.dtype
        size = count * dtype.itemsize
        if not isinstance(location, str) or self._records.get(key) != size:
            raise CheckpointError(
                f"record {str(key)[:80]} holds {self._records.get(key)} bytes, its tensor needs {size}"
            )
        storage = UntypedStorage(size, device="meta")
        self._storages.append((storage, size))
        return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def check_tree(contents: Any) -> None:
    """See that values are a tree of bounded size, and that tensors hold a number for each of their places.

    A list that holds another one twice, and so on, is small in a file and endless to whoever walks through it.

    Raises:
        CheckpointError: they aren't.
    """
    level, seen = [contents], 0
    for _ in range(_MAX_DEPTH):
        seen += len(level)
        if seen > _MAX_VALUES:
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
