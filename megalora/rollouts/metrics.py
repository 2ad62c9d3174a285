"""What an iteration's answers are known by."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Outcome(NamedTuple):
    """An answer's reward, how many tokens its prompt and it have, and whether it ended itself."""

    reward: float
    prompt_tokens: int
    answer_tokens: int
    ended: bool


def summarize(
    outcomes: Sequence[Outcome], group_size: int = 1, times: Sequence[float] = ()
) -> dict[str, float]:
    """Return means over answers, those to one prompt side by side, by the names they are logged by.

    reward/std: spread of all rewards. reward/no-advantage: the share of groups whose answers all
    have one reward, which teach nothing; left out where a group is a single answer. times: seconds
    when sampling begins, learning begins and learning ends, for tokens per second: those sampled,
    and those of prompts and answers learned from.
    """
    rewards = [outcome.reward for outcome in outcomes]
    num_sampled = sum(outcome.answer_tokens for outcome in outcomes)
    found = {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "answer/tokens": num_sampled / len(outcomes),
        "answer/ended": statistics.fmean(outcome.ended for outcome in outcomes),
    }
    if group_size > 1:
        groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
        found["reward/no-advantage"] = statistics.fmean(len(set(group)) == 1 for group in groups)
    if times:
        begin, middle, end = times
        num_learned = num_sampled + sum(outcome.prompt_tokens for outcome in outcomes)
        found["tokens-per-second/sampled"] = num_sampled / (middle - begin)
        found["tokens-per-second/learned"] = num_learned / (end - middle)
    return found
