"""Reinforcement learning with LoRA on Megatron: a small, complete loop, to be copied.

torchrun --nproc-per-node 8 examples/rl_lora.py <any Megatron flags> --lora-rank 8 --lr auto

Each iteration samples groups of answers with the current adapters, rewards the right ones, and
takes some optimizer steps on "LoRA Without Regret"'s loss: the policy gradient with importance
sampling, rewards less the mean of their group. The reference policy is the base, which is the same
model with its adapters switched off. Put your prompts and your check in place of `LargestToken`.

Tensor, sequence, expert and data parallel; the context is recomputed for each sampled token, so
serve long answers by an inference engine instead. Without a CUDA device, or with --cpu, it runs on
the CPU over gloo.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalora import add_lora_args, launch

launch.prepare_megatron(sys.argv)  # before the first import of megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402
from megatron.training import initialize_megatron, print_rank_0, training  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megalora import set_enabled  # noqa: E402
from megalora.losses import (  # noqa: E402
    group_advantages,
    policy_gradient_loss,
    vocab_parallel_logprobs,
)


class Task(Protocol):
    """Prompts, and a check of their answers."""

    answer_length: int
    vocab_size: int

    def prompts(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw prompts [num, s] of one length."""
        ...

    def rewards(self, tokens: Tensor) -> Tensor:
        """Return a reward for each row of prompts with their answers, [b]."""
        ...


class Policy(Protocol):
    """A model that is trained."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Return [b, s, v/tp] for tokens [b, s]."""
        ...

    def step(self, losses: Iterable[Tensor]) -> None:
        """Update by the gradient of the sum of losses, of which one at a time is computed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Answers, tokens [b, s], with their log probabilities when sampled, [answer, b]."""

    tokens: Tensor
    logprobs: Tensor
    rewards: Tensor


def collect(policy: Policy, task: Task, num: int, group_size: int, seed: int) -> Batch:
    """Answer `num` prompts `group_size` times each by the policy as it is now."""
    generator = torch.Generator().manual_seed(seed)
    prompts = task.prompts(num, generator).repeat_interleave(group_size, 0)
    with torch.no_grad():
        tokens = sample(policy, task, prompts, generator)
        logprobs = answer_logprobs(policy, tokens, task.answer_length)
    return Batch(tokens=tokens, logprobs=logprobs, rewards=task.rewards(tokens))


