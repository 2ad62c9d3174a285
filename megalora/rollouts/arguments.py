"""The flags of reinforcement learning, and which of Megatron's do not go with them."""

import argparse

ENGINES = ("megatron", "vllm", "sglang")


def add_rl_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of rewards, updates and rollouts, and return the parser."""
    group = parser.add_argument_group(
        "rewards and rollouts", "--global-batch-size counts the answers of an iteration"
    )
    add = group.add_argument
    add(
        "--reward",
        default="exact",
        metavar="NAME",
        help="`exact`, `contains`, `number` (the last one is right), or your own function: "
        "module:function or FILE.py:function, called with completion, answer and row "
        "(default exact)",
    )
    add(
        "--kl-weight",
        type=float,
        default=0.0,
        metavar="X",
        help="reward lost for each nat that an answer is likelier than by the base (default 0)",
    )
    add(
        "--print-answers",
        type=int,
        default=1,
        metavar="N",
        help="answers to print in each iteration and evaluation (default 1)",
    )
    _add_updates(group)
    _add_rollouts(group)
    return parser


def _add_updates(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add(
        "--group-size",
        type=int,
        default=8,
        metavar="N",
        help="answers to each prompt, whose mean reward is the base line of each (default 8)",
    )
    add(
        "--num-updates",
        type=int,
        default=1,
        metavar="N",
        help="optimizer steps on each iteration's answers (default 1)",
    )
    clipped = (
        "no gain from tokens whose probability over the sampler's is {} (default: not clipped)"
    )
    add("--clip-low", type=float, metavar="X", help=clipped.format("below 1 - X"))
    add("--clip-high", type=float, metavar="X", help=clipped.format("above 1 + X"))


def _add_rollouts(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add("--rollout", choices=ENGINES, default="megatron", help="what samples (default megatron)")
    add(
        "--rollout-url",
        metavar="URL",
        help="of the server, as http://localhost:8000, for vllm and sglang",
    )
    add(
        "--rollout-directory",
        metavar="DIR",
        help="for vllm: where versions of the adapter are written, which the server reads",
    )
    add(
        "--rollout-timeout",
        type=float,
        default=300.0,
        metavar="X",
        help="seconds that a request may take (default 300)",
    )
    add(
        "--rollout-batch-size",
        type=int,
        default=64,
        metavar="N",
        help="answers that a replica samples at a time: bounds megatron's cache, and the requests "
        "to a server (default 64)",
    )


def check_rl_args(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that the loop cannot do what they say with.

    What an engine cannot do is said by `megalora.rollouts.from_flags`.
    """
    if not args.dataset:
        raise ValueError("dataset is not given: set --dataset to a JSONL of `prompt` and `answer`")
    _check_counts(args)
    _check_layout(args)
    _check_model(args)
    _check_rollout(args)


def _check_counts(args: argparse.Namespace) -> None:
    for name, least in (
        ("group_size", 2),
        ("num_updates", 1),
        ("max_tokens", 1),
        ("rollout_batch_size", 1),
        ("eval_prompts", 1),
        ("print_answers", 0),
    ):
        value = getattr(args, name)
        if value < least:
            raise ValueError(f"{name} is {value}: set {_flag(name)} to {least} or more")
    if not 0 <= args.kl_weight < float("inf"):
        raise ValueError(f"kl_weight is {args.kl_weight}: set it to 0 or more")
    if args.clip_low is not None and not 0 <= args.clip_low < 1:
        raise ValueError(f"clip_low is {args.clip_low}: set it from 0 to below 1, such as 0.2")
    if args.clip_high is not None and not args.clip_high >= 0:
        raise ValueError(f"clip_high is {args.clip_high}: set it to 0 or more, such as 0.2")
    if args.max_tokens >= args.seq_length:
        raise ValueError(
            f"max_tokens {args.max_tokens} leaves no room for a prompt in seq_length "
            f"{args.seq_length}: raise --seq-length or lower --max-tokens"
        )
    _check_evaluation(args)


def _check_evaluation(args: argparse.Namespace) -> None:
    if args.eval_interval is None:
        if args.eval_dataset:
            raise ValueError(f"eval_dataset is {args.eval_dataset!r}: set --eval-interval too")
        return
    if args.eval_interval < 1:
        raise ValueError(f"eval_interval is {args.eval_interval}: set it to 1 or more, or leave it")
    if not 0 < args.eval_fraction < 1:
        raise ValueError(f"eval_fraction is {args.eval_fraction}: set it between 0 and 1")


def _check_layout(args: argparse.Namespace) -> None:
    answers = args.global_batch_size // args.data_parallel_size
    for parts, unit in (
        (args.group_size * args.num_updates, "group_size x num_updates"),
        (args.micro_batch_size * args.num_updates, "micro_batch_size x num_updates"),
    ):
        if answers % parts:
            raise ValueError(
                f"global_batch_size {args.global_batch_size} over {args.data_parallel_size} "
                f"data-parallel ranks is not divisible by {unit}, {parts}: change one of them"
            )


def _check_model(args: argparse.Namespace) -> None:
    for name, reason in (
        ("attention_dropout", "answers are sampled without dropout"),
        ("hidden_dropout", "answers are sampled without dropout"),
        ("calculate_per_token_loss", "the loss is a mean over answers"),
        ("overlap_moe_expert_parallel_comm", "a loss of whole answers is not planned ahead"),
        ("mtp_num_layers", "its loss would teach any answer, whatever its reward"),
        ("rampup_batch_size", "an iteration has one number of answers"),
    ):
        if getattr(args, name):
            remedy = f"set {_flag(name)} 0" if "dropout" in name else f"leave {_flag(name)} out"
            raise ValueError(f"{name} is {getattr(args, name)}: {reason}; {remedy}")
    if not args.lora_rank or args.lora_dropout:
        raise ValueError(
            f"lora_rank is {args.lora_rank} and lora_dropout {args.lora_dropout}: the reference "
            "policy is the base without its adapters; set --lora-rank, and no --lora-dropout"
        )


def _check_rollout(args: argparse.Namespace) -> None:
    if (args.rollout_directory is None) == (args.rollout == "vllm"):
        raise ValueError(
            f"rollout_directory is {args.rollout_directory!r}, but rollout is {args.rollout}: vllm "
            "alone reads adapters from --rollout-directory, and needs one"
        )
    if not 0 < args.rollout_timeout < float("inf"):
        raise ValueError(f"rollout_timeout is {args.rollout_timeout}: set it above 0 seconds")
    if (args.rollout_url is None) != (args.rollout == "megatron"):
        raise ValueError(
            f"rollout_url is {args.rollout_url!r}, but rollout is {args.rollout}: vllm and sglang "
            "need the --rollout-url of a server, megatron none"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
