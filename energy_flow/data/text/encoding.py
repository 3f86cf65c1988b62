"""Text pairs to a file of embeddings: in parts that outlive an interruption, checked at the end.

N rows, D embedding dimension.
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

from energy_flow.atomic import write_whole
from energy_flow.data.pairs import PairDataset
from energy_flow.data.storage.arrays import SIDES, read_sides
from energy_flow.data.storage.names import read_names
from energy_flow.data.text.encoder import TextEncoder
from energy_flow.data.text.pairs import TextPairs
from energy_flow.errors import ConfigError, DataError

_CHECKED = 16  # rows that are encoded again
_AGREE = 0.999  # cosine; int8 rows of 768 numbers keep 0.9999
_UNIT = 0.01  # how far from 1 the length of a stored row may be; float16 and int8 keep 0.001
_LARGEST = 127  # of int8, on both sides of 0

Arrays = dict[str, NDArray]


class PartialResult:
    """Encoded rows in a folder beside the output, a file for every part.

    Args:
        output: the file that they will be.
        identity: what the rows depend on, as plain values.

    Raises:
        ConfigError: the folder holds rows of something else; names what differs.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self.folder = output.with_name(output.name + ".partial")
        described = self.folder / "identity.json"
        if described.is_file() and self._part(0).is_file():
            self._compare(json.loads(described.read_text()), identity)
        else:
            self.folder.mkdir(exist_ok=True)
            write_whole(described, json.dumps(identity, indent=2).encode())

    def add(self, start: int, arrays: Arrays) -> None:
        """Keep the rows from `start` on: `source` and `target`, with scales where they are int8."""
        write_whole(self._part(start), save(arrays))

    def parts(self) -> Iterator[Arrays]:
        """What is there, in order, as far as no part is missing.

        Raises:
            DataError: a damaged part.
        """
        start = 0
        while (path := self._part(start)).is_file():
            arrays = {name: array.open() for name, array in read_sides(path).items()}
            yield arrays
            start += len(arrays["source"])

    def num_rows(self) -> int:
        """Rows that are there."""
        return sum(len(part["source"]) for part in self.parts())

    def joined(self) -> Arrays:
        """All rows."""
        parts = list(self.parts())
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def remove(self) -> None:
        """The folder and all that is in it."""
        shutil.rmtree(self.folder)

    def _part(self, start: int) -> Path:
        return self.folder / f"{start:012d}.safetensors"

    def _compare(self, begun: dict[str, Any], identity: dict[str, Any]) -> None:
        lines = [
            f"  {name}: {begun.get(name)} there, {value} here"
            for name, value in identity.items()
            if begun.get(name) != value
        ]
        if lines:
            listed = "\n".join(lines)
            raise ConfigError(
                f"output: {self.folder} holds the beginning of something else:\n{listed}\n"
                "Give what it was begun with, or remove the folder to start anew"
            )


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
    """Encode the rows that `partial` doesn't have yet.

    Args:
        dtype: of the stored rows: int8, float16 or float32.
        batch_size: texts that the encoder sees at a time.
        part_size: rows after which they are kept.
        advance: told of every batch how many texts it had.

    Raises:
        ConfigError: int8 is too coarse for a row.
        DataError: a damaged part, or the encoder gives no numbers.
    """
    for start in range(partial.num_rows(), len(texts), part_size):
        arrays: Arrays = {}
        for side in SIDES:
            part = getattr(texts, side)[start : start + part_size]
            rows = np.empty((len(part), encoder.dim), np.float32)
            order = np.argsort([len(text) for text in part], kind="stable")  # texts of like length need little padding
            for at in range(0, len(part), batch_size):
                batch = order[at : at + batch_size]
                rows[batch] = encoder.encode([part[index] for index in batch], batch_size)
                advance(len(batch))
            arrays |= _stored(side, rows, dtype, start)
        partial.add(start, arrays)


