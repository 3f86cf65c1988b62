"""Encode text pairs into a file of embeddings: in parts that survive an interruption, verified at the end.

N rows, D embedding dimension
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from energy_flow.atomic import atomic_write
from energy_flow.data.pairs import PairDataset
from energy_flow.data.storage.arrays import SIDES, read_arrays
from energy_flow.data.storage.names import read_names
from energy_flow.data.text.encoder import TextEncoder
from energy_flow.data.text.pairs import TextPairs
from energy_flow.errors import ConfigError, DataError

_CHECKED = 16  # rows that are encoded again
_AGREE = 0.999  # least cosine with the stored row; int8 rows of 768 numbers reach 0.9999
_UNIT = 0.01  # tolerance of a stored row's length; float16 and int8 differ from 1 by 0.001
_LARGEST = 127  # largest int8, symmetric about 0

Arrays = dict[str, NDArray]


class PartialResult:
    """Encoded rows in the folder `<output>.partial`, one file per part.

    Args:
        output: the final file.
        identity: everything that the rows depend on, as plain values.

    Raises:
        ConfigError: the folder belongs to another identity; the message lists the differences.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self.folder = output.with_name(output.name + ".partial")
        described = self.folder / "identity.json"
        if not (described.is_file() and self._part(0).is_file()):
            self.folder.mkdir(exist_ok=True)
            atomic_write(described, json.dumps(identity, indent=2))
            return
        earlier = json.loads(described.read_text())
        differences = [
            f"  {name}: {earlier.get(name)} in the folder, {value} now"
            for name, value in identity.items()
            if earlier.get(name) != value
        ]
        if differences:
            listed = "\n".join(differences)
            raise ConfigError(
                f"output: {self.folder} holds parts of another encoding:\n{listed}\n"
                "Give the same settings again, or remove the folder to start over"
            )

    def add(self, start: int, arrays: Arrays) -> None:
        """Save the rows from `start` on: `source` and `target`, with scales for int8."""
        atomic_write(self._part(start), save(arrays))

    def parts(self) -> Iterator[Arrays]:
        """The saved parts in order, up to the first missing one.

        Raises:
            DataError: a part is damaged.
        """
        start = 0
        while (path := self._part(start)).is_file():
            arrays = {name: array.open() for name, array in read_arrays((path,)).items()}
            yield arrays
            start += len(arrays["source"])

    def num_rows(self) -> int:
        """Number of saved rows."""
        return sum(len(part["source"]) for part in self.parts())

    def joined(self) -> Arrays:
        """All saved rows."""
        parts = list(self.parts())
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _part(self, start: int) -> Path:
        return self.folder / f"{start:012d}.safetensors"


def encode_rest(
    texts: TextPairs,
    encoder: TextEncoder,
    partial: PartialResult,
    *,
    dtype: str,
    batch_size: int,
    part_size: int,
    advance: Callable[[int], None],
) -> None:
    """Encode the rows that `partial` lacks.

    Args:
        texts: all pairs.
        encoder: encodes them.
        partial: receives the rows.
        dtype: of the stored rows: int8, float16 or float32.
        batch_size: texts per batch of the encoder.
        part_size: rows per part.
        advance: called after every batch with its number of texts.

    Raises:
        ConfigError: int8 is too coarse for a row.
        DataError: a part is damaged, or the encoder returns unusable rows.
    """
    for start in range(partial.num_rows(), len(texts), part_size):
        arrays: Arrays = {}
        for side in SIDES:
            part = getattr(texts, side)[start : start + part_size]
            rows = np.empty((len(part), encoder.dim), np.float32)
            order = np.argsort([len(text) for text in part], kind="stable")  # similar lengths need little padding
            for at in range(0, len(part), batch_size):
                batch = order[at : at + batch_size]
                rows[batch] = encoder.encode([part[index] for index in batch], batch_size)
                advance(len(batch))
            arrays |= _stored(side, rows, dtype, start)
        partial.add(start, arrays)


