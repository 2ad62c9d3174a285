"""The phases of a training step, and what one was seen to hold."""

from dataclasses import dataclass

# Phases of a step: what comes once for each microbatch, and what comes once.
MICROBATCH, FINISH, UPDATE = "microbatch", "finish", "update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step was seen to do; bytes.

    microbatches: how many ran. all_microbatches: how many a step of the run has; what is counted in
    the phase `microbatch` grows with them, but for what is in flight, which they fill. before: held
    when it starts, parameters, gradients and the optimizer's states. peak: the most that was held.
    """

    microbatches: int
    all_microbatches: int
    before: int
    peak: int
