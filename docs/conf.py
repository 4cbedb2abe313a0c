"""How Sphinx builds these pages: `python -m sphinx -W docs build/docs`, without a network."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]
os.environ |= {"MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}  # of the examples

import kfacopt  # noqa: E402 - the path has it only now

project, author = "kfacopt", "The kfacopt authors"
version = release = kfacopt.__version__

extensions = [
    *("myst_parser", "sphinx_design", "sphinx_copybutton", "sphinx_gallery.gen_gallery"),
    *("sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"),
    *("docstrings", "mathml", "smoke_run", "whole_files"),  # in _extensions
]
exclude_patterns = ["README.md", "_build", "gallery/*.ipynb", "gallery/*.py"]
templates_path = ["_templates"]
suppress_warnings = [
    "config.cache",  # the gallery's settings hold a function
    "myst.header",  # pages that scripts write begin with tables of their own level
]
default_role = "py:obj"  # `name` in a docstring is code, and a link where there is such a page

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_math_renderer = "mathml"  # by the browser itself: no script, no network
html_theme = "pydata_sphinx_theme"
html_title = f"kfacopt {release}"
html_static_path = ["_static"]
html_css_files = ["kfacopt.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": True,
    "navigation_depth": 2,
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"changelog": [], "index": []}
copyright = "The kfacopt authors"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def _arguments(gallery: object, script: str) -> list[str]:
    """Return the command line that an example is run with."""
    folder = tempfile.mkdtemp(prefix="kfacopt-example-")
    return ["--output", folder, *([] if tags.has("full") else ["--quick"])]  # noqa: F821


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"[0-9].*\.py",
    "ignore_pattern": r"side_by_side\.py",  # what the others share
    "reset_argv": _arguments,
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "remove_config_comments": True,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "abort_on_example_error": True,
    "only_warn_on_example_error": False,
    "doc_module": ("kfacopt",),
    "reference_url": {"kfacopt": None},
}
