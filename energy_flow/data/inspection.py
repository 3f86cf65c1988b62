"""Inspect a data set: one pass over every split finds faults that training refuses, and other oddities.

N rows of a split, D embedding dimension
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energy_flow.data.pairs import fingerprint
from energy_flow.data.settings import SPLITS, DataSettings, misfits, missing_splits
from energy_flow.data.storage.arrays import SIDES
from energy_flow.data.storage.columns import Column, Survey
from energy_flow.data.storage.duplicates import (
    Duplicates,
    Hashes,
    duplicate_warnings,
    duplicates_between,
    duplicates_within,
    pair_hashes,
)
from energy_flow.errors import DataError

FAR_OFF = 10.0  # a row whose norm differs from the median by this factor probably has another origin
_SCALES = 3.0  # if the sides' scales differ by this factor, the difference dominates MSE


@dataclass(frozen=True)
class SideReport:
    """Findings about `source` or `target` of a split. The field names are keys of `check.json`.

    Attributes:
        dtype: of the stored numbers.
        not_finite, bad_scales, zero_rows: numbers of such rows.
        copies: duplicate rows.
        norm_min, norm_median, norm_max: L2 norms of the finite rows before normalisation; NaN: no row is finite.
        rms: root mean square of the numbers in finite rows; NaN: no row is finite.
        far_off: number of rows whose norm is more than `FAR_OFF` times, or less than 1 / `FAR_OFF` of, the median.
        first_far_off: the first of these rows.
        constant_columns: columns with equal numbers in all finite rows, if there are two or more rows.
    """

    dtype: str
    not_finite: int
    bad_scales: int
    zero_rows: int
    copies: Duplicates
    norm_min: float
    norm_median: float
    norm_max: float
    rms: float
    far_off: int
    first_far_off: int | None
    constant_columns: list[int]


@dataclass(frozen=True)
class SplitReport:
    """Findings about a split; `sides` are `source` and `target`. The field names are keys of `check.json`."""

    where: str
    rows: int
    dim: int
    fingerprint: str
    sides: dict[str, SideReport]
    pair_copies: Duplicates


@dataclass
class DataReport:
    """Findings about a data set.

    Attributes:
        splits: readable splits.
        shared: (split, other split) -> rows of `source`, `target` and `pair` that the other split has too.
        refused: reasons why training would refuse the data, one message each.
        warnings: other oddities, one message each.
        num_bytes: stored size of all numbers that were read.
    """

    splits: dict[str, SplitReport] = field(default_factory=dict)
    shared: dict[tuple[str, str], dict[str, Duplicates]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The report as plain containers; numbers that are not finite become None."""
        plain = asdict(self)
        plain["shared"] = {", ".join(splits): sides for splits, sides in plain["shared"].items()}
        return {"fine": not self.refused, **_finite(plain)}


def inspect(settings: DataSettings) -> DataReport:
    """Read every existing split once.

    This needs memory for a chunk, and 12 bytes per row and side. The arrays of a compressed .npz are decompressed as a
    whole, as in training.
    """
    report = DataReport(refused=missing_splits(settings, "fit"))
    hashes: dict[str, Hashes] = {}
    odd: dict[str, list[str]] = {}  # oddity -> splits that have it
    for split in SPLITS:
        if not settings.has(split):
            continue
        try:
            hashes[split] = _inspect_split(report, split, settings.columns(split))
        except DataError as error:
            report.refused.append(str(error))
            continue
        for oddity in _oddities(report.splits[split].sides, settings.normalize):
            odd.setdefault(oddity, []).append(f"data.{split}")
    report.warnings = [f"{', '.join(where)}: {oddity}" for oddity, where in odd.items()] + list(
        duplicate_warnings(hashes)
    )
    for one, other in combinations(hashes, 2):
        report.shared[other, one] = {
            kind: duplicates_between(found, hashes[one][kind]) for kind, found in hashes[other].items()
        }
    return report


