"""Patterns of an adapter_config.json, matched as PEFT matches them but in bounded time.

PEFT takes the first pattern for which `re.match(rf"(.*\\.)?({pattern})$", name)` finds something,
and `re` may search for ever. Here plain names, of which there may be one for each module, are
looked up; all others are matched by RE2, whose time is linear in the name's length.
"""

import functools
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping

import re2

_MAX_LENGTH = 2000
_MAX_PATTERNS = 1000
_SECONDS = 20.0
# Names in which a dot is a dot (escaped) or any character, as PEFT and its users write them.
_PLAIN = re.compile(r"(?:[A-Za-z0-9_]|\\?\.)+")

# Of a plain pattern: its length, and where any character may stand.
type _Form = tuple[int, tuple[int, ...]]


class Patterns[T]:
    """The patterns of one field, in their order, each with a value.

    Raises ValueError for what is no pattern, or cannot be matched in bounded time.
    """

    def __init__(self, field: str, values: Mapping[str, T]) -> None:
        self.field = field
        self._values = list(values.values())
        self._plain: dict[int, dict[_Form, dict[str, int]]] = defaultdict(dict)
        self._others: dict[int, re2._Regexp] = {}
        self._left = _SECONDS
        for number, pattern in enumerate(values):
            if _PLAIN.fullmatch(pattern):
                self._add_plain(pattern, number)
            else:
                self._others[number] = _compiled(field, pattern)
        if len(self._others) + sum(map(len, self._plain.values())) > _MAX_PATTERNS:
            raise ValueError(
                f"adapter_config {field} has more than {_MAX_PATTERNS:,} patterns that are no "
                "names of modules: write whole names"
            )

    def first(self, name: str, default: T) -> T:
        """Return the value of the first pattern that PEFT takes for a module of this name."""
        found = min((*self._find_plain(name), *self._find_others(name)), default=None)
        return default if found is None else self._values[found]

    def _add_plain(self, pattern: str, number: int) -> None:
        text = pattern.replace("\\.", "\\")
        free = tuple(place for place, character in enumerate(text) if character == ".")
        forms = self._plain[len(text)].setdefault((len(text), free), {})
        forms.setdefault(text.replace("\\", "."), number)

    def _find_plain(self, name: str) -> Iterator[int]:
        """Yield the plain patterns that the name, or its end behind a dot, has the form of."""
        for length, forms in self._plain.items():
            end = name[-length:]
            if len(end) < length or name[-length - 1 : -length] not in ("", "."):
                continue
            for (_, free), names in forms.items():
                masked = list(end)
                for place in free:
                    masked[place] = "."
                number = names.get("".join(masked))
                if number is not None:
                    yield number

    def _find_others(self, name: str) -> Iterator[int]:
        begin = time.monotonic()
        for number, pattern in self._others.items():
            if pattern.match(name) is not None:
                yield number
                break
        self._left -= time.monotonic() - begin
        if self._left < 0:
            raise ValueError(
                f"adapter_config {self.field} takes longer than {_SECONDS:.0f} s to match with the "
                "names of the modules: write fewer patterns, or whole names"
            )


def matches(pattern: str, name: str) -> bool:
    """Say whether PEFT takes a pattern for a module of this name."""
    return _single(pattern).first(name, False)


@functools.lru_cache(maxsize=1024)
def _single(pattern: str) -> Patterns[bool]:
    return Patterns("rank_pattern", {pattern: True})


def _compiled(field: str, pattern: str) -> "re2._Regexp":
    if len(pattern) > _MAX_LENGTH:
        raise ValueError(
            f"adapter_config {field} {pattern!r:.60} has {len(pattern):,} characters: "
            f"{_MAX_LENGTH:,} at most"
        )
    whole = rf"(.*\.)?({pattern})$"
    try:
        with warnings.catch_warnings():
            # Of what a later `re` will read otherwise, as RE2 does today.
            warnings.simplefilter("error")
            re.compile(whole)
    except (re.error, Warning, RecursionError, OverflowError) as error:
        raise ValueError(
            f"adapter_config {field} {pattern!r:.200} is no pattern: {error}"
        ) from None
    options = re2.Options()
    options.log_errors = False
    try:
        # RE2 reads {,3} as text.
        if "{," not in pattern:
            return re2.compile(whole, options)
    except re2.error:
        pass
    raise ValueError(
        f"adapter_config {field} {pattern!r:.200} has a look-around, a back-reference or the like, "
        "which takes time without a bound: write it as names"
    )
