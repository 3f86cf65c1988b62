"""Sphinx: `python -m sphinx -W -b html docs docs/_build/html`."""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from energy_flow import __version__
from energy_flow.config_reference import markdown

HERE = Path(__file__).parent
GENERATED = HERE / "reference" / "generated"
GENERATED.mkdir(exist_ok=True)
(GENERATED / "config.md").write_text(markdown(), encoding="utf-8")

project = "energy_flow"
author = "the authors of energy_flow"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "reference/generated/config.md"]  # included by reference/config.md
default_role = "literal"

html_theme = "pydata_sphinx_theme"
html_title = "energy_flow"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
FLAT = ("getting_started", "results", "troubleshooting", "performance", "picture_book")
html_sidebars = {page: [] for page in FLAT}  # pages without pages below them need no section navigation
html_theme_options = {
    "show_prev_next": False,
    "header_links_before_dropdown": 5,
    "navbar_persistent": ["search-button-field"],
    "secondary_sidebar_items": {"**": ["page-toc"], "troubleshooting": []},  # its headings are too long
    "footer_start": ["sphinx-version"],
}

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they are stored

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # Lightning's and torch's use directives of their own
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autosummary_generate = True
toc_object_entries_show_parents = "hide"
napoleon_use_ivar = True


def escape_bars(*event: Any) -> None:
    """Write `|x|` as it is: docstrings are plain text, and reStructuredText reads a substitution."""
    lines: list[str] = event[-1]
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", escape_bars)
