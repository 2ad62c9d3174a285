"""The --dataset flags, and what a launch script makes of them."""

import argparse
from collections.abc import Callable, Sequence
from typing import Literal, cast

import psutil

from megalora import cpu
from megalora.data.build import Datasets, build_datasets, check_dataset, default_valid_split
from megalora.data.tokenizers import ByteTokenizer, Tokenizer
from megalora.model.hybrid import equals_gpt

type AttentionFormat = Literal["padded", "mask", "thd"]


class _ByteTokenizer(argparse.Action):
    """Train on bytes.

    Megatron's own list of tokenizers is closed, and it parses its flags a second time without
    ours, so the choice is a flag of its own. Megatron's models need only the vocabulary's size,
    for which it has the NullTokenizer: Megatron sees that one, the datasets see the real one.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Store the choice."""
        namespace.byte_tokenizer = True
        namespace.tokenizer_type = "NullTokenizer"
        # That of --hf-model comes first on a command line.
        namespace.vocab_size = max(namespace.vocab_size or 0, ByteTokenizer.vocab_size)
        namespace.null_tokenizer_eod_id = ByteTokenizer.eos
        namespace.null_tokenizer_pad_id = ByteTokenizer.pad


class _Once(argparse.Action):
    """Take one value: argparse would forget the first of two without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Store the value, or end where there is one."""
        before = getattr(namespace, self.dest)
        if before is not None:
            parser.error(f"{option_string} {before} and {values}: put the files into one folder")
        setattr(namespace, self.dest, values)


def add_data_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --dataset flags and --byte-tokenizer, and return the parser."""
    group = parser.add_argument_group("data", "chats and texts, with loss masks")
    add = group.add_argument
    add(
        "--dataset",
        action=_Once,
        metavar="DATA",
        help="stdlib-text, stdlib-docstrings, a json, jsonl or parquet file, a folder of such "
        "files, or a Hugging Face dataset (NAME or NAME:CONFIG), with columns `messages` or "
        "`conversations` (and `tools`), `prompt` and `completion`, or `text`",
    )
    add_rows(group, "examples")
    _add_held_out(group)
    add(
        "--no-packing",
        dest="packing",
        action="store_false",
        help="one example in each sequence of --seq-length tokens, padded, instead of as many as "
        "fit",
    )
    add_byte_tokenizer(group)
    return parser


def add_rows(group: argparse._ActionsContainer, what: str) -> None:
    """Add --dataset-split and --dataset-seed: which rows are trained on, and in which order.

    what: a row is, in the plural.
    """
    group.add_argument(
        "--dataset-split",
        default="train",
        metavar="SPLIT",
        help="split to train on (default train)",
    )
    group.add_argument(
        "--dataset-seed",
        type=int,
        metavar="N",
        help=f"seed of the order of {what} (default: --seed)",
    )


def _add_held_out(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add(
        "--dataset-valid-split",
        metavar="SPLIT",
        help="split to validate on (default: a share of the training one)",
    )
    add("--dataset-test-split", metavar="SPLIT", help="split to test on (default: no test)")
    add(
        "--dataset-valid-fraction",
        type=float,
        default=0.02,
        metavar="X",
        help="share of the training rows held out where there is no --dataset-valid-split "
        "(default 0.02)",
    )


def add_byte_tokenizer(parser: argparse._ActionsContainer) -> None:
    """Add --byte-tokenizer."""
    parser.add_argument(
        "--byte-tokenizer",
        action=_ByteTokenizer,
        nargs=0,
        default=False,
        help="tokenizer whose vocabulary is the 256 bytes and six special tokens: needs no files",
    )


def tokenizer_from_args(args: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer that the flags name; Megatron must have built its own.

    Raises ValueError where they name two.
    """
    if args.byte_tokenizer and args.tokenizer_type != "NullTokenizer":
        raise ValueError(
            f"tokenizer_type {args.tokenizer_type} with --byte-tokenizer is two tokenizers: "
            "leave one of them out"
        )
    if args.byte_tokenizer:
        return ByteTokenizer()
    from megatron.training import get_tokenizer

    return cast(Tokenizer, get_tokenizer())


def attention_format(args: argparse.Namespace) -> AttentionFormat:
    """Return how examples of one sequence are kept apart.

    `padded`: nothing to keep apart. `thd`: attention takes the boundaries (TransformerEngine's, and
    mostly that of the local layers). `mask`: it takes a block-diagonal mask, s * s large. Raises
    ValueError where no way is left.
    """
    # Megatron's --data-path datasets always pack, and ask for boundaries by their own flag.
    keep_apart = args.packing if args.dataset is not None else args.reset_attention_mask
    if not keep_apart:
        return "padded"
    if _has_local_layers(args):
        pattern = getattr(args, "hybrid_layer_pattern", None)
        if pattern and not equals_gpt(pattern):
            raise ValueError(
                f"hybrid_layer_pattern is {pattern!r} with packed examples: only "
                "TransformerEngine's format keeps Mamba's state apart; set --no-packing"
            )
        return "thd" if _takes_boundaries(args) else "mask"
    if _joins_for_stages(args):
        raise ValueError(
            f"micro_batch_size {args.micro_batch_size} with packing and "
            f"{args.pipeline_model_parallel_size} pipeline stages: set --micro-batch-size 1 and a "
            "longer --seq-length, or --no-packing"
        )
    return "thd"


