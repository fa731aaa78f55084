"""The site of lightning_lca/docs, made by Sphinx.

    sphinx-build -W --keep-going -c .ci/site lightning_lca/docs .site

It needs the extra "docs" and nothing from the net, neither when it is built nor when it is read.
A warning ends the build: a link or an anchor that leads nowhere, a page that no list names, a
docstring that cannot be read.
"""

from __future__ import annotations

import os.path
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lightning_lca  # noqa: E402

project = "lightning-lca"
author = "The lightning-lca authors"
copyright = "The lightning-lca authors"
version = release = lightning_lca.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
exclude_patterns = ["README.md"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # Of a page that another one includes, headings may start at 2.

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autoclass_content = "class"
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_title = "lightning-lca"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_sidebars = {"index": [], "quickstart": [], "examples": [], "faq": []}  # No section around.
html_favicon = "static/icon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_context = {"default_mode": "auto"}
html_theme_options: dict[str, Any] = {
    "logo": {
        "text": "lightning-lca",
        "image_light": "static/icon.svg",
        "image_dark": "static/icon.svg",
    },
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "show_nav_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

# Files of the repository that the guide links to as they lie there, so that links also work where
# the repository is read, and the page of the site that shows each.
OUTSIDE = {
    ".github/CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")


def _lead_to_pages(app: Any, docname: str, source: list[str]) -> None:
    """Turns links to files outside into links to the pages that show them."""
    folder = os.path.dirname(f"lightning_lca/docs/{docname}")

    def turned(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(folder, link[0]))
        return f"/{OUTSIDE[target]}" if target in OUTSIDE else link[0]

    source[0] = _LINK.sub(turned, source[0])


_COLON = "\ue000"  # Stands for one, where napoleon would take what is before it for a type.


def _take_literally(
    app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]
) -> None:
    """Keeps what docstrings say of shapes, {name: [*shape]}, and sizes, |residual|, as it is."""
    is_code = False
    for i, line in enumerate(lines):
        is_code = line.lstrip().startswith(">>>") or (is_code and bool(line.strip()))
        if not is_code:
            parts = line.split("`")
            parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "`".join(parts)
    if what == "property":
        lines[:1] = [line.replace(":", _COLON) for line in lines[:1]]


def _put_colons_back(
    app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]
) -> None:
    """Ends what `_take_literally` began."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def setup(app: Any) -> None:
    """Is called by Sphinx."""
    app.connect("source-read", _lead_to_pages)
    app.connect("autodoc-process-docstring", _take_literally, priority=400)  # Before napoleon.
    app.connect("autodoc-process-docstring", _put_colons_back, priority=600)
