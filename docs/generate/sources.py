"""Sphinx extension: a link to a file of the repository leads to a page that shows it.

On a forge `[...](../examples/demo.py)` leads to the file; on the site to its source, in colours, or
to the list of what is in a folder. What is no text stays a file to download.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder

from docs.generate import included

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# What no one reads: made by builds and tests.
_HIDDEN = ("__pycache__", ".so", ".pyc")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    shown: set[Path] = set()
    app.connect("source-read", _rewrite)
    # Before Sphinx takes them for downloads.
    app.connect("doctree-read", lambda app, tree: _link(app, tree, shown), priority=100)
    app.connect("html-collect-pages", lambda app: list(_pages(app, shown)))
    return {"parallel_read_safe": False}


def _rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = included.on_site(source[0], "../" * docname.count("/"))


def _link(app: Sphinx, tree: nodes.document, shown: set[Path]) -> None:
    """Turn links to files and folders beside docs/ into links to their pages."""
    page = DOCS / app.env.docname
    for kind in (addnodes.download_reference, addnodes.pending_xref):
        for node in list(tree.findall(kind)):
            place = (page.parent / node["reftarget"].partition("#")[0]).resolve()
            if ROOT not in place.parents or DOCS in (place, *place.parents):
                continue
            if not (place.is_dir() or _text(place)):
                continue
            link = nodes.inline("", "", *node.children)
            # Else it is the check of links to elsewhere, which makes no pages.
            if isinstance(app.builder, StandaloneHTMLBuilder):
                shown.add(place)
                uri = app.builder.get_relative_uri(app.env.docname, _name(place))
                link = nodes.reference("", "", *node.children, internal=True, refuri=uri)
            node.replace_self(link)


def _pages(app: Sphinx, shown: set[Path]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Return name, context and template of the page of each file and folder that is linked."""
    builder = app.builder
    assert isinstance(builder, StandaloneHTMLBuilder)
    files = {place for place in shown if place.is_file()}
    for folder in sorted(place for place in shown if place.is_dir()):
        inside = [path for path in sorted(folder.rglob("*")) if path.is_file() and _text(path)]
        files.update(inside)
        uri = builder.get_relative_uri
        items = "".join(
            f'<li><a href="{uri(_name(folder), _name(path))}">{path.relative_to(folder)}</a></li>'
            for path in inside
        )
        yield _name(folder), _context(folder, f"<ul>{items}</ul>"), "page.html"
    for file in sorted(files):
        code = builder.highlighter.highlight_block(_text(file), _lexer(file), force=True)
        yield _name(file), _context(file, code), "page.html"


def _context(place: Path, body: str) -> dict[str, str]:
    title = place.relative_to(ROOT).as_posix()
    return {"title": title, "body": f"<h1>{title}</h1>{body}"}


def _name(place: Path) -> str:
    return f"source/{place.relative_to(ROOT).as_posix()}"


def _text(place: Path) -> str:
    """Return what is in a file; nothing where it is no text."""
    if not place.is_file() or any(part.endswith(_HIDDEN) for part in place.parts):
        return ""
    try:
        return place.read_text()
    except UnicodeDecodeError:
        return ""


def _lexer(file: Path) -> str:
    try:
        return get_lexer_for_filename(file.name).aliases[0]
    except ClassNotFound:
        return "bash" if _text(file).startswith("#!") else "text"
