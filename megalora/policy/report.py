"""What an iteration was like: printed, and through Megatron's own writers."""

from collections.abc import Mapping
from typing import Any

from megatron.training import global_vars, print_rank_0


def report(what: str, iteration: int, metrics: Mapping[str, float], *, prefix: str = "") -> None:
    """Print the metrics of an iteration, and write them for TensorBoard and W&B.

    what: begins the line. prefix: goes before their names in the writers, which are on the rank
    that Megatron gives them to.
    """
    numbers = " | ".join(f"{name}: {value:.6g}" for name, value in metrics.items())
    print_rank_0(f"{what} | {numbers}")
    write(iteration, metrics, prefix=prefix)


def write(iteration: int, metrics: Mapping[str, float], *, prefix: str = "") -> None:
    """Write the metrics of an iteration for TensorBoard and W&B, where this rank has a writer."""
    tensorboard: Any = global_vars.get_tensorboard_writer()
    if tensorboard:
        for name, value in metrics.items():
            tensorboard.add_scalar(prefix + name, value, iteration)
    wandb: Any = global_vars.get_wandb_writer()
    if wandb:
        wandb.log({prefix + name: value for name, value in metrics.items()}, iteration)