def sample(policy: Policy, task: Task, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Return tokens [b, s] with a sampled answer after them.

    All tensor-parallel ranks draw the same, given the same generator.
    """
    for _ in range(task.answer_length):
        last = gather_from_tensor_model_parallel_region(policy.logits(tokens)[:, -1])
        # Megatron pads the vocabulary.
        probabilities = last[:, : task.vocab_size].float().softmax(-1).cpu()
        drawn = probabilities.multinomial(1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
    return tokens


def answer_logprobs(policy: Policy, tokens: Tensor, answer_length: int) -> Tensor:
    """Return the log probabilities of the answers at the end of tokens, [answer, b]."""
    logits = policy.logits(tokens[:, :-1])[:, -answer_length:].transpose(0, 1).contiguous()
    return vocab_parallel_logprobs(logits, tokens[:, -answer_length:].T.contiguous())


def learn(
    policy: Policy, batch: Batch, advantages: Tensor, *, num_updates: int, micro_batch_size: int
) -> None:
    """Take optimizer steps, each on its part of the answers.

    All steps but the first are off policy, which the ratio in the loss corrects.
    """

    def losses(part: Tensor) -> Iterator[Tensor]:
        for micro in part.split(micro_batch_size):
            logprobs = answer_logprobs(policy, batch.tokens[micro], len(batch.logprobs))
            loss = policy_gradient_loss(
                logprobs, batch.logprobs[:, micro], advantages[micro], torch.ones_like(logprobs)
            )
            yield loss / len(part)

    for part in torch.arange(len(batch.tokens)).chunk(num_updates):
        policy.step(losses(part))


class LargestToken:
    """Name the largest of four tokens, which any model can learn from its start values."""

    answer_length, prompt_length = 1, 4

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def prompts(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw prompts [num, 4]."""
        shape = (num, self.prompt_length)
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        return torch.randint(self.vocab_size, shape, generator=generator).to(device)

    def rewards(self, tokens: Tensor) -> Tensor:
        """Return 1 for each right answer and 0 for each wrong one."""
        return (tokens[:, -1] == tokens[:, :-1].amax(1)).float()


class MegatronPolicy:
    """Megatron's model, optimizer and schedule of learning rates."""

    def __init__(self, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def logits(self, tokens: Tensor) -> Tensor:
        """Return [b, s, v/tp] for tokens [b, s]."""
        length = tokens.shape[1]
        # Sequence parallelism splits the length; what lies behind it is not seen from before.
        padding = -length % parallel_state.get_tensor_model_parallel_world_size()
        tokens = torch.nn.functional.pad(tokens, (0, padding))
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model[0](tokens, positions, None)[:, :length]

    def step(self, losses: Iterable[Tensor]) -> None:
        """Update by the gradient of the sum of losses, averaged over data-parallel ranks."""
        self.model[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        for loss in losses:
            if not loss.isfinite():
                raise RuntimeError(f"loss is {loss.item()}: lower --lr")
            self.optimizer.scale_loss(loss).backward()
        finalize_model_grads(self.model, None)
        self.optimizer.step()

    def save(self, iteration: int) -> None:
        """Write the adapters and their optimizer to --save."""
        parts = (self.model, self.optimizer, self.scheduler)
        # By its module: `LoRARun` has put its own around Megatron's.
        training.save_checkpoint(iteration, *parts, num_floating_point_operations_so_far=0)
        # Of --async-save, which Megatron's own loop finishes in a later iteration.
        training.maybe_finalize_async_save(blocking=True)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Be the base, without gradient."""
        set_enabled(self.model, False)
        try:
            with torch.no_grad():
                yield
        finally:
            set_enabled(self.model, True)


def train(policy: MegatronPolicy, task: Task, args: argparse.Namespace) -> None:
    """Run the iterations that are left, and say how each went."""
    dp_rank = parallel_state.get_data_parallel_rank()
    dp_size = parallel_state.get_data_parallel_world_size()
    num_prompts = args.global_batch_size // (args.group_size * dp_size)
    for iteration in range(args.iteration, args.train_iters):
        # Prompts and answers follow from the iteration: a resumed run goes on with the same.
        seed = (args.seed * 1_000_003 + iteration) * dp_size + dp_rank
        batch = collect(policy, task, num_prompts, args.group_size, seed)
        with policy.as_reference():
            base_logprobs = answer_logprobs(policy, batch.tokens, task.answer_length)
        # Its expectation is the KL divergence from the base.
        distance = (batch.logprobs - base_logprobs).sum(0)
        advantages = group_advantages(batch.rewards - args.kl_weight * distance, args.group_size)
        learn(
            policy,
            batch,
            advantages,
            num_updates=args.num_updates,
            micro_batch_size=args.micro_batch_size,
        )
        policy.scheduler.step(args.global_batch_size)
        report = torch.stack([batch.rewards.mean(), distance.mean()]) / dp_size
        dist.all_reduce(report, group=parallel_state.get_data_parallel_group())
        print_rank_0(
            f"iteration {iteration + 1}/{args.train_iters} | reward: {report[0]:.4f} | "
            f"distance from the base: {report[1]:.4f} nats"
        )
        is_last = iteration + 1 == args.train_iters
        if args.save and (is_last or (iteration + 1) % args.save_interval == 0):
            policy.save(iteration + 1)


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's flags to Megatron's."""
    parser.add_argument("--cpu", action="store_true", help="run on the CPU over gloo")
    group = parser.add_argument_group(
        "policy gradient", "--global-batch-size counts the answers of an iteration"
    )
    group.add_argument("--group-size", type=int, default=8, help="answers to each prompt")
    group.add_argument(
        "--num-updates", type=int, default=2, help="steps on each iteration's answers"
    )
    group.add_argument(
        "--kl-weight", type=float, default=0.0, help="reward lost per nat off the base"
    )
    return launch.add_exchange_args(add_lora_args(parser))


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that this loop cannot do what they say with."""
    for name, limit in (
        ("pipeline_model_parallel_size", 1),
        ("context_parallel_size", 1),
        ("attention_dropout", 0),
        ("hidden_dropout", 0),
        ("calculate_per_token_loss", False),
    ):
        if getattr(args, name) != limit:
            raise ValueError(
                f"{name} is {getattr(args, name)}: the loop samples and learns with one model, "
                f"whole and without dropout; set it to {limit}"
            )
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "mtp_num_layers"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is {getattr(args, name)}: the loop's loss is of sampled answers, beside "
                "which nothing scales a loss that the model adds itself; leave it out"
            )
    if not args.lora_rank or args.lora_dropout:
        raise ValueError(
            f"lora_rank is {args.lora_rank} and lora_dropout {args.lora_dropout}: the reference "
            "policy is the base without its adapters; set --lora-rank, and no --lora-dropout"
        )
    answers = args.global_batch_size // args.data_parallel_size
    if answers % (args.group_size * args.num_updates):
        raise ValueError(
            f"global_batch_size {args.global_batch_size} over {args.data_parallel_size} "
            f"data-parallel ranks is not divisible by group_size {args.group_size} x num_updates "
            f"{args.num_updates}: raise --global-batch-size"
        )


def main() -> None:
    """Build the model with its adapters, train it by its own answers, save and export it."""
    with launch.clear_errors():
        defaults = {"tokenizer_type": "NullTokenizer"}
        args = parse_and_validate_args(extra_args_provider=add_args, args_defaults=defaults)
        check_args(args)
        # Megatron checks in its own training step only; `MegatronPolicy.step` checks here.
        args.check_for_nan_in_loss_and_grad = False
        lora = launch.LoRARun(args)
        model_config = gpt_config_from_args(args)
        model_config.pre_wrap_hooks += lora.hooks()
        initialize_megatron()
        parts = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, model_config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        train(MegatronPolicy(*parts), LargestToken(args.vocab_size), args)
        lora.finish()


if __name__ == "__main__":
    main()
