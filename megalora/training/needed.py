"""What every run needs of its flags, said in a sentence before Megatron asserts or divides by it.

Each check is of what Megatron would end in too: flags that it takes are not refused here.
"""

import argparse
import linecache
import os
import traceback
from collections.abc import Mapping
from pathlib import PurePath

from megalora.data.build import check_lengths

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
# Flags by which Megatron reads, or reckons, the sizes itself.
_OTHER_SIZES = (
    *("hybrid_layer_pattern", "hybrid_override_pattern", "encoder_num_layers", "yaml_cfg"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
)


def check_needed(args: argparse.Namespace, defaults: Mapping[str, object]) -> None:
    """Raise ValueError for flags that Megatron's validation would end in a bare assertion.

    args: as parsed, not validated yet. defaults: a script's own, of flags that are left out.
    """
    given = vars(args)
    more = {name: value for name, value in defaults.items() if given.get(name) is None}
    args = argparse.Namespace(**{**given, **more})
    _check_sizes(args)
    if args.micro_batch_size is None:
        raise ValueError(
            "micro_batch_size is not given: set --micro-batch-size 1 or more, the sequences that "
            "one rank takes at a time"
        )
    if args.seq_length is None and args.encoder_seq_length is None:
        raise ValueError("seq_length is not given: set --seq-length, the tokens of a sequence")
    if args.seq_length is not None and args.max_position_embeddings is not None:
        check_lengths(args.seq_length, args.max_position_embeddings, 0.5)
    if args.bf16 and args.fp16:
        raise ValueError("bf16 and fp16 are both set: leave one of --bf16 and --fp16 out")
    _check_processes(args)


def _check_sizes(args: argparse.Namespace) -> None:
    if not any(getattr(args, name, None) for name in _OTHER_SIZES):
        for name in _SIZES:
            if getattr(args, name) is None:
                raise ValueError(
                    f"{name} is not given: set --{name.replace('_', '-')} and the model's other "
                    "sizes, or --hf-model DIR, whose config.json has them all"
                )
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.group_query_attention and heads and groups and heads % groups:
        raise ValueError(
            f"num_attention_heads {heads} is not divisible by num_query_groups {groups}: change "
            "--num-attention-heads or --num-query-groups"
        )


def _check_processes(args: argparse.Namespace) -> None:
    """Raise ValueError where the processes do not fill the layout, or the batch does not them."""
    names = (
        *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        "context_parallel_size",
    )
    sizes = {name: getattr(args, name) for name in names if getattr(args, name) != 1}
    total = 1
    for size in sizes.values():
        total *= size
    if args.world_size % total:
        parts = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"{parts} needs {total} processes or a multiple of them, but this run has "
            f"{args.world_size}: start it by `torchrun --nproc-per-node {total} ...`, or lower the "
            "sizes"
        )
    ranks, micro = args.world_size // total, args.micro_batch_size
    batch = args.global_batch_size
    by_steps = args.rampup_batch_size or args.step_batch_size_schedule
    is_free = by_steps or args.decrease_batch_size_if_needed
    if batch is not None and not is_free and batch % (micro * ranks):
        raise ValueError(
            f"global_batch_size {batch} is not divisible by micro_batch_size {micro} x {ranks} "
            f"data-parallel ranks: set --global-batch-size to a multiple of {micro * ranks}, or "
            "start another number of processes"
        )


def check_training_args(args: argparse.Namespace, *, evaluates: bool = True) -> None:
    """Raise ValueError for a run without an end, without a rate, or that does not say when it
    evaluates, which Megatron divides by.

    args: Megatron's validated flags. evaluates: whether the loop wants --eval-interval.
    """
    check_started()
    if args.skip_train:
        return
    if args.train_iters is None and args.train_samples is None:
        raise ValueError("train_iters is not given: set --train-iters, the steps of the run")
    check_rate(args.lr)
    if evaluates and args.eval_interval is None and not args.full_validation:
        raise ValueError(
            "eval_interval is not given: set --eval-interval 1000, and --eval-iters 0 for no "
            "validation"
        )


def check_rate(lr: float | None) -> None:
    """Raise ValueError where there is no learning rate."""
    if lr is None:
        raise ValueError(
            "lr is not given: set --lr auto for the rate that megalora recommends, or --lr and a "
            "number such as 2e-4"
        )


# === What Megatron itself finds wrong ===


def said_by_megatron(error: BaseException) -> str:
    """Return what an assertion or ValueError in Megatron says, and where; a bare one by its text.

    Empty where it was raised elsewhere.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or "megatron" not in PurePath(frames[-1].filename).parts:
        return ""
    said = str(error).strip() or _source(frames[-1])
    return f"{said} (Megatron's own check, {place_in_megatron(frames[-1])})"


def place_in_megatron(frame: traceback.FrameSummary) -> str:
    """Return where a frame is, from `megatron/` on."""
    parts = PurePath(frame.filename).parts
    inside = parts[len(parts) - 1 - parts[::-1].index("megatron") :]
    return f"{'/'.join(inside)}:{frame.lineno}"


def _source(frame: traceback.FrameSummary) -> str:
    """Return the statement that a frame stands in, in one line."""
    first = frame.lineno or 0
    lines = range(first, (frame.end_lineno or first) + 1)
    text = " ".join(linecache.getline(frame.filename, line).strip() for line in lines)
    return f"it asks for `{text.removeprefix('assert ')}`"


# === Where it runs ===


def check_started(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError where no launcher has said where the ranks of this run meet."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not set, so this process was not started by torchrun: start "
            "`torchrun --nproc-per-node 1 ...`, with as many processes as the node has GPUs, in "
            "the place of `python ...`"
        )


def check_gpu(num_gpus: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError on a rank that has no GPU of its own, as its node has too few.

    num_gpus: that torch sees here.
    """
    local_rank = environ.get("LOCAL_RANK", "0")
    if local_rank.isdecimal() and int(local_rank) >= num_gpus:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, but this node shows {num_gpus} GPUs: start "
            f"`torchrun --nproc-per-node {num_gpus} ...`, or add --cpu to run without GPUs"
        )
