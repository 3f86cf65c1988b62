"""The forest plot: colours, labels and axis."""

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from energy_flow.viz.forest import ForestLine, forest_figure
from energy_flow.viz.style import BLUE, GREY, VERMILION, render

LINES = (
    ForestLine("full", None, "0.50", False),
    ForestLine("worse", (-0.02, -0.03, -0.01), "-0.02", False),
    ForestLine("same", (0.001, -0.01, 0.012), "+0.001", False),
    ForestLine("better", (0.02, 0.01, 0.03), "+0.02", True),
)


def draw(*lines: ForestLine, lower: bool = False) -> Figure:
    figure = forest_figure(
        lines, title="Comparison", label="difference", lower_is_better=lower, kinds=("model", "baseline")
    )
    assert render(figure).std() > 0
    return figure


def colours(figure: Figure) -> list[str]:
    """The colours of the intervals, from top to bottom."""
    [axes] = figure.axes
    return [
        to_hex(line.get_color()).upper()
        for line in axes.lines
        if len(line.get_xdata()) == 2 and line.get_linewidth() == 2
    ]


def test_the_colour_shows_the_side_of_zero() -> None:
    assert colours(draw(*LINES)) == [VERMILION, GREY, BLUE]
    assert colours(draw(*LINES, lower=True)) == [BLUE, GREY, VERMILION]


def test_every_line_has_its_name_and_numbers() -> None:
    figure = draw(*LINES)
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full", "worse", "same", "better"]
    assert [text.get_text() for text in axes.texts] == [line.shown for line in LINES]
    assert axes.get_xlabel() == "difference  (better →)"
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["better", "worse", "may be chance", "model", "baseline"]


def test_a_wide_range_gets_a_symlog_axis() -> None:
    [axes] = draw(
        ForestLine("small", (2e-5, -3e-5, 7e-5), "", False), ForestLine("large", (0.3, 0.2, 0.4), "", False)
    ).axes
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlabel().endswith("logarithmic beyond ±0.0001")
    assert draw(*LINES).axes[0].get_xscale() == "linear"


def test_nothing_to_compare() -> None:
    figure = draw(LINES[0])
    assert "no pair to compare" in [text.get_text() for text in figure.axes[0].texts]
