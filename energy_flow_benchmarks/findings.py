"""What a benchmark finds: rows of measurements, and tables and notes beside them."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One measurement; these are also the keys of a row of `benchmark.json`."""

    benchmark: str
    case: str  # what was done, and which variant the ratio is to
    size: int  # of the case: flows, landings, ...
    variant: str  # who did it
    seconds: float | None  # median; None: not measured
    peak_bytes: int | None = None  # most memory while it ran, beyond what was there before; None: not measured
    ratio: float | None = None  # seconds of the baseline / seconds: how many times faster than the baseline
    share: float | None = None  # of the machine's rate that the arithmetic ran at; None: not asked
    count: int | None = None  # of events, where these were counted and nothing was timed


@dataclass(frozen=True)
class Grid:
    """A table of words: what was found, read for a reader."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Findings:
    """All that one benchmark has found."""

    rows: list[Row]
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rows_of(
    benchmark: str,
    case: str,
    size: int,
    seconds: dict[str, float | None],
    baseline: str | None = None,
    peaks: dict[str, int | None] | None = None,
) -> list[Row]:
    """One row per variant of a case.

    Args:
        seconds: per variant; None where it was not measured.
        baseline: the variant that ratios refer to, None for no ratios.
        peaks: bytes per variant.
    """
    base = None if baseline is None else seconds[baseline]
    return [
        Row(
            benchmark=benchmark,
            case=case,
            size=size,
            variant=variant,
            seconds=taken,
            peak_bytes=(peaks or {}).get(variant),
            ratio=base / taken if base is not None and taken else None,
        )
        for variant, taken in seconds.items()
    ]


def find(rows: Iterable[Row], case: str, size: int, variant: str) -> Row:
    """The row of a case that begins with `case`.

    Raises:
        KeyError: there is no such row.
    """
    for row in rows:
        if row.case.startswith(case) and row.size == size and row.variant == variant:
            return row
    raise KeyError(f"{case}, {size}, {variant}")


def sizes(rows: Iterable[Row], case: str) -> list[int]:
    """The sizes at which a case was measured, ascending."""
    return sorted({row.size for row in rows if row.case.startswith(case)})
