# SPDX-License-Identifier: Apache-2.0
"""The documentation as pages: `make docs`. Its source is the checkout, so that links between pages stay what they are."""

import re

import xpu_fp4
from sphinx.application import Sphinx

project = "xpu_fp4"
author = "the authors of xpu_fp4"
version = release = xpu_fp4.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/*.rst"]
exclude_patterns = ["build", ".venv*", ".git"]
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # the pages lie in docs/, as their sources do
html_theme = "furo"
html_title = f"xpu_fp4 {release}"
html_show_copyright = False

myst_heading_anchors = 4  # as GitHub makes them

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

linkcheck_timeout = 20
linkcheck_workers = 4
linkcheck_anchors = False  # GitHub draws its line numbers by script


def docstring_as_text(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Docstrings are Markdown at most: one backtick is code, and a star or a trailing underscore is itself."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    parts = re.split(r"(``[^`]+``)", text)
    lines[:] = "".join(
        part if i % 2 else re.sub(r"([*|])|(?<=\w)(_)(?!\w)", r"\\\g<0>", part) for i, part in enumerate(parts)
    ).split("\n")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", docstring_as_text)
