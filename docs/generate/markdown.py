"""Plain text of docstrings and help as Markdown that shows it as it is written."""

import re
from collections.abc import Collection

_CODE = re.compile(r"(`[^`]+`)")
_FLAG = re.compile(r"(?<![\w-])(--[a-z][\w-]*(?:\w|-\*))")
_MARKUP = re.compile(r"([\\*_\[\]<>{}$#|~^])")


def prose(text: str) -> str:
    """Return a text with nothing in it taken for markup but `code`, which flags become too."""
    parts = _CODE.split(text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            pieces = _FLAG.split(part)
            pieces[::2] = [_MARKUP.sub(r"\\\1", piece) for piece in pieces[::2]]
            pieces[1::2] = [f"`{flag}`" for flag in pieces[1::2]]
            parts[number] = "".join(pieces)
    # A page that help names, from docs/reference/.
    return re.sub(r"docs/([\w-]+\.md)", r"[\g<0>](../\1)", "".join(parts))


# What is said of the whole, behind what is said of a parameter.
_OF_ALL = r"(?<=[.;] )(?=(?:Raises|Returns|Forward|All ranks|Such|It )\b)"


def paragraphs(text: str, names: Collection[str] = ()) -> str:
    """Return a docstring as paragraphs, with what it says of parameters as lists.

    names: of the parameters; `name: ...` at the start of a sentence begins what is said of one.
    """
    done: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        name = "|".join(map(re.escape, names)) or r"(?!)"
        entry = rf"(?:{name})(?:,? (?:and )?(?:{name}))*: "
        items: list[str] = []
        for piece in re.split(rf"(?:^|(?<=[.;] ))(?={entry})", " ".join(paragraph.split())):
            if not re.match(entry, piece):
                done += [prose(piece.strip())] if piece.strip() else []
                continue
            said, *of_all = re.split(_OF_ALL, piece, maxsplit=1)
            named, _, rest = said.strip().partition(": ")
            marked = re.sub(name, r"`\g<0>`", named)
            items.append(f"* {marked}: {prose(rest.removesuffix(';'))}")
            if of_all:
                done += ["\n".join(items), prose(of_all[0].strip())]
                items = []
        done += ["\n".join(items)] if items else []
    return "\n\n".join(done)


def sentence(text: str) -> str:
    """Return a help text as a sentence: with a capital letter and a full stop."""
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+[ ,;(]", text) else text
    return text if text.endswith((".", ":")) else text + "."


def fence(language: str, text: str) -> str:
    """Return a block of code."""
    return f"```{language}\n{text.strip()}\n```"


def directive(name: str, argument: str, *body: str, options: str = "", level: int = 0) -> str:
    """Return a block that Sphinx makes something of; one around others has a higher level.

    options: lines such as `:type: int`.
    """
    marks = "`" * (4 + level)
    head = "\n".join(filter(None, (f"{marks}{{{name}}} {argument}", options)))
    return "\n\n".join((head, *filter(None, body), marks))
