"""Results of a benchmark: measured rows, tables of text and notes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """Time and memory of one variant; both are None where memory ran out."""

    seconds: float | None  # median
    peak_bytes: int | None = None  # beyond the memory in use before; None: not measured

    def rate(self, amount: float) -> float:
        """Return `amount` per second.

        Raises:
            RuntimeError: there is no time, because memory ran out.
        """
        if self.seconds is None:
            raise RuntimeError("out of memory: the rate of this machine could not be measured")
        return amount / self.seconds


@dataclass(frozen=True)
class Row:
    """One measurement. The fields are the keys of a row of `benchmark.json`."""

    benchmark: str
    case: str  # the work, and the variant that ratios refer to
    size: int  # of the case: flows, landings, ...
    variant: str
    seconds: float | None  # median; None: not measured
    peak_bytes: int | None = None  # beyond the memory in use before; None: not measured
    ratio: float | None = None  # seconds of the baseline / seconds
    share: float | None = None  # least seconds at the machine's own rate / seconds; None: does not apply
    count: int | None = None  # of events, where events were counted and nothing was timed


@dataclass(frozen=True)
class Grid:
    """A table of text cells."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Findings:
    """All results of one benchmark."""

    rows: list[Row]
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rows_of(
    benchmark: str,
    case: str,
    size: int,
    found: Mapping[str, Measured],
    baseline: str | None = None,
    least: float | None = None,
) -> list[Row]:
    """Return one row per variant of a case.

    Args:
        benchmark, case, size: the same fields of all rows; the case also names the baseline.
        found: measurements by variant.
        baseline: the variant that ratios refer to; None: no ratios.
        least: seconds that the machine's own rate allows; None: no shares.
    """
    base = None if baseline is None else found[baseline].seconds
    case = case if baseline is None else f"{case}; ratio to {baseline}"
    return [
        Row(
            benchmark,
            case,
            size,
            variant,
            one.seconds,
            one.peak_bytes,
            ratio=base / one.seconds if base and one.seconds else None,
            share=least / one.seconds if least and one.seconds else None,
        )
        for variant, one in found.items()
    ]


def grid_by_size(title: str, heading: str, sizes: Iterable[int], unit: str, lines: Mapping[str, Sequence[str]]) -> Grid:
    """Return a table with a line per variant, and a column per size such as `1,000 flows`.

    The first column has the keys of `lines` and its own heading.
    """
    columns = (heading, *(f"{size:,} {unit}" for size in sizes))
    return Grid(title, columns, tuple((name, *cells) for name, cells in lines.items()))


def find(rows: Iterable[Row], case: str, size: int, variant: str) -> Row:
    """Return the first row whose case begins with `case`.

    Raises:
        KeyError: there is no such row.
    """
    for row in rows:
        if row.case.startswith(case) and row.size == size and row.variant == variant:
            return row
    raise KeyError(f"{case}, {size}, {variant}")


def sizes_of(rows: Iterable[Row], case: str) -> list[int]:
    """Return the sizes of a case, ascending."""
    return sorted({row.size for row in rows if row.case.startswith(case)})
