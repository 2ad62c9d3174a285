"""Which rows a step takes: it follows from the seed and its place alone, on any layout.

So a run that goes on from a checkpoint goes on with the same rows.
"""

import numpy as np


class Order:
    """The order of rows: epoch after epoch, each shuffled by the seed and its number."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed

    def take(self, start: int, count: int) -> list[int]:
        """Return which rows stand at the places from `start` on."""
        places = range(start, start + count)
        epochs = {place // self.num_rows for place in places}
        shuffled = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            for epoch in epochs
        }
        each = (divmod(place, self.num_rows) for place in places)
        return [int(shuffled[epoch][index]) for epoch, index in each]
