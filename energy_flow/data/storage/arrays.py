"""Find arrays in files without loading them.

A `StoredArray` holds file, offset, dtype and shape; `open` maps it. Sizes in headers are checked against the file size
before memory is allocated. Nothing is unpickled.

N rows, D embedding dimension
"""

import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from energy_flow.errors import DataError, brief

SIDES = ("source", "target")

# By safetensors name; numpy has no bfloat16, so its bits are read.
_SAFETENSORS_DTYPES = {"I8": "<i1", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_NPY_DTYPES = ("int8", "float16", "float32", "float64")
_DTYPES_TEXT = "float16, bfloat16 (only .safetensors), float32, float64, or int8 with row scales"

# Deflate compresses by 1032:1 at most (https://zlib.net/zlib_tech.html); a header that claims more is false.
_MAX_DEFLATE_RATIO = 1032
# Errors that zipfile raises for damaged archives, found by fuzzing. RuntimeError: missing features, passwords.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error)
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, not yet loaded; or an array in memory, whose `file` is its source, for messages."""

    file: Path
    name: str
    kind: str  # int8, float16, bfloat16, float32, float64
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int | None  # of the first number in the file; None: in memory, or a compressed member of an .npz
    fortran_order: bool = False
    numbers: NDArray | None = None  # of an array in memory

    def open(self) -> NDArray:
        """The stored numbers: a read-only memory map, or an array for a compressed member.

        Raises:
            DataError: a compressed member is damaged.
        """
        if self.numbers is not None:
            return self.numbers
        if self.offset is None:
            return _decompress(self)
        order: Literal["F", "C"] = "F" if self.fortran_order else "C"
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape, order)


def read_arrays(files: Sequence[Path], sides: Sequence[str] = SIDES) -> dict[str, StoredArray]:
    """Find the arrays of `sides`, and their `*_scale` if present.

    Args:
        files: one .safetensors or .npz with all arrays, or one .npy per side.
        sides: names of the arrays; those of .npy files, in order.

    Raises:
        DataError: a file is missing, empty, damaged or has a wrong suffix; an array is missing or not numeric.
    """
    readers = {".safetensors": _safetensors, ".npz": _npz}
    pair = "[source.npy,target.npy]"
    if len(files) not in (1, len(sides)):
        raise DataError(f"{len(files)} files given; give one file or two .npy: {pair}")
    path = files[0]
    if len(files) == 1:
        if path.suffix in readers:
            return readers[path.suffix](path, sides)
        if path.suffix != ".npy":
            if len(sides) == 1:
                raise DataError(
                    f"{path}: unknown suffix {path.suffix!r}; give a .safetensors or .npz with {sides[0]}, or a .npy"
                )
            raise DataError(
                f"{path}: unknown suffix {path.suffix!r}; give a .safetensors, a .npz or a list of two .npy: {pair}"
            )
        if len(sides) > 1:
            raise DataError(f"{path}: one .npy holds one array; give the pair as a list: {pair}")
    return {name: _npy(path, name) for name, path in zip(sides, files, strict=True)}


def _opened(path: Path) -> IO[bytes]:
    if not path.exists():
        raise DataError(f"{path}: no such file; relative paths start at the current folder {Path.cwd()}")
    if not path.is_file():
        raise DataError(f"{path}: is a folder; give a file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); write it again")
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: can't be opened: {error.strerror}") from error


def _npy(path: Path, name: str) -> StoredArray:
    if path.suffix != ".npy":
        raise DataError(f"{path}: a list must hold two .npy files; give a {path.suffix or 'file'} without a list")
    with _opened(path) as file:
        return _npy_array(file, path, name, path.stat().st_size)


def _safetensors(path: Path, sides: Sequence[str]) -> dict[str, StoredArray]:
    with _opened(path) as file:
        try:
            # The library checks the header: offsets inside the file, no overlaps, sizes that match shape and dtype.
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise DataError(f"{path}: not a safetensors file, or truncated: {error}; write it again") from error
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: _safetensors_array(path, name, header[name], 8 + length) for name in _needed(path, header, sides)}


def _safetensors_array(path: Path, name: str, entry: dict, start: int) -> StoredArray:
    stored, shape = entry["dtype"], tuple(entry["shape"])
    if stored not in _SAFETENSORS_DTYPES:
        raise _wrong_dtype(path, name, stored)
    dtype = np.dtype(_SAFETENSORS_DTYPES[stored])
    kind = "bfloat16" if stored == "BF16" else dtype.name
    return StoredArray(path, name, kind, dtype, shape, start + entry["data_offsets"][0])


def _npz(path: Path, sides: Sequence[str]) -> dict[str, StoredArray]:
    with _opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                members = {info.filename[:-4]: info for info in entries if info.filename.endswith(".npy")}
                names = _needed(path, members, sides)
                return {name: _npz_array(archive, file, path, name, members[name]) for name in names}
        except _ZIP_ERRORS as error:
            raise DataError(f"{path}: not an .npz file, or truncated: {error}; write it with numpy.savez") from error


def _npz_array(archive: zipfile.ZipFile, file: IO[bytes], path: Path, name: str, info: zipfile.ZipInfo) -> StoredArray:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{path}: {name} is encrypted, or compressed by another method than numpy's; write it with numpy.savez"
        )
    if info.compress_type == zipfile.ZIP_DEFLATED:
        if info.file_size > info.compress_size * _MAX_DEFLATE_RATIO + 1024:
            raise DataError(
                f"{path}: {name} claims {info.file_size:,} bytes compressed to {info.compress_size:,}: damaged"
            )
        with archive.open(info) as member:
            return replace(_npy_array(member, path, name, info.file_size), offset=None)
    start = _stored_member_start(file, path, name, info)
    file.seek(start)
    return _npy_array(file, path, name, start + info.file_size)


def _stored_member_start(file: IO[bytes], path: Path, name: str, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_ZIP_LOCAL_HEADER.size)
    size = path.stat().st_size
    if len(header) == _ZIP_LOCAL_HEADER.size:
        signature, name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(header)
        start = info.header_offset + _ZIP_LOCAL_HEADER.size + name_length + extra_length
        if signature == b"PK\x03\x04" and info.file_size == info.compress_size and start + info.file_size <= size:
            return start
    raise DataError(f"{path}: {name} lies outside the file: truncated or damaged; write it with numpy.savez")


def _npy_array(file: IO[bytes], path: Path, name: str, end: int) -> StoredArray:
    """Read the .npy header at the current position of `file`; the array must end at position `end`."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"unknown version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
    # numpy documents ValueError; the others occur for damaged headers, found by fuzzing.
    except (ValueError, TypeError, SyntaxError, EOFError, tokenize.TokenError, RecursionError, zlib.error) as error:
        raise DataError(f"{path}: {name} is not an .npy array, or truncated: {brief(error)}; write it again") from error
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, which could run code; convert it with .astype(float)")
    if dtype.name not in _NPY_DTYPES:
        raise _wrong_dtype(path, name, str(dtype))
    needed, there = math.prod(shape) * dtype.itemsize, end - file.tell()
    if min(shape, default=0) < 0 or needed != there:
        raise DataError(
            f"{path}: {name} of shape {shape} and dtype {dtype} needs {needed:,} bytes, but has {there:,}: "
            "truncated or damaged; write it again"
        )
    return StoredArray(path, name, dtype.name, dtype, shape, file.tell(), fortran_order)


def _decompress(stored: StoredArray) -> NDArray:
    try:
        with np.load(stored.file) as archive:  # doesn't unpickle, and compares the checksum
            numbers: NDArray = archive[f"{stored.name}.npy"]
            return numbers
    except _ZIP_ERRORS as error:
        raise DataError(f"{stored.file}: {stored.name} can't be decompressed: {error}; write it again") from error


def _needed(path: Path, there: Iterable[str], sides: Sequence[str]) -> list[str]:
    there = sorted(there)
    if missing := [name for name in sides if name not in there]:
        listed = brief(", ".join(there) or "nothing")
        raise DataError(
            f"{path}: no {' and no '.join(missing)} in it; it holds {listed}; name the arrays {', '.join(sides)}"
        )
    return [name for name in there if name.removesuffix("_scale") in sides]


def _wrong_dtype(path: Path, name: str, dtype: str) -> DataError:
    return DataError(f"{path}: {name} has dtype {brief(dtype)}; convert it to {_DTYPES_TEXT}")
