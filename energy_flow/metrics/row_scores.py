"""Scores of every test row, saved as `test_rows.safetensors` in the run folder.

The mean says which of two methods is better; the scores of the rows say whether the difference is more than chance.

N test rows
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

from energy_flow.atomic import atomic_write, digest
from energy_flow.errors import DataError

FILE = "test_rows.safetensors"
MODEL = "model"
_MEASURE, _FINGERPRINT, _DIGEST = "measure", "data_fingerprint", "sha256"  # keys of the metadata


@dataclass(frozen=True)
class RowScores:
    """Scores of one or several methods on the rows of a test split, in row order.

    Attributes:
        measure: the kind of score: rank or mse.
        fingerprint: sha256 of the test split; only scores with equal fingerprints can be paired.
        values: scores, float64 [N], by method: `model` and the names of baselines.
    """

    measure: str
    fingerprint: str
    values: Mapping[str, Tensor]

    def with_methods(self, values: Mapping[str, Tensor]) -> Self:
        """A copy with the scores of more methods on the same rows."""
        return dataclasses.replace(self, values={**self.values, **values})


def write_row_scores(path: Path, scores: RowScores) -> None:
    """Write a file for `read_row_scores`, completely or not at all.

    Raises:
        ValueError: the scores are not float64 [N] with the same N for all methods.
        OSError: the path can't be written.
    """
    values = {name: value.contiguous() for name, value in scores.values.items()}
    if wrong := _wrong(values):
        raise ValueError(wrong)
    metadata = {_MEASURE: scores.measure, _FINGERPRINT: scores.fingerprint}
    atomic_write(path, save(values, {**metadata, _DIGEST: digest(_text(metadata), values)}))


def read_row_scores(path: Path) -> RowScores:
    """Read the row scores of a run, `model` first.

    Raises:
        DataError: the file is missing, damaged, or was not written by `write_row_scores`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. A run writes it if it tests all rows of its test split")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged, or not a safetensors file ({error}). Test the model again") from error
    missing = [key for key in (_MEASURE, _FINGERPRINT, _DIGEST) if key not in metadata]
    if missing or MODEL not in values:
        reason = f"its metadata have no {missing[0]!r}" if missing else f"it has no {MODEL!r}"
        raise DataError(f"{path}: not a file of row scores: {reason}. Give a file from a run folder")
    if metadata[_DIGEST] != digest(_text(metadata), values):
        raise DataError(f"{path}: damaged: its content does not match its sha256. Test the model again")
    if wrong := _wrong(values):
        raise DataError(f"{path}: {wrong}. Test the model again")
    order = [MODEL, *(name for name in values if name != MODEL)]
    return RowScores(metadata[_MEASURE], metadata[_FINGERPRINT], {name: values[name] for name in order})


def _text(metadata: Mapping[str, str]) -> str:
    return f"{metadata[_MEASURE]} {metadata[_FINGERPRINT]}"


def _wrong(values: Mapping[str, Tensor]) -> str:
    """The fault in the dtypes or shapes; empty if there is none."""
    lengths = {len(value) if value.dim() == 1 else -1 for value in values.values()}
    if len(lengths) == 1 and min(lengths) > 0 and all(value.dtype == torch.float64 for value in values.values()):
        return ""
    found = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in values.items())
    return f"row scores must be float64 [N] with the same N > 0 for all methods: {found}"
