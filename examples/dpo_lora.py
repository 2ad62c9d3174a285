"""Direct Preference Optimization with LoRA on Megatron: a complete launch script, to be copied.

torchrun --nproc-per-node 8 examples/dpo_lora.py <any Megatron flags> --hf-model DIR \
    --lora-rank 32 --dataset pairs.jsonl --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR

Each row of the dataset is a `prompt` with a `chosen` and a `rejected` answer, as text or as chat
messages (docs/preferences.md). The reference policy is the base: the same model with its adapters
switched off, so no second model is held. --micro-batch-size and --global-batch-size count pairs.

It runs in every layout. Without a CUDA device, or with --cpu, it runs on the CPU over gloo.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megalora import add_lora_args, launch

launch.prepare_megatron(sys.argv)  # before the first import of megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training import initialize_megatron, training  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megalora.data import add_data_args, encoder_for, tokenizer_from_args  # noqa: E402
from megalora.data.build import check_lengths  # noqa: E402
from megalora.data.preferences import (  # noqa: E402
    Pair,
    Preferences,
    add_preference_args,
    load_preferences,
)
from megalora.losses import check_dpo, dpo_loss, dpo_metrics  # noqa: E402
from megalora.policy.policy import Policy  # noqa: E402
from megalora.policy.report import report  # noqa: E402
from megalora.policy.sequences import Sequences  # noqa: E402
from megalora.policy.shards import summed  # noqa: E402
from megalora.training.inside import log_inside  # noqa: E402


@dataclass(frozen=True)
class Batch:
    """A microbatch of pairs: the chosen answers' rows, then the rejected ones'.

    reference: [2 * pairs], the log probability that the base gives each whole answer.
    """

    sequences: Sequences
    reference: Tensor

    def four(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return chosen, rejected and the reference's of both, [pairs], as `dpo_loss` takes them.

        logprobs: [2 * pairs, s], of the answers' tokens, 0 elsewhere.
        """
        chosen, rejected = logprobs.sum(1).chunk(2)
        reference_chosen, reference_rejected = self.reference.chunk(2)
        return chosen, rejected, reference_chosen, reference_rejected


def batches(policy: Policy, pairs: Sequence[Pair], micro_batch_size: int) -> list[Batch]:
    """Return microbatches of pairs, with the log probabilities of the base."""
    parts = []
    for first in range(0, len(pairs), micro_batch_size):
        own = pairs[first : first + micro_batch_size]
        rows = [pair.chosen for pair in own] + [pair.rejected for pair in own]
        parts.append(Sequences.encoded(rows).to(policy.device))
    with policy.as_reference():
        reference = policy.logprobs(parts)
    return [Batch(*both) for both in zip(parts, (each.sum(1) for each in reference), strict=True)]


