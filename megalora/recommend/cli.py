"""The command line `megalora recommend`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megalora.arguments import add_field
from megalora.config import LoRAConfig
from megalora.model.arguments import args_shape
from megalora.model.families import rate_exponents
from megalora.model.presets import PRESETS, named_shape
from megalora.model.shape import DELTA_SIZES, ModelShape
from megalora.reading import check_plain, parse_json
from megalora.recommend.layout import Layout
from megalora.recommend.recommendation import recommend

if TYPE_CHECKING:
    from megalora.data.chat_template import HuggingFaceTokenizer


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """Add the command `recommend` to argparse's subparsers and return its parser."""
    parser = subparsers.add_parser(
        "recommend",
        usage="megalora recommend (--model NAME | <Megatron's size flags>) --rank N [options]",
        help="learning rate, rank, parameters, FLOPs and memory of a LoRA run",
        description="Apply the rules of 'LoRA Without Regret' to a model. The model is --model, or "
        "Megatron's own size flags. `megalora plan` says what each rank of a run would hold, "
        "activations included.",
    )
    _add_model(parser)
    _add_adapter(parser)
    _add_run(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the recommendation for parsed arguments; ValueError says what to change."""
    names = ("tp", "ep", "pp", "dp", "etp")
    result = recommend(
        _shape(args),
        _config(args),
        tokens=_tokens(args),
        first_epoch_nats=args.first_epoch_nats,
        rl_episodes=args.rl_episodes,
        steps=args.steps,
        batch_size=args.batch_size,
        layout=Layout(**{name: getattr(args, name) for name in names}),
    )
    print(json.dumps(result.to_dict(), indent=2) if args.json else result.table())
    return 0


def count_trained_tokens(dataset: str, tokenizer: str) -> int:
    """Count the tokens that one epoch of a dataset trains on, without any cut.

    dataset: as `--dataset` of a training run. tokenizer: `byte`, a Hugging Face name or folder.
    """
    # Loaded here: a count from --tokens needs neither datasets nor transformers.
    from megalora.data.examples import encode_rows
    from megalora.data.rows import load_rows, schema_of
    from megalora.data.tokenizers import ByteTokenizer, encoder_for

    rows = load_rows(dataset)
    encoder = encoder_for(ByteTokenizer() if tokenizer == "byte" else _hf_tokenizer(tokenizer))
    encoded = encode_rows(rows, schema_of(rows, dataset), encoder, seq_length=2**62)
    return sum(sum(example.tokens.trained[1:]) for example in encoded)


# Megatron's flags.
_SIZES = (
    "num-layers",
    "hidden-size",
    "num-attention-heads",
    "num-query-groups",
    "kv-channels",
    "q-lora-rank",
    "kv-lora-rank",
    "qk-head-dim",
    "qk-pos-emb-head-dim",
    "v-head-dim",
    "ffn-hidden-size",
    "vocab-size",
    "padded-vocab-size",
    "num-experts",
    "moe-ffn-hidden-size",
    "moe-shared-expert-intermediate-size",
    "mtp-num-layers",
    *(name.replace("_", "-") for name in DELTA_SIZES),
)
_SWITCHES = (
    "group-query-attention",
    "swiglu",
    "untie-embeddings-and-output-weights",
    "qk-layernorm",
    "add-qkv-bias",
    "attention-output-gate",
    "moe-shared-expert-gate",
    "multi-latent-attention",
)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--model", "--hf-model"),
        metavar="NAME",
        help=f"folder of a Hugging Face model, or one of {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--family",
        default="",
        metavar="NAME",
        help=f"family of the learning rate rule, known: {', '.join(rate_exponents())}",
    )
    group = parser.add_argument_group(
        "Megatron's size flags, in place of --model", "under their own names, as in a launch script"
    )
    for name in _SIZES:
        group.add_argument(f"--{name}", type=int, metavar="N")
    group.add_argument("--moe-router-topk", type=int, default=2, metavar="N", help="default 2")
    for name in ("moe-layer-freq", "linear-attention-freq"):
        group.add_argument(
            f"--{name}",
            type=_layer_freq,
            metavar="N",
            help="a number of layers, or a list of 0 and 1",
        )
    group.add_argument("--experimental-attention-variant", metavar="NAME", help="gated_delta_net")
    for name in _SWITCHES:
        group.add_argument(f"--{name}", action="store_true")


def _layer_freq(text: str) -> int | list[int]:
    value = parse_json(text)
    each = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in each) or value == 0:
        raise ValueError(f"{text!r:.100} is neither a number of layers nor a list of 0 and 1")
    return value


# Of LoRAConfig, what a recommendation follows from.
_FIELDS = (
    "rank",
    "alpha",
    "targets",
    "expert_rank",
    "expert_mode",
    "shared_a",
    "delta_gates",
    "rslora",
    "lr_ratio",
)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters, as the --lora-* flags of a training run")
    for name in _FIELDS:
        add_field(group, name, prefix="--", required=name == "rank")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    data = group.add_mutually_exclusive_group()
    data.add_argument("--tokens", type=int, metavar="N", help="trained tokens of one epoch")
    data.add_argument(
        "--dataset",
        metavar="DATA",
        help="count trained tokens in a dataset, named as for --dataset of a training run",
    )
    data.add_argument(
        "--rl-episodes", type=int, metavar="N", help="episodes (answers) of reinforcement learning"
    )
    data.add_argument(
        "--first-epoch-nats",
        type=float,
        metavar="X",
        help="summed loss of a first epoch over all its trained tokens, in nats",
    )
    group.add_argument(
        "--tokenizer", metavar="NAME", help="for --dataset: `byte`, a folder or a hub name"
    )
    group.add_argument("--steps", type=int, metavar="N", help="optimizer steps of the run")
    group.add_argument("--batch-size", type=int, metavar="N", help="sequences in an optimizer step")
    for name, text in (
        ("tp", "tensor-parallel size"),
        ("ep", "expert-parallel size"),
        ("pp", "pipeline-parallel size"),
        ("dp", "data-parallel size, context-parallel ranks included"),
    ):
        group.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{text} (default 1)"
        )
    group.add_argument(
        "--etp", type=int, metavar="N", help="expert-tensor-parallel size (default tp)"
    )


def _shape(args: argparse.Namespace) -> ModelShape:
    if args.model is None:
        return args_shape(args, family=args.family)
    if args.num_layers or args.hidden_size:
        raise ValueError(f"model is {args.model} beside Megatron size flags: give one or the other")
    return named_shape(args.model, family=args.family)


def _config(args: argparse.Namespace) -> LoRAConfig:
    fields = set(LoRAConfig.__dataclass_fields__) - {"rank"}
    names = [name for name in fields if hasattr(args, name)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return LoRAConfig(rank=args.rank, **given)


def _tokens(args: argparse.Namespace) -> int | None:
    if args.dataset is None:
        return args.tokens
    tokenizer = args.tokenizer
    if tokenizer is None and args.model and Path(args.model, "tokenizer_config.json").is_file():
        tokenizer = args.model
    if tokenizer is None:
        raise ValueError("dataset needs a tokenizer to be counted: give --tokenizer, or --tokens")
    return count_trained_tokens(args.dataset, tokenizer)


def _hf_tokenizer(name: str) -> "HuggingFaceTokenizer":
    from transformers import AutoTokenizer

    folder = Path(name)
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            check_plain(file, inside=folder)
    try:
        # Given no word, transformers asks at the terminal whether to run the Python that it brings.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever its many classes raise
        raise ValueError(
            f"tokenizer {name} cannot be read ({type(error).__name__}: {error}): give a folder "
            "with tokenizer.json and tokenizer_config.json, or --tokens"
        ) from error
