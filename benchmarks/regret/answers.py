"""Reinforcement learning of a pretrained model on questions with one right answer.

Answers are sampled by Megatron's cache of keys and values from the model in training. A group's
answers are learned from in one row behind their prompt, which is then computed once.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import process_time

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.regret.job import GROUP_SIZE, HELD_OUT_QUESTIONS, Job, Result
from benchmarks.regret.model import Trainer
from benchmarks.regret.pretrained import ADAM_EPS, build, device
from benchmarks.regret.questions import KINDS, REWARDED, Kind, Question, draw
from benchmarks.regret.rl import MAX_STEPS, NUM_UPDATES
from megalora import LoRAConfig
from megalora.losses import group_advantages, policy_gradient_loss, vocab_parallel_logprobs
from megalora.rollouts.engine import Answer, Sampling
from megalora.rollouts.megatron import MegatronEngine

# A word, and the end of its line; of questions whose answers are longer too.
MAX_TOKENS, MAX_TOKENS_MEASURED = 2, 8
NUM_EXAMPLES = 3
HELD_OUT_SEED = "held out"
# Answers sampled at a time.
MAX_SAMPLED = 256


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt with its answers and their rewards."""

    prompt: list[int]
    answers: list[Answer]
    rewards: list[float]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Groups as a model takes them: each a row of its prompt and all its answers behind each other.

    An answer's tokens see the prompt and what is before them in the answer, and stand where they
    would if it were the only one. The last token of an answer is predicted, and not read.

    tokens: [b, s]. positions: [s]. hidden: [1, 1, s, s] bool, true where a token is not seen.
    predictors: [g * a], which position predicts each of the answers' tokens. targets: these,
    [b, g * a], 0 where an answer has ended; answered: [b, g * a] bool, false there.
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    predictors: Tensor
    targets: Tensor
    answered: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Rows":
        """Lay groups out; their prompts have one length, and each has as many answers."""
        shapes = {(len(group.prompt), len(group.answers)) for group in groups}
        if len(shapes) != 1:
            raise ValueError(f"groups have prompts and answers of {sorted(shapes)}: give all alike")
        length, num = shapes.pop()
        size = max(len(answer.tokens) for group in groups for answer in group.answers)
        targets = torch.zeros(len(groups), num, size, dtype=torch.long)
        answered = torch.zeros(len(groups), num, size, dtype=torch.bool)
        for row, group in enumerate(groups):
            for column, answer in enumerate(group.answers):
                targets[row, column, : len(answer.tokens)] = torch.tensor(answer.tokens)
                answered[row, column, : len(answer.tokens)] = True
        prompts = torch.tensor([group.prompt for group in groups])
        # Of a row's tokens: which answer each is of, -1 for the prompt, and where it stands there.
        of_answer = torch.arange(num).repeat_interleave(size - 1)
        owner = torch.cat([torch.full((length,), -1), of_answer])
        positions = torch.cat([torch.arange(length), length + torch.arange(size - 1).repeat(num)])
        seen = (owner[:, None] == owner) | (owner == -1)
        firsts = length + torch.arange(num)[:, None] * (size - 1) + torch.arange(size) - 1
        firsts[:, 0] = length - 1
        return cls(
            tokens=torch.cat([prompts, targets[:, :, :-1].flatten(1)], dim=1).to(device()),
            positions=positions.to(device()),
            hidden=~(seen & (positions[:, None] >= positions))[None, None].to(device()),
            predictors=firsts.flatten().to(device()),
            targets=targets.flatten(1).to(device()),
            answered=answered.flatten(1).to(device()),
        )

    def logprobs(self, model: torch.nn.Module) -> Tensor:
        """Return the log probability of each of the answers' tokens, fp32 [b, g * a]."""
        with _standing_at(self.positions, model):
            logits = model(self.tokens, self.positions.expand_as(self.tokens), self.hidden)
        return vocab_parallel_logprobs(logits[:, self.predictors], self.targets)


@contextlib.contextmanager
def _standing_at(positions: Tensor, model: torch.nn.Module) -> Iterator[None]:
    """Turn queries and keys by positions, where Megatron takes a token's place in its row."""
    chunk: GPTModel = unwrap_model(model)  # type: ignore[assignment]
    hook = chunk.rotary_pos_emb.register_forward_hook(lambda *args: args[-1][positions])
    try:
        yield
    finally:
        hook.remove()


