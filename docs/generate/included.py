"""Pages that are files of the repository's root, which a forge shows there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The file, and the name of its page in docs/reference/.
FILES = {"SECURITY.md": "security", "CHANGELOG.md": "changelog"}


def pages() -> dict[str, str]:
    """Return the text of each page by its name, with links as they are from docs/reference/."""
    return {
        page: moved((ROOT / file).read_text())
        for file, page in FILES.items()
        if (ROOT / file).exists()
    }


def moved(text: str) -> str:
    """Return a text of the root with its relative links as they are from docs/reference/."""
    relative = r"(\]\()(?!#|[a-z]+:|/)(?:(docs/)|)([^)\s]+)"
    return re.sub(relative, lambda m: f"{m[1]}../{'' if m[2] else '../'}{m[3]}", text)


def on_site(text: str, up: str) -> str:
    """Return a page's text with links to such files as links to their pages.

    up: from the page to docs/, such as `../` or nothing. README.md is the front page.
    """
    for file, page in {**{file: f"reference/{page}" for file, page in FILES.items()}}.items():
        text = text.replace(f"]({up}../{file}", f"]({up}{page}.md")
    return re.sub(rf"\]\({re.escape(up)}\.\./README\.md(#[^)]*)?\)", f"]({up}index.md)", text)
