"""What strangers wrote (names of tensors and files, values, roles), as it may be shown."""

import unicodedata

# Control and format characters, such as escapes and those that turn the direction of text; halves
# of surrogate pairs; line and paragraph separators. Not the two that join and part letters.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"


def printable(text: object, limit: int = 1800) -> str:
    r"""Return a text in one line, with `\x1b` and the like for what cannot be seen.

    limit: characters; the middle of a longer text is left out.
    """
    shown = str(text)
    if len(shown) > limit:
        left_out = len(shown) - limit
        shown = f"{shown[: limit // 2]} ({left_out} characters) {shown[-(limit // 2) :]}"
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_escaped(character) for character in shown)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
