"""Tables in words, and pictures of any set of rows."""

import pytest

from energy_flow.viz.style import render
from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Row, find, rows_of, sizes
from energy_flow_benchmarks.output import BYTE_UNITS, TIME_UNITS, in_units, markdown

MACHINE = {"cpu": "a CPU", "date": "2025-01-02", "command": "python -m energy_flow.benchmark", "gpu": None}


def rows(*sizes_of_it: int, seconds: float = 1.0) -> list[Row]:
    return [
        row
        for size in sizes_of_it
        for row in rows_of("it", "case; ratio to a", size, {"a": seconds * size, "b": seconds}, "a", {"b": 2**20})
    ]


def test_ratios_and_peaks() -> None:
    slow, fast, none = rows_of("it", "case", 7, {"a": 3.0, "b": 0.5, "c": None}, "a", {"b": 10})
    assert (slow.ratio, fast.ratio, none.ratio) == (1.0, 6.0, None)
    assert (slow.peak_bytes, fast.peak_bytes) == (None, 10)
    assert [row.ratio for row in rows_of("it", "case", 7, {"a": 3.0, "b": 0.5})] == [None, None]


def test_rows_are_found() -> None:
    found = rows(5, 2)
    assert find(found, "case", 2, "b").size == 2
    assert sizes(found, "case") == [2, 5]
    with pytest.raises(KeyError, match="case, 3, b"):
        find(found, "case", 3, "b")


@pytest.mark.parametrize(
    ("value", "units", "text"),
    [
        (None, TIME_UNITS, "-"),
        (12.3456, TIME_UNITS, "12.3 s"),
        (0.01234, TIME_UNITS, "12.3 ms"),
        (1.234e-7, TIME_UNITS, "0.123 µs"),
        (1234.5, TIME_UNITS, "1,234 s"),
        (0, BYTE_UNITS, "0 KiB"),
        (3 * 2**29, BYTE_UNITS, "1.5 GiB"),
        (1536, BYTE_UNITS, "1.5 KiB"),
    ],
)
def test_units(value: float | None, units: tuple, text: str) -> None:
    assert in_units(value, units) == text


def test_the_page() -> None:
    page = markdown(MACHINE, Findings(rows(5), [Grid("words", ("a|b", "c"), (("x|y", "z"),))], ["a note"]))
    assert page.startswith("# benchmark=it, 2025-01-02\n\n```\npython -m energy_flow.benchmark\n```\n\n- cpu: a CPU\n")
    assert "- a note\n" in page
    assert "gpu" not in page
    assert "| a\\|b | c |\n| --- | --- |\n| x\\|y | z |\n" in page
    assert "| case; ratio to a | 5 | b | 1 s | 1 MiB | 5 |" in page


def panels() -> list[Panel]:
    return [Panel("case", "a case", SECONDS, "things"), Panel("case", "its memory", BYTES, "things")]


@pytest.mark.parametrize("at", [(7,), (10, 100, 1000), (1000, 1001)])
def test_pictures_of_any_sizes(at: tuple[int, ...]) -> None:
    figure = figure_of_panels(rows(*at), [*panels(), Panel("nothing", "not there", SECONDS, "things")], "a title")
    seconds, memory, empty = figure.axes
    assert [line.get_label() for line in seconds.get_lines()] == ["a", "b"]
    assert list(seconds.get_lines()[0].get_xdata()) == list(at)
    assert [line.get_label() for line in memory.get_lines()] == ["b"]
    assert seconds.get_xscale() == seconds.get_yscale() == "log"
    assert [text.get_text() for text in empty.texts] == ["not measured"]
    assert render(figure).std() > 1


@pytest.mark.parametrize("num_variants", [1, 5, 12])
def test_the_legend_stays_on_the_page(num_variants: int) -> None:
    seconds: dict[str, float | None] = {f"variant {i} with a rather long name": 1.0 + i for i in range(num_variants)}
    figure = figure_of_panels(rows_of("it", "case", 7, seconds), panels()[:1] * 2, "a title")
    render(figure)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == num_variants
    extent = legend.get_window_extent()
    assert extent.x0 >= 0
    assert extent.y0 >= 0
    assert extent.x1 <= figure.bbox.width


def test_small_times_are_drawn_in_milliseconds() -> None:
    (axes,) = figure_of_panels(rows(5, seconds=0.001), panels()[:1], "a title").axes
    assert axes.get_ylabel() == "milliseconds"
    assert axes.get_lines()[0].get_ydata()[0] == pytest.approx(5)
