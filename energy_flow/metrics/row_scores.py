"""What a method reached on every test row, kept as `test_rows.safetensors` in the run folder.

Means say which of two methods is better; whether that is more than chance only their rows can tell. N test rows
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from energy_flow.atomic import digest, write_whole
from energy_flow.errors import DataError

FILE = "test_rows.safetensors"
MODEL = "model"
_MEASURE, _FINGERPRINT, _DIGEST = "measure", "data_fingerprint", "sha256"  # keys of the metadata


@dataclass(frozen=True)
class RowScores:
    """What one or several methods reached on the rows of a test split, in its order.

    Attributes:
        measure: what the numbers are: rank or mse.
        fingerprint: sha256 of the test split; rows of another one are no pair of these.
        values: float64 [N] of `model`, and of every baseline by its name.
    """

    measure: str
    fingerprint: str
    values: Mapping[str, Tensor]

    def beside(self, values: Mapping[str, Tensor]) -> Self:
        """These, and those of other methods on the same rows."""
        return dataclasses.replace(self, values={**self.values, **values})


def write_row_scores(path: Path, rows: RowScores) -> None:
    """Write a file that `read_row_scores` takes, whole or not at all.

    Raises:
        ValueError: not float64 [N] with one N for all.
        OSError: the path can't be written.
    """
    values = {name: value.contiguous() for name, value in rows.values.items()}
    wrong = _wrong(values)
    if wrong:
        raise ValueError(wrong)
    metadata = {_MEASURE: rows.measure, _FINGERPRINT: rows.fingerprint}
    write_whole(path, save(values, {**metadata, _DIGEST: digest(_text(metadata), values)}))


def read_row_scores(path: Path) -> RowScores:
    """The test rows of a run, `model` first.

    Raises:
        DataError: missing, damaged, or not written by `write_row_scores`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; a run writes it when it tests all of its test split")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged, or no safetensors file ({error}). Test the model anew") from error
    missing = [key for key in (_MEASURE, _FINGERPRINT, _DIGEST) if key not in metadata]
    if missing or MODEL not in values:
        what = f"no {missing[0]!r} in its metadata" if missing else f"no {MODEL!r} in it"
        raise DataError(f"{path}: holds no test rows of a run: {what}. Give the file of a run folder")
    if metadata[_DIGEST] != digest(_text(metadata), values):
        raise DataError(f"{path}: damaged: its content has another sha256 than it says. Test the model anew")
    wrong = _wrong(values)
    if wrong:
        raise DataError(f"{path}: {wrong}. Test the model anew")
    order = [MODEL, *(name for name in values if name != MODEL)]
    return RowScores(metadata[_MEASURE], metadata[_FINGERPRINT], {name: values[name] for name in order})


def _text(metadata: Mapping[str, str]) -> str:
    return f"{metadata[_MEASURE]} {metadata[_FINGERPRINT]}"


def _wrong(values: Mapping[str, Tensor]) -> str:
    """What isn't as it must be; nothing where all is."""
    lengths = {len(value) if value.dim() == 1 else -1 for value in values.values()}
    if len(lengths) == 1 and min(lengths) > 0 and all(value.dtype == torch.float64 for value in values.values()):
        return ""
    found = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in values.items())
    return f"rows must be float64 [N] with the same N > 0 for all: {found}"