def _has_local_layers(args: argparse.Namespace) -> bool:
    """Say whether attention is Megatron's own, or ours in its place, not TransformerEngine's."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return args.transformer_impl != "transformer_engine" or not HAVE_TE or cpu.installed()


def _joins_for_stages(args: argparse.Namespace) -> bool:
    """Say whether pipeline stages would get one long sequence where they expect several.

    Packing joins a microbatch into one; stages expect micro_batch_size of them.
    """
    return args.pipeline_model_parallel_size > 1 and args.micro_batch_size > 1


def _takes_boundaries(args: argparse.Namespace) -> bool:
    """Say whether the local layers' attention takes boundaries."""
    return (
        args.context_parallel_size == 1
        and not _joins_for_stages(args)
        and not args.multi_latent_attention
    )


def check_data_args(args: argparse.Namespace) -> None:
    """Raise ValueError for a dataset that cannot be trained on, before any model is built.

    Every row is read here, and encoded later.

    Only global rank 0 reads the dataset; its exit makes torchrun end the others.
    """
    is_masked = attention_format(args) == "mask"
    is_cut = args.context_parallel_size > 1 or args.window_size is not None
    if is_masked or (is_cut and _has_local_layers(args)):
        _check_mask(args)
    if args.dataset is None:
        _check_megatron_data(args)
        return
    if args.dataloader_type != "single":
        raise ValueError(
            f"dataloader_type is {args.dataloader_type!r}: rows of --dataset come shuffled, in an "
            "order that no layout changes, which Megatron's own shuffling ends; leave "
            "--dataloader-type out"
        )
    if args.rank != 0:
        return
    check_dataset(
        args.dataset,
        tokenizer_from_args(args),
        args.seq_length,
        train_split=args.dataset_split,
        valid_split=args.dataset_valid_split or default_valid_split(args.dataset),
        test_split=args.dataset_test_split,
        valid_fraction=args.dataset_valid_fraction,
        max_seq_length=args.max_position_embeddings,
        validates=args.full_validation or args.eval_iters != 0,
    )


def datasets_from_args(
    args: argparse.Namespace,
    num_samples: Sequence[int | None],
    *,
    log: Callable[[str], None] | None = None,
) -> Datasets:
    """Return the train, validation and test datasets of the given lengths."""
    splits_examples = attention_format(args) == "thd" and args.context_parallel_size > 1
    built = build_datasets(
        args.dataset,
        tokenizer_from_args(args),
        args.seq_length,
        train_split=args.dataset_split,
        valid_split=args.dataset_valid_split,
        test_split=args.dataset_test_split,
        valid_fraction=args.dataset_valid_fraction,
        packing=args.packing,
        pad_multiple=2 * args.context_parallel_size if splits_examples else 1,
        num_samples=num_samples,
        seed=args.seed if args.dataset_seed is None else args.dataset_seed,
        max_seq_length=args.max_position_embeddings,
        log=log,
    )
    train = built[0]
    if log is not None and train is not None and len(train.rows) < args.global_batch_size:
        log(
            f"WARNING: dataset {args.dataset} fills {len(train.rows)} rows, fewer than "
            f"global_batch_size {args.global_batch_size}, so that each step has some of them "
            "several times: lower --global-batch-size, or --seq-length, or give more data"
        )
    return built


def _check_mask(args: argparse.Namespace) -> None:
    """Raise ValueError where the masks of the local layers cannot be held in memory."""
    # Beside the boolean one, torch's attention keeps a floating one for each layer's backward.
    num_copies = 1 if args.recompute_granularity == "full" else args.num_layers or 1
    entries = args.micro_batch_size * args.seq_length**2 // args.context_parallel_size
    need = entries * (1 + 4 * num_copies // args.pipeline_model_parallel_size)
    total = psutil.virtual_memory().total
    if need > total:
        without = ", or set --context-parallel-size 1 and --no-packing, which need none"
        raise ValueError(
            f"seq_length {args.seq_length} needs {need / 2**30:.0f} GiB of attention masks in the "
            f"local layers, this machine has {total / 2**30:.0f}: lower --seq-length"
            + (without if args.window_size is None else "")
        )


def _check_megatron_data(args: argparse.Namespace) -> None:
    """Raise ValueError where neither --dataset nor Megatron's own flags name data."""
    sources = ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path")
    if not args.mock_data and all(getattr(args, name) is None for name in sources):
        raise ValueError("dataset is not given: set --dataset, or Megatron's own --data-path")
    if args.byte_tokenizer:
        raise ValueError(
            "byte_tokenizer is for --dataset, --data-path holds tokens of another tokenizer: "
            "set --tokenizer-type and --tokenizer-model to that one"
        )
    if args.reset_attention_mask and args.context_parallel_size > 1:
        raise ValueError(
            f"reset_attention_mask with context_parallel_size {args.context_parallel_size} cannot "
            "cut documents evenly: leave --reset-attention-mask out"
        )
