"""The page of the command line `megalora`, from its parsers."""

import argparse
import re
from functools import partial
from inspect import cleandoc

from docs.generate.flags import groups
from docs.generate.markdown import fence, paragraphs, prose, sentence
from megalora.__main__ import main, make_parser


def page() -> str:
    """Return the page."""
    parser = make_parser("")
    _, *more = cleandoc(main.__doc__ or "").split("\n\n")
    parts = [
        "# Commands",
        prose(parser.description or ""),
        "`megalora` is also `python -m megalora`, which works under torchrun. Made from the "
        "commands' own parsers.",
        "| command | what it does |\n|---|---|\n"
        + "\n".join(
            f"| [`megalora {name}`](#megalora-{name}) | {prose(sentence(about))} |"
            for name, about, _ in commands()
        ),
        "## Exit status",
        "It is 0 where a command did what it was asked. " + paragraphs("\n\n".join(more)),
        "`megalora --version` says which version it is. `megalora COMMAND --help` says what is on "
        "this page.",
    ]
    for name, _, command in commands():
        parts += [f"## `megalora {name}`", *described(name, command)]
    return "\n\n".join(parts) + "\n"


def commands() -> list[tuple[str, str, argparse.ArgumentParser]]:
    """Return name, one line and parser of each command, in the order of --help."""
    for action in make_parser("")._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return [(name, about[name], parser) for name, parser in action.choices.items()]
    raise AssertionError("megalora has no commands")


def described(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return usage, description, arguments and what is said at the end of a command's help."""
    parser.formatter_class = partial(argparse.HelpFormatter, width=88)
    usage = re.sub(r"^(usage: | {7})", "", parser.format_usage(), flags=re.MULTILINE)
    parts = [
        prose(parser.description or ""),
        fence("text", usage),
        f"```{{program}} megalora {name}\n```",
        *groups(parser),
    ]
    return [*parts, prose(parser.epilog)] if parser.epilog else parts
