"""What a data set is like: one pass over every split, in chunks; what training would refuse, and what it should know.

N rows of a split, D embedding dimension.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energy_flow.data.datamodule import misfits, missing_splits
from energy_flow.data.pairs import fingerprint
from energy_flow.data.settings import SPLITS, DataSettings
from energy_flow.data.storage.arrays import SIDES
from energy_flow.data.storage.columns import Column, Survey
from energy_flow.data.storage.duplicates import Copies, PairHashes, copies_between, copies_within, copy_warnings
from energy_flow.errors import DataError

FAR_OFF = 10.0  # times longer or shorter than the median: rows that come from somewhere else
_SCALES = 3.0  # how many times larger one side's numbers may be before MSE is mostly about that


@dataclass(frozen=True)
class SideReport:
    """`source` or `target` of a split.

    Attributes:
        dtype: as stored.
        not_finite, bad_scales, zero_rows: how many rows.
        copies: rows that stand earlier in the split.
        norm_min, norm_median, norm_max, rms: L2 norms of the finite rows, not normalised, and the root of the mean
            square of their numbers; NaN where no row is finite.
        far_off: rows whose norm is `FAR_OFF` times the median, or that part of it; `first_far_off` is one of them.
        constant_columns: of the D, those with the same number in every finite row of two or more.
    """

    dtype: str
    not_finite: int
    bad_scales: int
    zero_rows: int
    copies: Copies
    norm_min: float
    norm_median: float
    norm_max: float
    rms: float
    far_off: int
    first_far_off: int | None
    constant_columns: list[int]


@dataclass(frozen=True)
class SplitReport:
    """One split: `sides` are `source` and `target`."""

    where: str
    rows: int
    dim: int
    fingerprint: str
    sides: dict[str, SideReport]
    pair_copies: Copies


@dataclass
class DataReport:
    """A whole data set.

    Attributes:
        splits: those that could be read.
        shared: (split, other split) -> rows of `source`, `target` and `pair` of the one that the other has too.
        refused: why training would refuse it, a line each; empty: it wouldn't.
        warnings: what else is worth a look, a line each.
        num_bytes: that were read, as they are stored.
    """

    splits: dict[str, SplitReport] = field(default_factory=dict)
    shared: dict[tuple[str, str], dict[str, Copies]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain containers; a number that isn't finite is null."""
        shared = {f"{split}, {other}": value for (split, other), value in self.shared.items()}
        plain = {name: value for name, value in self.__dict__.items() if name not in ("splits", "shared")}
        splits = {name: asdict(split) for name, split in self.splits.items()}
        both = {name: {side: asdict(copies) for side, copies in sides.items()} for name, sides in shared.items()}
        return {"fine": not self.refused, **plain, "splits": _finite(splits), "shared": both}


def inspect(settings: DataSettings) -> DataReport:
    """Read every split that there is once. Memory is that of a chunk and 12 bytes per row of a side.

    A compressed .npz is the exception: its arrays are unpacked as a whole, by training too.
    """
    report = DataReport(refused=missing_splits(settings, "fit"))
    hashes: dict[str, PairHashes] = {}
    odd: dict[str, list[str]] = {}  # what is odd -> the splits where it is so
    for split in SPLITS:
        if not settings.has(split):
            continue
        try:
            source, target = settings.columns(split)
            hashes[split] = _inspect_split(report, split, source, target)
        except DataError as error:
            report.refused.append(str(error))
            continue
        for what in _oddities(report.splits[split].sides, settings.normalize):
            odd.setdefault(what, []).append(f"data.{split}")
    report.warnings = [f"{', '.join(where)}: {what}" for what, where in odd.items()] + list(copy_warnings(hashes))
    for one, other in combinations(hashes, 2):
        report.shared[other, one] = {
            side: copies_between(getattr(hashes[other], side), getattr(hashes[one], side)) for side in (*SIDES, "pair")
        }
    return report


def _inspect_split(report: DataReport, split: str, source: Column, target: Column) -> PairHashes:
    statistics = {side: _Statistics(column) for side, column in zip(SIDES, (source, target), strict=True)}
    surveys = {side: look.column.survey(look) for side, look in statistics.items()}
    sides = {side: look.report(surveys[side]) for side, look in statistics.items()}
    where = ", ".join(dict.fromkeys(str(column.values.file) for column in (source, target)))
    hashes = PairHashes.of(*surveys.values())
    for side, look in statistics.items():
        report.refused += [f"data.{split}: {complaint}" for complaint in look.column.complaints(surveys[side])]
        report.num_bytes += look.column.num_bytes
    others = {name: known.dim for name, known in report.splits.items()}
    report.refused += misfits(split, source.num_rows, source.dim, where, others)
    digest, copies = fingerprint(*surveys.values()), copies_within(hashes.pair)
    report.splits[split] = SplitReport(where, source.num_rows, source.dim, digest, sides, copies)
    return hashes


class _Statistics:
    """Gathers what a `SideReport` says of one column, chunk by chunk; rows with NaN or Inf are left out."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self._norms = np.full(column.num_rows, np.nan, np.float32)
        self._low = np.full(column.dim, np.inf, np.float32)
        self._high = np.full(column.dim, -np.inf, np.float32)
        self._squares = 0.0

    def __call__(self, rows: slice, decoded: NDArray[np.float32]) -> None:
        # In float64, whose squares neither overflow nor vanish for any float32 value; NaN and Inf stay what they are.
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
        # A row of zeros is counted as that.
        far = (self._norms > FAR_OFF * median) | ((self._norms < median / FAR_OFF) & (self._norms > 0))
        first = int(far.argmax()) if far.any() else None
        constant = np.flatnonzero(self._low == self._high).tolist() if len(finite) > 1 else []
        return SideReport(
            dtype=column.values.kind,
            not_finite=len(survey.not_finite),
            bad_scales=len(survey.bad_scales),
            zero_rows=len(survey.zero),
            copies=copies_within(survey.hashes),
            norm_min=float(finite.min(initial=np.inf)) if len(finite) else math.nan,
            norm_median=median,
            norm_max=float(finite.max(initial=-np.inf)) if len(finite) else math.nan,
            rms=math.sqrt(self._squares / (len(finite) * column.dim)) if len(finite) else math.nan,
            far_off=int(far.sum()),
            first_far_off=first,
            constant_columns=constant,
        )


def _oddities(sides: Mapping[str, SideReport], normalize: bool) -> Iterator[str]:
    """What can be trained on, and was hardly meant."""
    for side, found in sides.items():
        if found.far_off:
            yield (
                f"{side}: rows more than {FAR_OFF:g} times longer or shorter than the median norm "
                f"{found.norm_median:.4g}: {found.far_off:,}, the first is row {found.first_far_off}"
            )
        if columns := found.constant_columns:
            listed = ", ".join(map(str, columns[:3])) + (", ..." if len(columns) > 3 else "")
            yield f"{side}: columns with the same number in every row: {len(columns):,} ({listed})"
        if found.zero_rows and not normalize:  # or it is refused
            yield f"{side}: rows of nothing but zeros: {found.zero_rows:,}"
    source, target = sides["source"].rms, sides["target"].rms
    if not normalize and source and target and max(source / target, target / source) > _SCALES:
        yield f"source and target have different scales: numbers of about {source:.3g} and {target:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
