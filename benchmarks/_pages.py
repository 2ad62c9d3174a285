"""Parts of pages that a command writes, each between two comments that name the command."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
END = "<!-- To here. -->"


def start(command: str) -> str:
    """Return the comment before what a command writes, as `benchmarks/parity.py`."""
    return f"<!-- From here by {command}. -->"


def rewritten(page: str, command: str, text: str) -> str:
    """Return a page with another text between a command's comments.

    Raises ValueError where the page has no such comments.
    """
    before, first, rest = page.partition(start(command))
    _, last, after = rest.partition(END)
    if not first or not last:
        raise ValueError(
            f"the page has no place for what {command} writes: put the lines {start(command)} and "
            f"{END} where it belongs"
        )
    return f"{before}{first}\n{text}\n{last}{after}"
