"""Reinforcement learning with LoRA on Megatron: a complete loop, to be copied.

torchrun --nproc-per-node 8 examples/rl_lora.py --hf-model DIR --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model DIR --dataset prompts.jsonl --reward rewards.py:reward --lora-rank 8 --lr auto
    <any Megatron flags>

Each iteration samples a group of answers to each prompt with the current adapters, rewards them,
and takes some optimizer steps on "LoRA Without Regret"'s loss: the policy gradient with importance
sampling, rewards less the mean of their group. The reference policy is the base, which is the same
model with its adapters switched off. docs/rl.md says what to prepare and how to read what is
logged. Without a CUDA device, or with --cpu, it runs on the CPU over gloo.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megalora import add_lora_args, launch

launch.prepare_megatron(sys.argv)  # before the first import of megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training import (  # noqa: E402
    get_timers,
    initialize_megatron,
    print_rank_0,
    training,
)
from megatron.training.argument_utils import (  # noqa: E402
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megalora.data import encoder_for, tokenizer_from_args  # noqa: E402
from megalora.data.order import Order  # noqa: E402
from megalora.data.prompts import Prompts, add_prompt_args, load_prompts  # noqa: E402
from megalora.losses import group_advantages, num_clipped, policy_gradient_loss  # noqa: E402
from megalora.policy.policy import Policy  # noqa: E402
from megalora.policy.report import report  # noqa: E402
from megalora.policy.sequences import Sequences  # noqa: E402
from megalora.rollouts.advice import rl_warnings  # noqa: E402
from megalora.rollouts.arguments import add_rl_args, check_rl_args  # noqa: E402
from megalora.rollouts.engine import Sampling  # noqa: E402
from megalora.rollouts.from_flags import check_engine, make_engine  # noqa: E402
from megalora.rollouts.gap import gap  # noqa: E402
from megalora.rollouts.metrics import summarize  # noqa: E402
from megalora.rollouts.replicas import Replicas  # noqa: E402
from megalora.rollouts.rewards import load_reward  # noqa: E402
from megalora.rollouts.sampler import Episodes, Sampler  # noqa: E402
from megalora.rollouts.seeds import sampling_seed  # noqa: E402
from megalora.sync.tensors import replica_of  # noqa: E402
from megalora.training import agree  # noqa: E402
from megalora.training.inside import log_inside  # noqa: E402

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Answers, with the sampler's log probabilities of their tokens [b, s].

    advantages: [b]. distances: [b], how much likelier an answer is than by the base, in nats.
    """

    sequences: Sequences
    sampler_logprobs: Tensor
    advantages: Tensor
    distances: Tensor