def _stored(side: str, rows: NDArray[np.float32], dtype: str, start: int) -> Arrays:
    """Convert rows of length 1 to `dtype`; int8 rows get a scale each. `start` is the number of the first row.

    Raises:
        ConfigError: int8 is too coarse for a row. The check at the end would find it too, but hours later.
    """
    if dtype != "int8":
        return {side: rows.astype(dtype)}
    scale = np.abs(rows).max(axis=1) / np.float32(_LARGEST)
    steps = np.rint(rows / scale[:, None])
    kept = (rows * steps).sum(axis=1) / np.linalg.norm(steps, axis=1)
    worst = int(kept.argmin())
    if kept[worst] < _AGREE:
        raise ConfigError(
            f"dtype = int8: too coarse for this encoder: {side} row {start + worst} would have a cosine of "
            f"{kept[worst]:.4f} with its embedding, less than {_AGREE}, because one of its numbers is much larger than "
            "the others. Set dtype=float16"
        )
    return {side: steps.astype(np.int8), f"{side}_scale": scale}


def name_lines(texts: TextPairs) -> str:
    """The content of the .jsonl that names the rows by their targets."""
    pairs = zip(texts.source, texts.target, strict=True)
    lines = [json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in pairs]
    return "\n".join(lines) + "\n"


def check_output(output: Path, given: Path, texts: TextPairs) -> None:
    """Check that a file and its names can be written without overwriting other files.

    Args:
        output: the file to write.
        given: the file of the texts. If it has the place of the names, it must name the rows itself.
        texts: the pairs to encode.

    Raises:
        ConfigError: the suffix is wrong, the folder is missing or not writable, or a file is in the way.
    """
    where, names = f"output = {output}", output.with_suffix(".jsonl")
    if output.suffix != ".safetensors":
        raise ConfigError(f"{where}: must end in .safetensors")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"{where}: its folder is missing or not writable. Create it, or give another")
    if output.exists():
        raise ConfigError(f"{where}: already exists. Remove it, or give another name")
    if not names.exists():
        return
    if names.samefile(given):
        if _named(output, texts) != texts.target:
            raise ConfigError(
                f"{where}: its rows would be named by the input file, which has other keys. Give another name"
            )
    elif names.read_bytes() != name_lines(texts).encode():
        raise ConfigError(f"{where}: the names of its rows would overwrite {names}. Give another name")


def _named(output: Path, texts: TextPairs) -> list[str] | None:
    try:
        return read_names((output,), len(texts))
    except DataError:  # the input has its texts under other keys
        return None


def assemble(
    partial: PartialResult, output: Path, texts: TextPairs, encoder: TextEncoder, metadata: dict[str, str]
) -> float:
    """Join the parts, verify them, then move the output and its names into place.

    Returns:
        The lowest cosine between a stored row and its newly encoded text, for a sample of rows.

    Raises:
        DataError: rows are wrong; the output is not written.
    """
    whole = partial.folder / output.name
    atomic_write(whole, save(partial.joined(), metadata))
    atomic_write(whole.with_suffix(".jsonl"), name_lines(texts))
    lowest = _check(whole, texts, encoder)
    if not output.with_suffix(".jsonl").exists():  # it may be the input, or left by an interrupted attempt
        os.replace(whole.with_suffix(".jsonl"), output.with_suffix(".jsonl"))
    os.replace(whole, output)
    shutil.rmtree(partial.folder)
    return lowest


def _check(path: Path, texts: TextPairs, encoder: TextEncoder) -> float:
    dataset = PairDataset(path, normalize=False, key="output")  # reads all rows and refuses NaN and Inf
    if dataset.names != texts.target:
        raise DataError(f"output: {path}: its names differ from the input; remove {path.parent}")
    for side, rows in zip(SIDES, dataset.all(), strict=True):
        off = torch.nonzero((rows.norm(dim=1) - 1).abs() > _UNIT).flatten().tolist()
        if off:
            raise DataError(f"output: {path}: {side} row {off[0]} does not have length 1; remove {path.parent}")
    sample = np.random.default_rng(0).permutation(len(texts))[:_CHECKED]
    batch = dataset.__getitems__(sample.tolist())
    lowest = 1.0
    for side in SIDES:
        again = encoder.encode([getattr(texts, side)[row] for row in sample])
        cosine = torch.nn.functional.cosine_similarity(batch[side].double(), torch.from_numpy(again).double())
        lowest = min(lowest, cosine.min().item())
        if lowest < _AGREE:
            raise DataError(
                f"output: {path}: {side} row {sample[cosine.argmin()]}, encoded again, has a cosine of {lowest:.4f} "
                f"with the stored row, less than {_AGREE}. Has the encoder changed? Remove {path.parent} to start over"
            )
    return lowest
