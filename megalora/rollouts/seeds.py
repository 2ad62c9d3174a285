"""By which numbers an iteration samples: they follow from the run's seed alone.

So a run that goes on from a checkpoint goes on with the same answers.
"""


def sampling_seed(seed: int, iteration: int) -> int:
    """Return the seed by which an iteration samples; the first is 1, evaluations take 0."""
    return (seed * 1_000_003 + iteration) % 2**31