def loss(
    logprobs: Tensor, batch: Batch, *, beta: float, label_smoothing: float, num_pairs: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a microbatch's part of the mean over num_pairs pairs, and sums of its metrics."""
    four = batch.four(logprobs)
    value = dpo_loss(*four, beta=beta, label_smoothing=label_smoothing)
    return value / num_pairs, {"loss": value.detach(), **dpo_metrics(*four, beta=beta)}


def evaluate(policy: Policy, held_out: Preferences, args: argparse.Namespace) -> dict[str, float]:
    """Return the means over held-out pairs: --eval-iters global batches of them, or fewer.

    All batches are full, as those of training; what fills up the last one is not counted.
    """
    size = args.global_batch_size
    num = min(len(held_out), args.eval_iters * size)
    found = []
    for first in range(0, num, size):
        numbers = own_part(range(first, first + size))
        parts = batches(policy, [held_out[k % num] for k in numbers], args.micro_batch_size)
        each = zip(policy.logprobs([part.sequences for part in parts]), parts, strict=True)
        columns = zip(*(part.four(logprobs) for logprobs, part in each), strict=True)
        counted = sum(k < num for k in numbers)
        four = [torch.cat(column)[:counted] for column in columns]
        value = dpo_loss(*four, beta=args.beta, label_smoothing=args.label_smoothing)
        found.append({"loss": value, **dpo_metrics(*four, beta=args.beta)})
    return {name: total / num for name, total in summed(found).items()}


def own_part[T](items: Sequence[T]) -> Sequence[T]:
    """Return every so-manieth item, as many for each data-parallel rank."""
    ranks = parallel_state.get_data_parallel_world_size()
    return items[parallel_state.get_data_parallel_rank() :: ranks]


def train(
    policy: Policy, pairs: Preferences, held_out: Preferences | None, args: argparse.Namespace
) -> None:
    """Run the iterations that are left, and say how each went."""
    size, seed = args.global_batch_size, args.seed
    seed = seed if args.dataset_seed is None else args.dataset_seed
    own_size = size // parallel_state.get_data_parallel_world_size()
    options = {"beta": args.beta, "label_smoothing": args.label_smoothing}
    of_part = partial(loss, **options, num_pairs=own_size)
    for iteration in range(args.iteration, args.train_iters):
        # Which pairs follows from the iteration: a resumed run goes on with the same.
        own = own_part(pairs.batch(iteration, size, seed))
        step = policy.step(batches(policy, own, args.micro_batch_size), of_part)
        if step.taken:
            policy.scheduler.step(size)
        args.consumed_train_samples += size
        number = iteration + 1
        metrics = {name: total / size for name, total in step.metrics.items()}
        metrics["grad norm"] = step.grad_norm
        report(f"iteration {number}/{args.train_iters}", number, metrics)
        log_inside(number)
        is_last = number == args.train_iters
        if held_out and (is_last or number % args.eval_interval == 0):
            found = evaluate(policy, held_out, args)
            report(f"held out after iteration {number}", number, found, prefix="eval/")
        if args.save and (is_last or number % args.save_interval == 0):
            policy.save(number)


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's flags to Megatron's."""
    parser.add_argument("--cpu", action="store_true", help="run on the CPU over gloo")
    add_preference_args(parser)
    return launch.add_exchange_args(add_data_args(add_lora_args(parser)))


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that this loop cannot do what they say with."""
    check_dpo(args.beta, args.label_smoothing)
    launch.check_training_args(args)
    if args.dataset is None:
        raise ValueError(
            "dataset is not given: set --dataset to a JSONL of `prompt`, `chosen` and `rejected`"
        )
    if not args.lora_rank or args.lora_dropout:
        raise ValueError(
            f"lora_rank is {args.lora_rank} and lora_dropout {args.lora_dropout}: the reference "
            "policy is the base without its adapters; set --lora-rank, and no --lora-dropout"
        )
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is {getattr(args, name)}: the policy is compared with the base, both "
                f"without dropout; set --{name.replace('_', '-')} 0"
            )
    for name in (
        *("calculate_per_token_loss", "mtp_num_layers", "rampup_batch_size", "full_validation"),
        *("dataset_test_split", "exit_interval", "exit_duration_in_mins", "exit_signal_handler"),
    ):
        if getattr(args, name):
            raise ValueError(
                f"{name} is {getattr(args, name)}, which this loop does not do: leave "
                f"--{name.replace('_', '-')} out"
            )


def load_data(args: argparse.Namespace) -> tuple[Preferences, Preferences | None]:
    """Read and encode all pairs, before any model is built; none held out for --eval-iters 0."""
    check_lengths(args.seq_length, args.max_position_embeddings, args.dataset_valid_fraction)
    evaluates, log = args.eval_iters != 0, print if args.rank == 0 else lambda _: None
    pairs, held_out = load_preferences(
        args.dataset,
        encoder_for(tokenizer_from_args(args)),
        args.seq_length,
        split=args.dataset_split,
        valid_split=args.dataset_valid_split if evaluates else None,
        valid_fraction=args.dataset_valid_fraction if evaluates else 0.0,
        seed=args.seed if args.dataset_seed is None else args.dataset_seed,
        log=log,
    )
    if len(pairs) < args.global_batch_size:
        log(
            f"WARNING: {len(pairs)} pairs are fewer than global_batch_size "
            f"{args.global_batch_size}: each step has some of them several times"
        )
    return pairs, held_out


def main() -> None:
    """Build the model with its adapters, train it on the pairs, save and export it."""
    with launch.clear_errors():
        sys.argv[1:] = launch.with_hf_flags(sys.argv[1:])
        args = parse_and_validate_args(extra_args_provider=add_args)
        check_args(args)
        # Megatron checks in its own training step only; `Policy.step` checks here.
        args.check_for_nan_in_loss_and_grad = False
        lora = launch.LoRARun(args)
        data = load_data(args)
        model_config = lora.model_config()
        initialize_megatron()
        parts = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, model_config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        model, optimizer, scheduler = parts
        assert optimizer is not None
        assert scheduler is not None
        train(Policy(model, optimizer, scheduler), *data, args)
        lora.finish()


if __name__ == "__main__":
    main()
