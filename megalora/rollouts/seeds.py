"""Which prompts an iteration answers and by which numbers: both follow from the run's seed alone.

So a run that goes on from a checkpoint goes on with the same prompts and answers.
"""

import numpy as np


class Order:
    """The order of prompts: epoch after epoch, each shuffled by the seed and its number."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed

    def take(self, start: int, count: int) -> list[int]:
        """Return which prompts stand at the places from `start` on."""
        places = range(start, start + count)
        epochs = {place // self.num_prompts for place in places}
        shuffled = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(self.num_prompts)
            for epoch in epochs
        }
        each = (divmod(place, self.num_prompts) for place in places)
        return [int(shuffled[epoch][index]) for epoch, index in each]


def sampling_seed(seed: int, iteration: int) -> int:
    """Return the seed by which an iteration samples; the first is 1, evaluations take 0."""
    return (seed * 1_000_003 + iteration) % 2**31
