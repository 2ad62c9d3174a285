"""The --lora-* flags, one for each field of LoRAConfig."""

import argparse
import re
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

from megalora.config import MAX_RANK, LoRAConfig, field_texts

# As --help calls what is below it.
LORA_GROUP = "lora"


def add_lora_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --lora-* flags to a parser and return it, as Megatron's extra_args_provider does.

    Also lets --help print what Megatron has put into the parser before.
    """
    _repair_help(parser)
    group = parser.add_argument_group(LORA_GROUP, "adapters; without --lora-rank there are none")
    for field in fields(LoRAConfig):
        add_field(group, field.name)
    # Of the command line alone: a configuration has a rank.
    parser.set_defaults(lora_rank=0)
    return parser


def add_field(
    group: argparse._ActionsContainer, name: str, *, prefix: str = "--lora-", required: bool = False
) -> None:
    """Add the flag of one field of LoRAConfig; left out, it is None, for the field's default.

    Type, choices, help and default are those of the field and of LoRAConfig's docstring.
    """
    field = LoRAConfig.__dataclass_fields__[name]
    options: dict[str, Any] = {"help": _help(name, prefix), "required": required}
    kind, args = field.type, get_args(field.type)
    if kind is bool:
        options |= {"action": "store_true", "default": None}
    elif get_origin(kind) is Literal:
        options |= {"choices": args}
    elif get_origin(kind) is tuple:
        options |= {"nargs": "+", "metavar": "TARGET"}
    else:
        own = args[0] if args else kind
        options |= {"type": own, "metavar": {int: "N", float: "X"}.get(own, "NAME")}
    group.add_argument(prefix + name.replace("_", "-"), **options)


def _help(name: str, prefix: str) -> str:
    """Return what a flag does: other fields in it by their flags, and its default."""
    names = "|".join(LoRAConfig.__dataclass_fields__)

    def flag(found: re.Match[str]) -> str:
        return prefix + found[1].replace("_", "-")

    text = re.sub(f"`({names})`", flag, field_texts().get(name, "")).removesuffix(".")
    default = LoRAConfig.__dataclass_fields__[name].default
    if isinstance(default, tuple):
        default = " ".join(default)
    if default is MISSING:
        default = "0: no LoRA" if prefix == "--lora-" else None
    if default is not None and not isinstance(default, bool):
        text += f" (default {default:g})" if isinstance(default, float) else f" (default {default})"
    return text.replace("%", "%%")


def _repair_help(parser: argparse.ArgumentParser) -> None:
    # Megatron 0.19 has help texts with a bare %, such as "10%)", which argparse formats.
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (TypeError, ValueError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def lora_config_from_args(args: argparse.Namespace) -> LoRAConfig | None:
    """Return the configuration that the --lora-* flags describe, None where there is no LoRA.

    Flags that were left out take LoRAConfig's defaults. Raises ValueError where a field is wrong,
    or where --lora-* flags are given without --lora-rank.
    """
    given = given_lora_fields(args)
    if not args.lora_rank:
        if given:
            flags = ", ".join("--lora-" + name.replace("_", "-") for name in sorted(given))
            raise ValueError(f"lora_rank is {args.lora_rank} but {flags} is given: set --lora-rank")
        return None
    return LoRAConfig(rank=args.lora_rank, **given)


def flags_of(config: LoRAConfig) -> list[str]:
    """Return the --lora-* flags that describe a configuration: of defaults, only the main ones."""
    flags: list[str] = []
    for field in fields(LoRAConfig):
        value, flag = getattr(config, field.name), "--lora-" + field.name.replace("_", "-")
        if field.name == "targets" or (value == field.default and field.name != "alpha"):
            continue
        is_whole = isinstance(value, float) and value.is_integer() and value < MAX_RANK
        flags += [flag] if value is True else [flag, str(int(value) if is_whole else value)]
    # They have no end of their own.
    return [*flags, "--lora-targets", *config.targets]


def given_lora_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields other than `rank` that were given on the command line."""
    names = set(LoRAConfig.__dataclass_fields__) - {"rank"}
    values = {name: getattr(args, f"lora_{name}", None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
