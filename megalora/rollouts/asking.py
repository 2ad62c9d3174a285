"""Answers that one rank of each replica asks a server for: checked, and told to all of it."""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megalora.checkpoint.ranks import on_all_ranks
from megalora.rollouts.engine import Answer, Sampling
from megalora.sync.replica import Replica

# What servers put for minus infinity, which is no sampled token's, and rounding above zero.
_LOWEST, _HIGHEST = -9000.0, 1e-3


def ask_for_all(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ask: Callable[[Sequence[int], int], Answer],
    *,
    concurrency: int,
) -> list[Answer]:
    """Return an answer to each prompt on all ranks of a replica, asked by the one that speaks.

    ask: of a prompt's tokens and a seed, of which each answer has its own: a server that is given
    one seed for the equal prompts of a group would answer all alike. concurrency: requests at once;
    of more prompts some wait for others, and all other ranks for the last of them.
    All ranks must call it; what fails on one ends in one ValueError on all.
    """

    def work() -> Tensor | None:
        _check_prompts(prompts)
        if not replica.speaks:
            return None
        seeds = [_seed(sampling.seed, replica.index, number) for number in range(len(prompts))]
        with ThreadPoolExecutor(min(concurrency, max(1, len(prompts)))) as threads:
            asked = [threads.submit(ask, *each) for each in zip(prompts, seeds, strict=True)]
            try:
                return _numbers([each.result() for each in asked])
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    return _answers(replica.share(on_all_ranks(work)))


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} of {len(prompts)} has no tokens")


def _seed(seed: int, replica: int, number: int) -> int:
    """Return a seed of 63 bits for an answer, as far from others as chance has it."""
    digest = hashlib.sha256(f"{seed} {replica} {number}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def checked(
    where: str, tokens: object, logprobs: object, reason: object, sampling: Sampling
) -> Answer:
    """Return an answer that is what was asked for; ValueError, which names the URL, for any other.

    reason: `stop` or `length`, as servers say why an answer ends.
    """
    asked = f"{where}: an answer was asked of {sampling.max_tokens} tokens at most"
    own = _tokens(tokens)
    if not 1 <= len(own) <= sampling.max_tokens:
        raise ValueError(f"{asked}, and has {_short(tokens)}: is the server one of those tried?")
    if not isinstance(logprobs, list) or len(logprobs) != len(own):
        count = len(logprobs) if isinstance(logprobs, list) else "no"
        raise ValueError(
            f"{asked}, and has {len(own)} tokens with {count} log probabilities: one for each "
            "was asked for"
        )
    values = [float(v) if type(v) in (int, float) else math.nan for v in logprobs]
    if not all(math.isfinite(value) for value in values):
        raise ValueError(
            f"{where}: a log probability of an answer is missing or not finite, {_short(logprobs)}:"
            " has the adapter diverged?"
        )
    if not all(_LOWEST < value <= _HIGHEST for value in values):
        raise ValueError(
            f"{where}: {_short(logprobs)} are no log probabilities of sampled tokens: the server "
            "has to give raw or processed logprobs, not logits (vLLM's --logprobs-mode)"
        )
    ended = _ended(where, own, reason, sampling)
    return Answer(own, [min(value, 0.0) for value in values], ended)


def _ended(where: str, tokens: list[int], reason: object, sampling: Sampling) -> bool:
    stops = [number for number, token in enumerate(tokens) if token in sampling.stop]
    if reason == "stop" and stops == [len(tokens) - 1]:
        return True
    if (
        reason == "length"
        and len(tokens) == sampling.max_tokens
        and stops in ([], [len(tokens) - 1])
    ):
        # Where the last token that may come is a stop token, servers say either.
        return bool(stops)
    raise ValueError(
        f"{where}: an answer of {len(tokens)} tokens, the last of them {tokens[-1]}, ended by "
        f"{reason!r:.100}; it should end by a token of stop {list(sampling.stop)} or after "
        f"{sampling.max_tokens}: add what ends the model's texts to stop, and let the server's "
        "longest context be that of prompt and answer"
    )


def _tokens(value: object) -> list[int]:
    """Return tokens, none for what are no tokens."""
    are_tokens = isinstance(value, list) and all(type(v) is int and 0 <= v < 2**31 for v in value)
    return value if isinstance(value, list) and are_tokens else []


def _short(value: object) -> str:
    return f"{value!r:.80}"


def _numbers(answers: Sequence[Answer]) -> Tensor:
    """Return answers as fp64 [n]: how many, then of each its length, whether it ended, and all."""
    found = [torch.tensor([len(answers)], dtype=torch.float64)]
    for answer in answers:
        head = [len(answer.tokens), answer.ended]
        found.append(torch.tensor([*head, *answer.tokens, *answer.logprobs], dtype=torch.float64))
    return torch.cat(found)


def _answers(numbers: Tensor) -> list[Answer]:
    """Return the answers that `_numbers` wrote down."""
    values = numbers.tolist()
    count, at, found = int(values[0]), 1, []
    for _ in range(count):
        length, ended, at = int(values[at]), bool(values[at + 1]), at + 2
        tokens, logprobs = values[at : at + length], values[at + length : at + 2 * length]
        found.append(Answer([int(token) for token in tokens], logprobs, ended))
        at += 2 * length
    return found