def _inspect_split(report: DataReport, split: str, columns: tuple[Column, Column]) -> Hashes:
    sides, surveys = {}, []
    for side, column in zip(SIDES, columns, strict=True):
        statistics = _Statistics(column)
        survey = column.survey(statistics)
        surveys.append(survey)
        sides[side] = statistics.report(survey)
        report.refused += [f"data.{split}: {complaint}" for complaint in column.complaints(survey)]
        report.num_bytes += column.num_bytes
    where = ", ".join(dict.fromkeys(str(column.values.file) for column in columns))
    num_rows, dim = columns[0].num_rows, columns[0].dim
    others = {name: known.dim for name, known in report.splits.items()}
    report.refused += misfits(split, num_rows, dim, where, others)
    hashes = pair_hashes(*surveys)
    copies = duplicates_within(hashes["pair"])
    report.splits[split] = SplitReport(where, num_rows, dim, fingerprint(*surveys), sides, copies)
    return hashes


class _Statistics:
    """Collects the numbers of a `SideReport` chunk by chunk, without rows that have NaN or Inf."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self._norms = np.full(column.num_rows, np.nan, np.float32)
        self._low = np.full(column.dim, np.inf, np.float32)
        self._high = np.full(column.dim, -np.inf, np.float32)
        self._squares = 0.0

    def __call__(self, rows: slice, decoded: NDArray[np.float32]) -> None:
        # In float64, where squares of float32 values neither overflow nor underflow; NaN and Inf stay.
        squares = np.einsum("nd,nd->n", decoded, decoded, dtype=np.float64)
        finite = np.isfinite(squares)
        if not finite.all():
            decoded = decoded[finite]
        self._norms[rows][finite] = np.sqrt(squares[finite])
        self._low = np.minimum(self._low, decoded.min(axis=0, initial=np.inf))
        self._high = np.maximum(self._high, decoded.max(axis=0, initial=-np.inf))
        self._squares += squares[finite].sum()

    def report(self, survey: Survey) -> SideReport:
        column, finite = self.column, self._norms[~np.isnan(self._norms)]
        median = float(np.median(finite)) if len(finite) else math.nan
        # Rows of zeros are counted on their own.
        far = (self._norms > FAR_OFF * median) | ((self._norms < median / FAR_OFF) & (self._norms > 0))
        first = int(far.argmax()) if far.any() else None
        constant = np.flatnonzero(self._low == self._high).tolist() if len(finite) > 1 else []
        return SideReport(
            dtype=column.values.kind,
            not_finite=len(survey.not_finite),
            bad_scales=len(survey.bad_scales),
            zero_rows=len(survey.zero),
            copies=duplicates_within(survey.hashes),
            norm_min=float(finite.min(initial=np.inf)) if len(finite) else math.nan,
            norm_median=median,
            norm_max=float(finite.max(initial=-np.inf)) if len(finite) else math.nan,
            rms=math.sqrt(self._squares / (len(finite) * column.dim)) if len(finite) else math.nan,
            far_off=int(far.sum()),
            first_far_off=first,
            constant_columns=constant,
        )


def _oddities(sides: Mapping[str, SideReport], normalize: bool) -> Iterator[str]:
    """Findings that training accepts although they are probably mistakes, one message each."""
    for side, found in sides.items():
        if found.far_off:
            yield (
                f"{side}: rows more than {FAR_OFF:g} times longer or shorter than the median norm "
                f"{found.norm_median:.4g}: {found.far_off:,}, the first is row {found.first_far_off}"
            )
        if columns := found.constant_columns:
            listed = ", ".join(map(str, columns[:3])) + (", ..." if len(columns) > 3 else "")
            yield f"{side}: columns with the same number in every row: {len(columns):,} ({listed})"
        if found.zero_rows and not normalize:  # with normalize, training refuses them
            yield f"{side}: rows with only zeros: {found.zero_rows:,}"
    source, target = sides["source"].rms, sides["target"].rms
    if not normalize and source and target and max(source / target, target / source) > _SCALES:
        yield f"source and target have different scales: root mean squares {source:.3g} and {target:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
