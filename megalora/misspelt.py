"""What a mistyped word was meant to be, and command lines that say so in one sentence."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

UNKNOWN = "unrecognized arguments:"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the word that a mistyped one is most like, None where none is like it."""
    # Underscores are what Python calls the same flag.
    typed = word.partition("=")[0].replace("_", "-")
    return next(iter(difflib.get_close_matches(typed, list(known), n=1, cutoff=0.7)), None)


def explain(message: str, parser: argparse.ArgumentParser, given: Sequence[str] = ()) -> str:
    """Return what argparse says of a command line, with what was probably meant.

    given: the command line, whose command alone has the flags to guess among. Only words that no
    flag is called get something added.
    """
    if not message.startswith(UNKNOWN):
        return message
    words = message.removeprefix(UNKNOWN).split()
    flags = [word for word in words if word.startswith("-")]
    if not flags:
        return f"{message}: each value needs its flag before it, see --help"
    known = options_of(parser, given)
    meant = dict.fromkeys(near for flag in flags if (near := nearest(flag, known)))
    if not meant:
        return f"{message}: no flag is called so, see --help"
    return f"{message}: did you mean {' and '.join(meant)}?"


def options_of(parser: argparse.ArgumentParser, given: Sequence[str] = ()) -> list[str]:
    """Return the names of all options of a parser, and of the command that a command line gives.

    Where it gives none: of all commands.
    """
    found = []
    for action in parser._actions:
        found += [name for name in action.option_strings if name.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            commands = [word for word in given if word in action.choices][:1] or action.choices
            found += [name for each in commands for name in options_of(action.choices[each])]
    return list(dict.fromkeys(found))


class Parser(argparse.ArgumentParser):
    """A command's parser, that ends a wrong command line in one sentence, without its usage."""

    _given: Sequence[str] = ()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, and keep what was typed for `error`."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace or argparse.Namespace())

    def error(self, message: str) -> NoReturn:
        """End with status 2, having said what is wrong and where to read what is right."""
        said = explain(self._misspelt() or message, self, self._given)
        self.exit(2, f"error: {said} (see `{self.prog} --help`)\n")

    def _misspelt(self) -> str:
        """Return what argparse says of unknown flags, which it does not where others miss."""
        known = options_of(self, self._given)
        words = [word.partition("=")[0] for word in self._given if word.startswith("--")]
        # argparse takes the beginning of a name for the name.
        wrong = [word for word in words if not any(name.startswith(word) for name in known)]
        return f"{UNKNOWN} {' '.join(wrong)}" if any(nearest(w, known) for w in wrong) else ""
