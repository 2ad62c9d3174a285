"""The page of all flags of a training run, from the parsers that read them."""

import argparse
import re
from collections.abc import Callable, Iterator

from docs.generate.markdown import directive, prose, sentence
from megalora.config import LoRAConfig
from megalora.data.arguments import add_data_args
from megalora.data.preferences import add_preference_args
from megalora.data.prompts import add_prompt_args
from megalora.rollouts.arguments import add_rl_args
from megalora.run import add_flags

type Add = Callable[[argparse.ArgumentParser], object]

# Where flags are of, a sentence on it, the scripts that have them, and what adds them to a parser.
SCRIPTS: tuple[tuple[str, str, str, tuple[Add, ...]], ...] = (
    (
        "Every run",
        "`megalora run SCRIPT.py` and all examples have these, beside all of Megatron's own.",
        "megalora run",
        (add_flags,),
    ),
    (
        "Data",
        "Of `examples/pretrain_lora.py` and `examples/dpo_lora.py`; "
        "[what a row may be](../data.md). A script under `megalora run` keeps its own data.",
        "examples/pretrain_lora.py",
        (add_data_args,),
    ),
    (
        "Preferences",
        "Of `examples/dpo_lora.py`; [how to use it](../preferences.md).",
        "examples/dpo_lora.py",
        (add_preference_args,),
    ),
    (
        "Reinforcement learning",
        "Of `examples/rl_lora.py`; [how to use it](../rl.md).",
        "examples/rl_lora.py",
        (add_prompt_args, add_rl_args),
    ),
)

# Megatron's own flags that do more, or something else, in a run of adapters.
MEGATRONS = {
    "--lr auto": "the learning rate that `megalora recommend` gives for the model.",
    "--decoupled-lr, --decoupled-min-lr": "Megatron's rate of the embedding and the output layer: "
    "here of the unembedding's adapter. Default: `--lr`, `--min-lr`.",
    "--save, --load": "directories of adapter checkpoints: adapters, their optimizer, scheduler, "
    "random states and place in the data, never the base.",
    "--pretrained-checkpoint": "the base, as a checkpoint of Megatron's.",
}

# What the environment changes; compiled code reads the last.
VARIABLES = {
    "MEGALORA_TRACEBACK": "1: an error of the user's input shows its traceback too, and every rank "
    "that failed says what it met.",
    "MEGALORA_WARNINGS": "1: shows the warnings of Megatron, torch and others too, which are left "
    "out where they mean nothing here.",
    "MEGALORA_PROGRESS": "0: no lines on stderr of how far long work is.",
    "MEGALORA_OPS": "`fused` or `reference`, before `--lora-ops`.",
    "MEGALORA_CUDA": "when megalora is built: 0 leaves the CUDA ops out, 1 makes a missing nvcc an "
    "error. Default: they are built where nvcc and a torch with CUDA are found.",
    "MEGALORA_CUDA_ARCH": "when megalora is built: `80`, `90a` or `100a` alone. Default: all.",
    "MEGALORA_LABEL": "when megalora is built: 1 adds torch's version and `cuda` or `cpu` to "
    "megalora's own, as the names of wheels have it.",
    "MEGALORA_CUDA_ROUTE": "who computes the products of adapters on a GPU: `auto` (default), "
    "`gemm` for cuBLAS or `kernels` for megalora's own; also by product, as in "
    "`project:kernels,update:gemm`. For measurements.",
}


def page() -> str:
    """Return the page."""
    parts = [
        "# Flags",
        "Made from the parsers themselves: `--help` of a script says the same. Ranks that are "
        "given different flags end before the first step.",
    ]
    for title, about, program, adds in SCRIPTS:
        parts += [f"## {title}", about, f"```{{program}} {program}\n```"]
        parts += list(groups(parser_of(*adds), title))
    parts += ["## Megatron's flags that mean more here", table(MEGATRONS, "flag")]
    parts += ["## Environment variables", table(VARIABLES, "variable")]
    return "\n\n".join(parts) + "\n"


def parser_of(*adds: Add) -> argparse.ArgumentParser:
    """Return a parser with nothing but what these functions add."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in adds:
        add(parser)
    return parser


def groups(parser: argparse.ArgumentParser, above: str = "") -> Iterator[str]:
    """Describe each group of a parser's flags.

    Those in none come without a heading, and so does a group that is called as the heading above.
    """
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if is_shown(action)]
        if not actions:
            continue
        title = (group.title or "")[:1].upper() + (group.title or "")[1:]
        if title not in ("Options", "Positional arguments", above):
            yield f"### {prose(title)}"
        if group.description:
            yield prose(sentence(group.description))
        yield from (described(action) for action in actions if action.help)
        # Megatron's own, which it explains.
        if rest := [f"`{written(action)}`" for action in actions if not action.help]:
            yield f"{', '.join(rest)}."


def is_shown(action: argparse.Action) -> bool:
    """Say whether a flag is on the page: not --help, which every command has."""
    is_help = isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    return not is_help and action.help != argparse.SUPPRESS


def written(action: argparse.Action) -> str:
    """Return how a flag or an argument is given, as --help has it."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    default = action.dest.upper()
    values = argparse.HelpFormatter("")._format_args(action, default)
    if action.metavar is None and action.choices is not None:
        values = "{" + ",".join(map(str, action.choices)) + "}"
    return ", ".join(f"{name} {values}".strip() for name in action.option_strings)


def described(action: argparse.Action) -> str:
    """Describe one flag or argument: how it is given, what it does, its default."""
    said = argparse.HelpFormatter("")._expand_help(action)
    facts = [prose(sentence(said))]
    if says_no_default(action, said):
        facts.append(f"Default: `{action.default}`.")
    if action.required and action.option_strings:
        facts.append("Required.")
    field = action.dest.removeprefix("lora_")
    if action.dest.startswith("lora_") and field in LoRAConfig.__dataclass_fields__:
        facts.append(f"In Python: {{py:attr}}`~megalora.LoRAConfig.{field}`.")
    return directive("option", written(action), " ".join(facts))


def says_no_default(action: argparse.Action, said: str) -> bool:
    """Say whether a flag has a default that its help does not name."""
    if action.default in (None, False, "", argparse.SUPPRESS) or action.nargs == 0:
        return False
    return re.search(r"\bdefault\b", said) is None


def table(rows: dict[str, str], what: str) -> str:
    """Return names and what they do as a table."""
    lines = [f"| {what} | what it does |", "|---|---|"]
    for names, text in rows.items():
        marked = ", ".join(f"`{name}`" for name in names.split(", "))
        lines.append(f"| {marked} | {prose(sentence(text))} |")
    return "\n".join(lines)


def flags() -> set[str]:
    """Return every flag on the page."""
    parsers = [parser_of(*adds) for _, _, _, adds in SCRIPTS]
    return {flag for parser in parsers for flag in parser._option_string_actions}
