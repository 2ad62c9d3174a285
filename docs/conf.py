"""Sphinx's configuration: `make docs` builds docs/ into build/docs, every warning an error."""

import importlib
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import megalora  # noqa: E402
from docs.generate import PAGES, included  # noqa: E402


def write_reference() -> None:
    """Write docs/reference/: what is made from the code, and the files of the root."""
    folder = DOCS / "reference"
    folder.mkdir(exist_ok=True)
    pages = {name: importlib.import_module(f"docs.generate.{name}").page() for name in PAGES}
    for name, text in {**pages, **included.pages()}.items():
        (folder / f"{name}.md").write_text(text)


write_reference()

project = "megalora"
project_copyright = "the authors of megalora"
version = release = megalora.__version__

extensions = ["myst_parser", "docs.generate.sources", "docs.generate.walked"]
exclude_patterns = ["generate"]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4
# Quotes and dashes stay as they are written: flags begin with two.
smartquotes = False

nitpicky = True
# Types in signatures are mostly torch's and Megatron's, which are no pages here.
nitpick_ignore_regex = [(r"py:(class|exc)", ".*")]
# Lists of flags and paths of a shell, of which no lexer knows <any Megatron flags>.
highlight_language = "text"
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"megalora {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_copy_source = html_show_sourcelink = False
_COLOURED = ("color-brand-primary", "color-brand-content", "color-api-name", "color-api-pre-name")
html_theme_options = {
    "light_css_variables": dict.fromkeys(_COLOURED, "#0b6e4f"),
    "dark_css_variables": dict.fromkeys(_COLOURED, "#5fd3a8"),
}

# `make docs-links` asks each server once more before it is said to be gone.
linkcheck_retries = 2
linkcheck_timeout = 30
