"""Questions with one right answer each, some of which a small instructed model can answer.

A question is text that the model continues, with an example of what is wanted; the answer is what
comes before the end of the line, and is right where it is that one text.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A prompt as it stands, and the answer that is right."""

    prompt: str
    answer: str

    def reward(self, completion: str) -> float:
        """Return 1 where the first line of a completion is the answer, else 0."""
        return float(completion.partition("\n")[0].strip() == self.answer)


_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen"""
NUMBERS = _NUMBERS.split()
# Each is one token of SmolLM2's, with the space before it.
_WORDS = """apple bread chair dog egg fire gold hat ice jam key lamp moon nest oil pen rain sun tree
wind cat door fish glass hand king leaf milk night road salt ship snow star stone water"""
WORDS = _WORDS.split()


def sum_in_words(rng: random.Random) -> Question:
    """Add two numbers below ten, in words."""
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
    prompt = f"Two plus two is four.\n{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is"
    return Question(prompt, f"{NUMBERS[a + b]}.")


def sum_of_two(rng: random.Random) -> Question:
    """Add two numbers of two digits."""
    a, b = rng.randrange(10, 50), rng.randrange(10, 50)
    return Question(f"12 + 25 = 37\n{a} + {b} =", str(a + b))


def sum_of_three(rng: random.Random) -> Question:
    """Add three numbers below ten."""
    a, b, c = (rng.randrange(1, 10) for _ in range(3))
    return Question(f"2 + 3 + 4 = 9\n{a} + {b} + {c} =", str(a + b + c))


def larger_number(rng: random.Random) -> Question:
    """Say the larger of two numbers of two digits."""
    a, b = rng.sample(range(10, 100), 2)
    return Question(f"Larger of 12 and 45: 45\nLarger of {a} and {b}:", str(max(a, b)))


def largest_of_list(rng: random.Random) -> Question:
    """Evaluate Python's max of a list of three numbers."""
    items = rng.sample(range(10, 100), 3)
    return Question(f">>> max({items})\n", str(max(items)))


def second_word(rng: random.Random) -> Question:
    """Copy the second of four words."""
    words = rng.sample(WORDS, 4)
    shown = "Second word of red big cup cow: big"
    return Question(f"{shown}\nSecond word of {' '.join(words)}:", words[1])


def last_word(rng: random.Random) -> Question:
    """Copy the last of four words."""
    words = rng.sample(WORDS, 4)
    shown = "Last word of red big cup cow: cow"
    return Question(f"{shown}\nLast word of {' '.join(words)}:", words[3])


def two_words_turned(rng: random.Random) -> Question:
    """Turn two words round."""
    a, b = rng.sample(WORDS, 2)
    return Question(f"red cup -> cup red\n{a} {b} ->", f"{b} {a}")


type Kind = Callable[[random.Random], Question]
KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        sum_in_words,
        sum_of_two,
        sum_of_three,
        larger_number,
        largest_of_list,
        second_word,
        last_word,
        two_words_turned,
    )
}

# The kind that a pretrained model is rewarded for.
REWARDED = last_word.__name__


def draw(
    kind: Kind, num: int, seed: int | str, without: Collection[Question] = ()
) -> list[Question]:
    """Draw different questions of a kind, none of which is among others."""
    rng = random.Random(f"{kind.__name__} {seed}")
    drawn: dict[Question, None] = {}
    while len(drawn) < num:
        question = kind(rng)
        if question not in without:
            drawn[question] = None
    return list(drawn)