class Learner:
    """A model that learns from its answers."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # The largest difference of a sampled token's log probability from the learner's, in nats.
        self.gap = 0.0

    def learn(self, groups: Sequence[Group]) -> None:
        """Take NUM_UPDATES optimizer steps, each on its part of the groups."""
        size = -(-len(groups) // NUM_UPDATES)
        for first in range(0, len(groups), size):
            self.trainer.step(self._loss(groups[first : first + size], is_sampler=first == 0))

    def _loss(self, groups: Sequence[Group], *, is_sampler: bool) -> Iterator[Tensor]:
        """Yield the loss; is_sampler: the answers are of the policy as it is."""
        rows = Rows.of(groups)
        logprobs = rows.logprobs(self.trainer.model)
        sampled = torch.zeros_like(logprobs)
        sampled[rows.answered] = torch.tensor(
            [value for group in groups for answer in group.answers for value in answer.logprobs],
            device=logprobs.device,
        )
        if is_sampler:
            apart = (logprobs.detach() - sampled)[rows.answered].abs().max()
            self.gap = max(self.gap, float(apart))
        rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        advantages = group_advantages(rewards, GROUP_SIZE).to(logprobs.device)
        # [token, answer].
        parts = [x.view(len(rewards), -1).T for x in (logprobs, sampled, rows.answered)]
        yield policy_gradient_loss(parts[0], parts[1], advantages, parts[2]) / len(rewards)


class Answering:
    """A model that answers questions, GROUP_SIZE times each, at temperature 1 and uncut."""

    def __init__(self, model: torch.nn.Module, directory: Path) -> None:
        self.engine = MegatronEngine([model], max_batch_size=MAX_SAMPLED)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        # An answer ends with its line.
        self.stop = (*self.tokenizer.encode("\n"), self.tokenizer.eos_token_id)

    def groups(
        self, questions: Sequence[Question], seed: int, max_tokens: int = MAX_TOKENS
    ) -> list[Group]:
        """Return the answers to each question."""
        prompts = [self.tokenizer.encode(question.prompt) for question in questions]
        asked = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
        sampling = Sampling(max_tokens=max_tokens, stop=self.stop, seed=seed)
        answers = self.engine.generate(asked, sampling)
        groups = []
        for index, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
            own = answers[index * GROUP_SIZE : (index + 1) * GROUP_SIZE]
            rewards = [question.reward(self.text(answer)) for answer in own]
            groups.append(Group(prompt=prompt, answers=own, rewards=rewards))
        return groups

    def text(self, answer: Answer) -> str:
        """Return what an answer says."""
        return self.tokenizer.decode(answer.tokens, skip_special_tokens=True)


def share(groups: Sequence[Group]) -> float:
    """Return the share of right answers."""
    return mean(reward for group in groups for reward in group.rewards)


def run(job: Job, directory: Path) -> Result:
    """Reward a pretrained model for right answers; measure it on questions it was not trained on.

    job.batch_size: questions of a step, each answered GROUP_SIZE times. job.steps 0: only measure
    the base, on that many questions.
    """
    assert job.precision is not None
    model = build(directory, job.precision)
    if not job.steps:
        return measure(Answering(model, directory), KINDS[job.questions or REWARDED], job)
    lora = LoRAConfig(rank=job.rank, targets=job.targets, seed=job.seed) if job.rank else None
    trainer = Trainer(model, lora, job.lr, adam_eps=ADAM_EPS)
    answering, learner = Answering(trainer.model, directory), Learner(trainer)
    kind = KINDS[job.questions or REWARDED]
    held_out = draw(kind, HELD_OUT_QUESTIONS, HELD_OUT_SEED)
    before = share(answering.groups(held_out, 0))
    questions = draw(kind, job.steps * job.batch_size, job.seed, without=set(held_out))
    start, curve = process_time(), []
    for step in range(job.steps):
        asked = questions[step * job.batch_size : (step + 1) * job.batch_size]
        groups = answering.groups(asked, job.seed * MAX_STEPS + step + 1)
        curve.append(share(groups))
        learner.learn(groups)
    cpu_seconds = process_time() - start
    return Result(
        curve=curve,
        final=share(answering.groups(held_out, 0)),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        cpu_seconds=cpu_seconds,
        before=before,
        gap=learner.gap,
    )


def measure(answering: Answering, kind: Kind, job: Job) -> Result:
    """Measure how often a base answers questions of a kind rightly."""
    questions = draw(kind, job.batch_size, job.seed)
    groups = answering.groups(questions, job.seed, MAX_TOKENS_MEASURED)
    shown = list(zip(questions, groups, strict=True))[:NUM_EXAMPLES]
    return Result(
        curve=[mean(group.rewards) for group in groups],
        final=share(groups),
        trainable=0,
        examples=[
            [question.prompt, question.answer, *(answering.text(a) for a in group.answers)]
            for question, group in shown
        ],
    )
