"""What is said of a command line while Megatron parses and validates it."""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence

from megalora.arguments import LORA_GROUP
from megalora.misspelt import explain
from megalora.training import changes, compared
from megalora.training.auto_lr import accept_auto
from megalora.training.flags import refuse
from megalora.training.needed import check_needed, said_by_megatron


def add_arguments(
    original: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
    parser: argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    """Let --lr be `auto`, also without the flags of a script; say in a sentence what is wrong.

    And let --help show what a script and megalora add before Megatron's flags.
    """
    parser = accept_auto(original(parser))
    parser.error = lambda message: refuse(explain(message, parser))
    parser.usage = "%(prog)s --lora-rank 32 <flags of the groups below>"
    # The first two are argparse's own, which scripts add to.
    parser.format_help = functools.partial(_help, parser, parser._action_groups[2:])
    return parser


def _help(parser: argparse.ArgumentParser, megatrons: Sequence[argparse._ArgumentGroup]) -> str:
    """Return a parser's help: adapters first, what scripts add, then Megatron's groups."""
    groups = parser._action_groups
    groups.sort(key=lambda group: 2 if group in megatrons else int(group.title != LORA_GROUP))
    return type(parser).format_help(parser)


def validate_args(
    original: Callable[..., argparse.Namespace],
    args: argparse.Namespace,
    defaults: Mapping[str, object] | None = None,
    **kwargs: object,
) -> argparse.Namespace:
    """Let an adapter run's --save without --save-interval save after the last iteration.

    And let what is wrong with the flags be a ValueError that says so, not an assertion.
    """
    compared.remember(args)
    changes.change_args(args, changes.on_validating(args))
    defaults = defaults or {}
    check_needed(args, defaults)
    try:
        return original(args, defaults, **kwargs)
    except AssertionError as error:
        said = said_by_megatron(error)
        if not said:
            raise
        raise ValueError(f"{said}: change the flags that it names") from error
