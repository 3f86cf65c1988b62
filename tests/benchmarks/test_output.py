"""Tables of text, and pictures of any set of rows."""

import pytest

from energy_flow.viz.style import render
from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Measured, Row, find, grid_by_size, rows_of, sizes_of
from energy_flow_benchmarks.output import in_bytes, in_seconds, markdown

MACHINE = {"cpu": "a CPU", "date": "2025-01-02", "command": "python -m energy_flow.benchmark", "gpu": None}


def rows(*sizes: int, seconds: float = 1.0) -> list[Row]:
    return [
        row
        for size in sizes
        for row in rows_of("it", "case", size, {"a": Measured(seconds * size), "b": Measured(seconds, 2**20)}, "a")
    ]


def test_rows_have_ratios_and_shares() -> None:
    found = {"a": Measured(3.0), "b": Measured(0.5, 10), "c": Measured(None)}
    slow, fast, none = rows_of("it", "case", 7, found, "a", least=0.25)
    assert {row.case for row in (slow, fast, none)} == {"case; ratio to a"}
    assert (slow.ratio, fast.ratio, none.ratio) == (1.0, 6.0, None)
    assert (slow.share, fast.share, none.share) == (0.25 / 3, 0.5, None)
    assert (slow.peak_bytes, fast.peak_bytes) == (None, 10)
    assert [(row.case, row.ratio, row.share) for row in rows_of("it", "case", 7, found)] == [("case", None, None)] * 3


def test_rows_are_found() -> None:
    found = rows(5, 2)
    assert find(found, "case", 2, "b").size == 2
    assert sizes_of(found, "case") == [2, 5]
    with pytest.raises(KeyError, match="case, 3, b"):
        find(found, "case", 3, "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_seconds(None), "-"),
        (in_seconds(12.3456), "12.3 s"),
        (in_seconds(0.01234), "12.3 ms"),
        (in_seconds(1.234e-7), "0.123 µs"),
        (in_seconds(1234.5), "1,234 s"),
        (in_bytes(0), "0 KiB"),
        (in_bytes(3 * 2**29), "1.5 GiB"),
        (in_bytes(1536), "1.5 KiB"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected


def test_the_page() -> None:
    grids = [Grid("words", ("a|b", "c"), (("x|y", "z"),)), grid_by_size("sizes", "it", [1000], "flows", {"a": ["1"]})]
    page = markdown(MACHINE, Findings(rows(5), grids, ["a note"]))
    assert page.startswith("# benchmark=it, 2025-01-02\n\n```\npython -m energy_flow.benchmark\n```\n\n- cpu: a CPU\n")
    assert "- a note\n" in page
    assert "gpu" not in page
    assert "| a\\|b | c |\n| --- | --- |\n| x\\|y | z |\n" in page
    assert "| it | 1,000 flows |\n| --- | --- |\n| a | 1 |\n" in page
    assert "| case; ratio to a | 5 | b | 1 s | 1 MiB | 5 |" in page


def panels() -> list[Panel]:
    return [Panel("case", "a case", SECONDS, "things"), Panel("case", "its memory", BYTES, "things")]


@pytest.mark.parametrize("at", [(7,), (10, 100, 1000), (1000, 1001)])
def test_pictures_of_any_sizes(at: tuple[int, ...]) -> None:
    figure = figure_of_panels(rows(*at), [*panels(), Panel("nothing", "not there", SECONDS, "things")], "a title")
    seconds, memory, empty = figure.axes
    assert [line.get_label() for line in seconds.get_lines()] == ["a", "b"]
    assert list(seconds.get_lines()[0].get_xdata()) == list(at)
    assert list(seconds.get_lines()[0].get_ydata()) == list(at)
    assert [line.get_label() for line in memory.get_lines()] == ["b"]
    assert seconds.get_xscale() == seconds.get_yscale() == "log"
    assert [text.get_text() for text in empty.texts] == ["not measured"]
    assert render(figure).std() > 1


@pytest.mark.parametrize("num_variants", [1, 5, 12])
def test_the_legend_stays_on_the_page(num_variants: int) -> None:
    found = {f"variant {i} with a rather long name": Measured(1.0 + i) for i in range(num_variants)}
    figure = figure_of_panels(rows_of("it", "case", 7, found), panels()[:1] * 2, "a title")
    render(figure)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == num_variants
    extent = legend.get_window_extent()
    assert extent.x0 >= max(axes.bbox.x1 for axes in figure.axes), "beside the panels"
    assert extent.y0 >= 0
    assert extent.x1 <= figure.bbox.width


def test_axes_are_labelled_with_units() -> None:
    figure = figure_of_panels(rows(1000, seconds=0.001), panels(), "a title")
    render(figure)
    labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert "10 ms" in labels[0]
    assert "1 MiB" in labels[1]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1k"]