def train(
    policy: Policy,
    sampler: Sampler,
    prompts: Prompts,
    held_out: Prompts | None,
    args: argparse.Namespace,
) -> None:
    """Run the iterations that are left."""
    order = Order(len(prompts), args.seed if args.dataset_seed is None else args.dataset_seed)
    timers: Any = get_timers()
    timers("interval-time", log_level=0).start(barrier=True)  # Megatron's saving stops it
    sampler.engine.sync()
    if held_out is not None and args.iteration == 0:
        evaluate(sampler, held_out, 0, args)
    for iteration in range(args.iteration + 1, args.train_iters + 1):
        # Prompts and answers follow from the seed: a resumed run goes on with the same.
        first = args.consumed_train_samples // args.group_size
        chosen = order.take(first, args.global_batch_size // args.group_size)
        asked = [p for index in chosen for p in [prompts[index]] * args.group_size]
        times = [time.monotonic()]
        episodes = sampler.sample(asked, sampling(prompts, iteration, args))
        times.append(time.monotonic())
        microbatches, distances = weigh(policy, episodes, args)
        taken = learn(policy, microbatches, sampler.replicas, args)
        sampler.engine.sync()
        times.append(time.monotonic())
        outcomes = summarize(episodes.outcomes, args.group_size, times)
        title = f"iteration {iteration}/{args.train_iters}"
        report(title, iteration, {**outcomes, **distances, **taken})
        log_inside(iteration)
        args.consumed_train_samples += args.global_batch_size
        is_last = iteration == args.train_iters
        if held_out is not None and (is_last or iteration % args.eval_interval == 0):
            evaluate(sampler, held_out, iteration, args)
        # Saves too; a signal or --exit-duration-in-mins ends the run here, as in Megatron's loop.
        state = (policy.model, policy.optimizer, policy.scheduler)
        if training.checkpoint_and_decide_exit(*state, iteration, 0, {}, None):
            training.maybe_finalize_async_save(blocking=True, terminate=True)
            sys.exit()
        if is_last and args.save and iteration % args.save_interval:
            policy.save(iteration)
    training.maybe_finalize_async_save(blocking=True, terminate=True)


def sampling(prompts: Prompts, iteration: int, args: argparse.Namespace) -> Sampling:
    """Return how an iteration samples; evaluations, which are iteration 0, all by one seed."""
    seed = sampling_seed(args.seed, iteration)
    return Sampling(max_tokens=args.max_tokens, stop=prompts.stop, seed=seed)


def weigh(
    policy: Policy, episodes: Episodes, args: argparse.Namespace
) -> tuple[list[Microbatch], Metrics]:
    """Give each answer its advantage; say how far the sampler is from the learner."""
    answers, size = episodes.answers, args.micro_batch_size
    parts = [slice(first, first + size) for first in range(0, len(answers), size)]
    prompts = [prompt.tokens for prompt in episodes.prompts]
    sequences = [
        Sequences.of(prompts[part], [a.tokens for a in answers[part]]).to(policy.device)
        for part in parts
    ]
    logprobs = policy.logprobs(sequences)
    with policy.as_reference():
        of_base = policy.logprobs(sequences)
    # Its expectation is the KL divergence of an answer from the base.
    distances = torch.cat([(p - q).sum(1) for p, q in zip(logprobs, of_base, strict=True)])
    rewards = episodes.rewards.to(policy.device) - args.kl_weight * distances
    advantages = group_advantages(rewards, args.group_size)
    microbatches = []
    for part, own, p in zip(parts, sequences, logprobs, strict=True):
        sampled = list(chain(*(answer.logprobs for answer in answers[part])))
        microbatches.append(
            Microbatch(
                sequences=own,
                sampler_logprobs=p.masked_scatter(
                    own.answers, torch.tensor(sampled, device=policy.device)
                ),
                advantages=advantages[part],
                distances=distances[part],
            )
        )
    learner = [
        row[answer]
        for own, p in zip(sequences, logprobs, strict=True)
        for row, answer in zip(p, own.answers, strict=True)
    ]
    group: Any = parallel_state.get_data_parallel_group()
    found = gap(learner, answers, group=group)
    named = {"gap/mean": found.mean, "gap/largest": found.largest, "gap/kl": found.kl}
    return microbatches, named


def learn(
    policy: Policy,
    microbatches: Sequence[Microbatch],
    replicas: Replicas,
    args: argparse.Namespace,
) -> Metrics:
    """Take an iteration's optimizer steps, of which all but the first are off policy."""
    size = len(microbatches) // args.num_updates
    clip = {"clip_low": args.clip_low, "clip_high": args.clip_high}
    largest = [0.0]

    def loss(logprobs: Tensor, part: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        mask = part.sequences.answers
        given = (logprobs.T, part.sampler_logprobs.T, part.advantages, mask.T)
        ratios = (logprobs.detach() - part.sampler_logprobs)[mask].exp()
        largest.append(float(ratios.max()))
        # The mean over the answers of a step.
        return policy_gradient_loss(*given, **clip) / (size * len(logprobs)), {
            "ratio/mean": ratios.sum(),
            "ratio/clipped": num_clipped(*given, **clip),
            "kl/base": part.distances.sum(),
            "tokens": mask.sum(),
        }

    firsts = range(0, len(microbatches), size)
    steps = [policy.step(microbatches[first : first + size], loss) for first in firsts]
    policy.scheduler.step(args.global_batch_size)
    sums = {name: sum(step.metrics[name] for step in steps) for name in steps[0].metrics}
    return {
        "kl/base": sums["kl/base"] / args.global_batch_size,
        "ratio/mean": sums["ratio/mean"] / sums["tokens"],
        "ratio/largest": replicas.largest(max(largest)),
        "ratio/clipped": sums["ratio/clipped"] / sums["tokens"],
        "grad-norm": sum(step.grad_norm for step in steps) / len(steps),
        "skipped-steps": sum(not step.taken for step in steps),
    }


def evaluate(sampler: Sampler, prompts: Prompts, iteration: int, args: argparse.Namespace) -> None:
    """Answer held-out prompts once each, and say how well."""
    count, replicas = min(len(prompts), args.eval_prompts), sampler.replicas.count
    # As many for each replica: some come twice, and count once.
    asked = [prompts[index % count] for index in range(-(-count // replicas) * replicas)]
    episodes = sampler.sample(asked, sampling(prompts, 0, args))
    metrics = summarize(episodes.outcomes[:count])
    report(f"evaluation after {iteration}", iteration, metrics, prefix="eval/")


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's flags to Megatron's."""
    parser.add_argument("--cpu", action="store_true", help="run on the CPU over gloo")
    add_prompt_args(add_rl_args(parser))
    return launch.add_exchange_args(add_lora_args(parser))


def main() -> None:
    """Build the model with its adapters, train it by its own answers, save and export it."""
    with launch.clear_errors():
        sys.argv[1:] = launch.with_hf_flags(sys.argv[1:])
        args = parse_and_validate_args(extra_args_provider=add_args)
        launch.check_training_args(args, evaluates=False)
        check_rl_args(args)
        # Megatron checks in its own training step only; `Policy.step` checks here.
        args.check_for_nan_in_loss_and_grad = False
        lora = launch.LoRARun(args)
        reward, encoder = load_reward(args.reward), encoder_for(tokenizer_from_args(args))
        prompts, held_out = load_prompts(
            args.dataset,
            encoder,
            split=args.dataset_split,
            eval_dataset=args.eval_dataset,
            eval_fraction=0 if args.eval_interval is None else args.eval_fraction,
            max_length=args.seq_length - args.max_tokens,
            seed=args.seed if args.dataset_seed is None else args.dataset_seed,
        )
        model_config = lora.model_config()
        check_engine(args, model_config)
        initialize_megatron()
        read = {"dataset": prompts.digest, "eval_dataset": held_out.digest if held_out else ""}
        agree.check(read, "give every node the same files")
        parts: Any = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, model_config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        policy = Policy(*parts)
        assert lora.config is not None
        for line in rl_warnings(lora.config):
            print_rank_0(f"WARNING: {line}")
        replica = replica_of(policy.device)
        sampler = Sampler(
            engine=make_engine(args, policy.model, lora.config, say=print_rank_0),
            reward=reward,
            encoder=encoder,
            replicas=Replicas(replica.index, args.data_parallel_size, speaks=replica.speaks),
            show=print_rank_0,
            num_shown=args.print_answers,
        )
        with launch.at_end(lora.finish):
            train(policy, sampler, prompts, held_out, args)


if __name__ == "__main__":
    main()
