"""Plans of tiny runs, each in a process of its own, as the command makes them."""

import contextlib
import io
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support import forked

# What the flags of a tiny run have in common; `SIZES` and a layout come to them.
COMMON = (
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "128", "--lr", "1e-3"),
    *("--train-iters", "2", "--eval-iters", "0", "--eval-interval", "10"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--transformer-impl", "local", "--no-masked-softmax-fusion", "--no-persist-layer-norm"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--bf16"),
)
SIZES = (
    *("--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "128"),
    *("--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2"),
    *("--seq-length", "32", "--max-position-embeddings", "32"),
    *("--micro-batch-size", "1", "--global-batch-size", "8", "--lora-rank", "4"),
)
EXPERTS = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
    *("--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"),
)


def planned(rank: int, world_size: int, *flags: str, script: Path | None = None) -> Any:
    """Return the plan of one rank of a tiny run."""
    return forked.call(plan_here, rank, world_size, (*COMMON, *SIZES, *flags), script)


def plan_here(rank: int, world_size: int, argv: Sequence[str], script: Path | None) -> Any:
    """Plan a rank in this process, which cannot be used for anything else afterwards."""
    with in_a_world(rank, world_size):
        return rank_plan(rank, argv, world_size=world_size, script=script)


def rank_plan(
    rank: int, argv: Sequence[str], *, world_size: int, script: Path | None = None
) -> Any:
    """Plan a rank in this process, where a plan's world is installed."""
    from megalora.plan import world
    from megalora.plan.processes import OWN_SCRIPT
    from megalora.plan.rank import read_rank
    from megalora.plan.script import build

    world.become(rank, world_size)
    return build(script or OWN_SCRIPT, argv, lambda built: read_rank(rank, built, gpus_per_node=8))


@contextlib.contextmanager
def in_a_world(rank: int, world_size: int) -> Iterator[None]:
    """Make this process, which the tests' server forked, a rank of a plan; it prints nothing."""
    from megalora.plan import world

    world.install()
    world.become(rank, world_size)
    # A forked process has the server's main module.
    sys.modules["__main__"] = types.ModuleType("__main__")
    with contextlib.redirect_stdout(io.StringIO()):
        yield
