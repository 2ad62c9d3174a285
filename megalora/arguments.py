"""The --lora-* flags, one for each field of LoRAConfig."""

import argparse
from dataclasses import fields
from typing import Any, get_args

from megalora.config import MAX_RANK, ExpertMode, Init, LoRAConfig, OpsBackend


def add_lora_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --lora-* flags to a parser and return it, as Megatron's extra_args_provider does.

    Also lets --help print what Megatron has put into the parser before.
    """
    _repair_help(parser)
    group = parser.add_argument_group("lora", "adapters; without --lora-rank there are none")
    add = group.add_argument
    add("--lora-rank", type=int, default=0, help="rank of the adapters; 0: no LoRA")
    add("--lora-alpha", type=float, help="scale is alpha / rank (default 32)")
    add("--lora-dropout", type=float, help="dropout on the adapters' input (default 0)")
    add(
        "--lora-targets",
        nargs="+",
        help="presets all, attn, mlp, mamba, unembed, tinker (Tinker's layout, where the experts' "
        "mode is shared_outer) and Megatron module names (default all)",
    )
    add("--lora-expert-rank", type=int, help="rank of each expert (default rank / top-k)")
    add("--lora-expert-mode", choices=get_args(ExpertMode), help="default per_expert")
    add(
        "--lora-shared-a",
        action="store_true",
        default=None,
        help="one A for each fused linear instead of one for each of q, k, v, gate and up",
    )
    add(
        "--lora-delta-gates",
        action="store_true",
        default=None,
        help="adapt also what makes beta and alpha of gated delta nets",
    )
    add("--lora-seed", type=int, help="seed of the start values (default 1234)")
    add("--lora-rslora", action="store_true", default=None, help="scale by alpha / sqrt(rank)")
    add("--lora-init", choices=get_args(Init), help="default uniform")
    add("--lora-lr-ratio", type=float, help="learning rate of B over that of A (default 1)")
    add("--lora-eps-a", type=float, help="Adam epsilon of A (default: --adam-eps)")
    add("--lora-eps-b", type=float, help="Adam epsilon of B (default: --adam-eps)")
    add("--lora-ops", choices=get_args(OpsBackend), help="default fused")
    add("--lora-kind", help="kind of adapter, one of megalora.adapters.kinds (default lora)")
    return parser


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
