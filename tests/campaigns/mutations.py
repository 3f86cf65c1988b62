"""Mutations that damage a file: blind ones, and ones that know the structure of headers."""

import io
import random
import re
import zipfile
from collections.abc import Callable, Sequence

Mutation = Callable[[bytes, random.Random, Sequence[bytes]], bytes]

# Replacements of numbers and words in headers.
NUMBERS = (*b"0 -1 1 7 255 65536 2147483648 4294967295 9223372036854775807".split(), b"1" + b"0" * 30)
WORDS = (
    *b"<f4 <f8 |i1 <i8 >f4 |O <U5 |V4 F32 F64 BF16 I8 F8_E4M3 BOOL".split(),
    *b"source target source_scale target_scale ../../etc/passwd /etc/passwd ~ \\\\host\\x".split(),
    *b"true null NaN 1e999 [] {} \" __import__('os').system('true')".split(),
    *(b"\xff\xfe", b"\x00"),
)
HEAD = 600  # bytes that contain the headers


def flips(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Flip a few bits, more often in the head."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        end = min(HEAD, len(damaged)) if rng.random() < 0.6 else len(damaged)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrites(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Overwrite 1, 2, 4 or 8 bytes, such as a length or an offset."""
    damaged, size = bytearray(content), rng.choice((1, 2, 4, 8))
    start = rng.randrange(max(1, min(HEAD, len(damaged)) - size) if rng.random() < 0.6 else max(1, len(damaged) - size))
    values = (
        b"\0" * size,
        b"\xff" * size,
        b"\x7f" * size,
        rng.randbytes(size),
        (1 << (8 * size - 2)).to_bytes(size, "little"),
    )
    damaged[start : start + size] = rng.choice(values)
    return bytes(damaged)


def truncations(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Cut off the end of the file."""
    return content[: rng.randrange(len(content))]


def blocks(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Remove a block, repeat it, or fill it with random bytes."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 4, 16, 64, 256)))
    middle = rng.choice((b"", content[start:end] * 2, rng.randbytes(end - start)))
    return content[:start] + middle + content[end:]


def splices(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Join the beginning of one file and the end of another."""
    other = rng.choice(others)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def numbers(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Replace a number of a text header."""
    return _replaced(content, rng, rb"-?\d+", NUMBERS)


def words(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Replace a word of a text header: a type, a name, a path."""
    return _replaced(content, rng, rb"[\w./<>|-]{2,}", WORDS)


def records(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Damage one record of a zip archive and correct its checksum; or rename, compress, remove or repeat one."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # noqa: BLE001 - damaged earlier, or no archive
        return headers(content, rng, others)
    index = 0 if rng.random() < 0.5 else rng.randrange(len(parts))  # the first record is the pickle of a checkpoint
    name, record = parts[index]
    kind = rng.random()
    if kind < 0.75 and record:
        parts[index] = name, rng.choice((flips, overwrites, truncations, blocks, numbers, words))(record, rng, others)
    elif kind < 0.85:
        parts[index] = rng.choice((f"../{name}", f"/{name}", name.upper(), f"{name}.npy", "source.npy", "x\0y")), record
    elif kind < 0.92:
        parts.append((name, record[: len(record) // 2]))
    else:
        del parts[index]
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as target:
        for part in parts:
            target.writestr(*part)
    return file.getvalue()


def headers(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Change the length of a safetensors header; or change its text and correct the length."""
    if len(content) < 8 or content[8:9] != b"{":
        return flips(content, rng, others)
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        length = rng.choice((0, 1, length - 1, length + 1, 1 << 40, (1 << 64) - 1)) % (1 << 64)
        return length.to_bytes(8, "little") + content[8:]
    header = rng.choice((numbers, words, blocks, flips))(content[8 : 8 + length] or b"{}", rng, others)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def nested(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Insert thousands of open brackets somewhere."""
    start, bracket = rng.randrange(len(content)), rng.choice((b"[", b"(", b'{"a":', b'"', b"-"))
    return content[:start] + bracket * rng.choice((10, 1_000, 50_000)) + content[start:]


def _replaced(content: bytes, rng: random.Random, pattern: bytes, values: Sequence[bytes]) -> bytes:
    found = list(re.finditer(pattern, content[:HEAD]))
    if not found:
        return flips(content, rng, ())
    place = rng.choice(found)
    return content[: place.start()] + rng.choice(values) + content[place.end() :]


MUTATIONS: tuple[Mutation, ...] = (
    *(flips, overwrites, truncations, blocks, splices, numbers, words),
    *(records, records, headers, headers, nested),
)
