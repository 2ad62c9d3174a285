"""What is known to go wrong with adapters in reinforcement learning.

Sources: arXiv 2512.23165 for starts and rank 1; OpenReview XGZHI14m8P for large ranks.
"""

from megalora.config import LoRAConfig

_COLLAPSES, _RISKY = 128, 64


def rl_warnings(config: LoRAConfig) -> list[str]:
    """Return a line for each choice that is known to do badly."""
    found = []
    if config.init == "pissa":
        found.append(
            "lora_init is pissa: starts from singular vectors have collapsed in reinforcement "
            "learning; leave --lora-init out"
        )
    if config.rank >= _COLLAPSES:
        found.append(
            f"lora_rank is {config.rank}: ranks of {_COLLAPSES} and more have collapsed in "
            "reinforcement learning; 8 to 32 stay trainable"
        )
    elif config.rank >= _RISKY:
        found.append(
            f"lora_rank is {config.rank}: rank {_RISKY} has collapsed with large batches in "
            "reinforcement learning; 8 to 32 stay trainable"
        )
    if config.rank == 1:
        found.append("lora_rank is 1: it can be a bottleneck in reinforcement learning; 8 is not")
    return found