def _stored(side: str, rows: NDArray[np.float32], dtype: str, start: int) -> Arrays:
    """Rows of length 1, the first of them row `start`, as they are written; int8 ones with a scale each.

    Raises:
        ConfigError: int8 is too coarse for a row; said here, not by the check at the end, hours later.
    """
    if dtype != "int8":
        return {side: rows.astype(dtype)}
    scale = np.abs(rows).max(axis=1) / np.float32(_LARGEST)
    steps = np.rint(rows / scale[:, None])
    kept = (rows * steps).sum(axis=1) / np.linalg.norm(steps, axis=1)
    worst = int(kept.argmin())
    if kept[worst] < _AGREE:
        raise ConfigError(
            f"dtype = int8: too coarse for this encoder: {side} row {start + worst} would keep a cosine of "
            f"{kept[worst]:.4f} with its embedding, less than {_AGREE}, as one number of it is far above the others. "
            "Set dtype=float16"
        )
    return {side: steps.astype(np.int8), f"{side}_scale": scale}


def name_lines(texts: TextPairs) -> str:
    """The .jsonl that names the rows by their targets."""
    pairs = zip(texts.source, texts.target, strict=True)
    lines = [json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in pairs]
    return "\n".join(lines) + "\n"


def check_output(output: Path, given: Path, texts: TextPairs) -> None:
    """See that a file and its names can be written without losing another.

    Args:
        output: the file to write.
        given: where the texts come from; it names the rows itself where it stands beside `output`.

    Raises:
        ConfigError: another suffix, a folder that isn't there or can't be written, or a file in the way.
    """
    where, names = f"output = {output}", output.with_suffix(".jsonl")
    if output.suffix != ".safetensors":
        raise ConfigError(f"{where}: must end in .safetensors")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"{where}: its folder isn't there or can't be written. Make it, or give another")
    if output.exists():
        raise ConfigError(f"{where}: is there already. Remove it, or give another name")
    if not names.exists():
        return
    if names.samefile(given):
        if _named(output, texts) != texts.target:
            raise ConfigError(f"{where}: the file beside it would name its rows, but that is the input. Give another")
    elif names.read_bytes() != name_lines(texts).encode():
        raise ConfigError(f"{where}: the names of its rows would be written over {names}. Give another name")


def _named(output: Path, texts: TextPairs) -> list[str] | None:
    try:
        return read_names((output,), len(texts))
    except DataError:  # the input says its texts under other keys
        return None


def assemble(
    partial: PartialResult, output: Path, texts: TextPairs, encoder: TextEncoder, metadata: dict[str, str]
) -> float:
    """Join the parts to the output and its names, check them, then put them in their place.

    Returns:
        The lowest cosine between a stored row and its text encoded again, of a few rows.

    Raises:
        DataError: rows that aren't what they should be; the output isn't written then.
    """
    whole = partial.folder / output.name
    write_whole(whole, save(partial.joined(), metadata))
    write_whole(whole.with_suffix(".jsonl"), name_lines(texts).encode())
    lowest = _check(whole, texts, encoder)
    if not output.with_suffix(".jsonl").exists():  # or it is the input, or of an attempt that ended here
        os.replace(whole.with_suffix(".jsonl"), output.with_suffix(".jsonl"))
    os.replace(whole, output)
    partial.remove()
    return lowest


def _check(path: Path, texts: TextPairs, encoder: TextEncoder) -> float:
    dataset = PairDataset(path, normalize=False, key="output")  # which reads all of it: NaN and Inf are refused
    if dataset.names != texts.target:
        raise DataError(f"output: {path}: its rows don't have the names of the input; remove {path.parent}")
    for side, rows in zip(SIDES, dataset.all(), strict=True):
        off = torch.nonzero((rows.norm(dim=1) - 1).abs() > _UNIT).flatten().tolist()
        if off:
            raise DataError(f"output: {path}: {side} row {off[0]} isn't of length 1; remove {path.parent}")
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
                f"with what is stored, less than {_AGREE}. Has the encoder changed? Remove {path.parent} to start anew"
            )
    return lowest
