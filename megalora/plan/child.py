"""What a rank's process does: it plans the rank, and reads off its flags what is of all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# It imports transformers, which takes longer than a tiny rank: once, before ranks are forked.
import megatron.core.tokenizers.text  # noqa: F401

from megalora.plan import world
from megalora.plan.facts import Facts, facts_of
from megalora.plan.rank import RankPlan, read_rank
from megalora.plan.ranks import Alike, alike
from megalora.plan.script import Built, build
from megalora.plan.untouched import Untouched
from megalora.replace import install


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rank's process hands back.

    facts, alike: what its parsed flags say of the whole run, and which of its ranks differ.
    """

    plan: RankPlan
    facts: Facts
    alike: list[Alike]


def answer(
    rank: int, script: Path, argv: Sequence[str], *, world_size: int, gpus_per_node: int
) -> Answer:
    """Plan one rank in this process, which is of no use for anything else afterwards.

    Raises what Megatron and megalora find wrong with the flags.
    """
    world.become(rank, world_size, gpus_per_node=gpus_per_node)
    untouched = Untouched()
    install(untouched.patches())

    def read(built: Built) -> Answer:
        plan = read_rank(rank, built, gpus_per_node=gpus_per_node)
        facts = facts_of(built.args, tuple(untouched.notes))
        return Answer(plan, facts, alike(built.args))

    return build(script, argv, read)
